"""``kvortex disk``: a look into the folders of the disk tier, while no engine uses them."""

import argparse
import signal
import time
from typing import Any

from kvortex._core import inspect_disk, trim_disk
from kvortex._terminal import size_of
from kvortex.config import parse_size

DAMAGED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The four commands, each with a folder."""
    kinds = parser.add_subparsers(dest="kind", metavar="what", required=True)
    for name, run, summary in (
        ("ls", _ls, "whose blocks it keeps, and since when"),
        ("stat", _stat, "its size, and how much of it is used"),
        ("fsck", _fsck, "read every block and compare it with its digest; nothing is changed unless --wipe is given"),
        ("trim", _trim, "give back what lies behind the last block, or all beyond a size"),
    ):
        sub = kinds.add_parser(name, help=summary, description=summary)
        sub.add_argument("folder", help="one of disk_paths")
        sub.set_defaults(show=run)
        if name == "fsck":
            sub.add_argument("--wipe", action="store_true", help="forget what is damaged")
        if name == "trim":
            sub.add_argument("--size", metavar="SIZE", help='keep at most this, "10GiB" say')


def main(arguments: argparse.Namespace) -> int:
    """Run one of them."""
    # A look at a large folder takes minutes, in which nothing asks whether it is to end; it can be left at any moment.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        status: int = arguments.show(arguments)
    finally:
        signal.signal(signal.SIGINT, before)
    return status


def _day(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _kept(seen: dict[str, Any]) -> int:
    return sum(owner["blocks"] for owner in seen["owners"])


def _ls(arguments: argparse.Namespace) -> int:
    seen = inspect_disk(arguments.folder)
    print(f"{'namespace':<18}{'rank':<8}{'blocks':>10}{'size':>12}  {'oldest':<18}newest")
    for owner in seen["owners"]:
        rank = f"{owner['row']}/{owner['world']}"
        size = size_of(owner["blocks"] * seen["block_bytes"])
        ages = f"{_day(owner['oldest']):<18}{_day(owner['newest'])}"
        print(f"{owner['namespace'][:16]:<18}{rank:<8}{owner['blocks']:>10}{size:>12}  {ages}")
    return 0


def _stat(arguments: argparse.Namespace) -> int:
    seen = inspect_disk(arguments.folder)
    facts = {
        "block": f"{seen['block_bytes']} bytes",
        "file": size_of(seen["file_bytes"]),
        "on the device": size_of(seen["taken_bytes"]),
        "opened": f"{seen['openings']} times",
        "places": seen["places"],
        "blocks": _kept(seen),
        "empty": seen["empty"],
        "cleared": seen["stale"],
        "bad headers": seen["bad_headers"],
    }
    for name, value in facts.items():
        print(f"{name:<16}{value}")
    return 0


def _fsck(arguments: argparse.Namespace) -> int:
    seen = inspect_disk(arguments.folder, blocks=True, wipe=arguments.wipe)
    damaged = seen["bad_headers"] + seen["bad_blocks"]
    what = f"{damaged} damaged ({seen['bad_headers']} headers, {seen['bad_blocks']} blocks)"
    print(f"{_kept(seen)} blocks sound, {what}{', wiped' if arguments.wipe and damaged else ''}")
    return DAMAGED if damaged and not arguments.wipe else 0


def _trim(arguments: argparse.Namespace) -> int:
    size = None if arguments.size is None else parse_size("--size", arguments.size)
    before, after = trim_disk(arguments.folder, size)
    print(f"{size_of(before)} before, {size_of(after)} now")
    return 0
