"""`kvortex bench replay`: what a trace of requests would have found in host memory and on a disk, and written.

The trace has the format that the Mooncake project publishes: in each line a JSON object with `timestamp`,
`input_length`, `output_length` and `hash_ids`, the numbers of the prompt's blocks of 512 tokens, each of which stands
for itself and all before it. Every request is played to a real engine with a real disk tier, whose blocks are a few
bytes long: index, eviction and admission are the ones that serve, and no time is modelled. A request looks its longest
prefix up and then stores all of its blocks.
"""

import argparse
import hashlib
import itertools
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import kvortex
from kvortex.config import parse_size

_BLOCK = 64
_PLACE = 4096
_HEADER = 4096
_PATIENCE_MS = 60_000
# A folder in memory where there is one: what is replayed is what is kept, not how fast.
_MEMORY = Path("/dev/shm")  # noqa: S108 - a folder of our own is made in it


@dataclass(frozen=True)
class Trace:
    """The blocks of each request, in the order of time."""

    requests: list[list[int]]

    @property
    def asked(self) -> int:
        """Blocks of all requests."""
        return sum(map(len, self.requests))

    @property
    def different(self) -> int:
        """Blocks that differ."""
        return len(set(itertools.chain.from_iterable(self.requests)))

    def ideal(self) -> int:
        """Blocks that would be found if nothing were ever forgotten."""
        seen: set[int] = set()
        found = 0
        for blocks in self.requests:
            found += sum(1 for _ in itertools.takewhile(seen.__contains__, blocks))
            seen.update(blocks)
        return found


@dataclass(frozen=True)
class Row:
    """What one arrangement of tiers found and wrote, in blocks."""

    tiers: str
    host_blocks: int
    disk_blocks: int
    found: int
    from_disk: int
    written: int
    seconds: float


@dataclass
class Outcome:
    """A trace and what became of it with each arrangement."""

    requests: int
    asked: int
    different: int
    ideal: int
    block_bytes: int
    rows: list[Row] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench replay`."""
    parser.add_argument("trace", type=Path, metavar="TRACE", help="a JSONL file of the Mooncake format")
    parser.add_argument("--host", default="2%", metavar="N", help="blocks in host memory, or a share (default: 2%%)")
    parser.add_argument("--disk", default="20%", metavar="N", help="blocks on the disk, or a share (default: 20%%)")
    parser.add_argument(
        "--block-bytes",
        default="64MiB",
        metavar="SIZE",
        help="what 512 tokens take, for what is written (default: 64MiB)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")


def main(arguments: argparse.Namespace) -> int:
    """Replay and print the table. 0: done."""
    trace = read(arguments.trace)
    host, disk = (_count(name, getattr(arguments, name), trace.different) for name in ("host", "disk"))
    block_bytes = parse_size("--block-bytes", arguments.block_bytes)
    outcome = Outcome(len(trace.requests), trace.asked, trace.different, trace.ideal(), block_bytes)
    print(_title(outcome))
    for tiers, admission in (("host", None), ("host, disk", "all"), ("host, disk at second touch", "second_touch")):
        outcome.rows.append(replay(trace, tiers, host, disk, admission))
        print(_line(outcome, outcome.rows[-1]), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(asdict(outcome), indent=2) + "\n", encoding="utf-8")
        print(f"written: {arguments.json}")
    return 0


def read(path: Path) -> Trace:
    """The requests of a trace. ConfigError, naming the line, for a file of another format."""
    requests = []
    # What is no text is no JSON either, and is told with its line.
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                requests.append(_blocks(path, number, line))
    if not any(requests):
        raise kvortex.ConfigError(f"{path} has no request: give a JSONL trace with hash_ids in each line")
    return Trace(requests)


def _blocks(path: Path, number: int, line: str) -> list[int]:
    try:
        ids = json.loads(line)["hash_ids"]
    except (ValueError, KeyError, TypeError):
        ids = None
    if not isinstance(ids, list) or not all(type(block) is int for block in ids):
        raise kvortex.ConfigError(
            f'{path}, line {number}: no request; each line is an object with "hash_ids": [1, 2, ...]'
        )
    return ids


def _count(name: str, text: str, whole: int) -> int:
    """Blocks from a number or from a share of all different ones; at least one and never more than all."""
    share = text.removesuffix("%")
    try:
        part = float(share) * whole / 100 if share != text else int(text)
        count = max(1, int(part)) if part > 0 else 0
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise kvortex.ConfigError(
            f"--{name} {text}: give a number of blocks, or a share of the different ones such as 5%"
        )
    return min(count, whole)


def replay(trace: Trace, tiers: str, host: int, disk: int, admission: str | None) -> Row:
    """Play a trace to a new engine."""
    start = time.perf_counter()
    base = _MEMORY if _MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=base) as folder, _engine(folder, host, disk, admission) as engine:
        engine.bind(_BLOCK)
        _wait_for_room(engine)
        found = sum(_play(engine, blocks) for blocks in trace.requests if blocks)
        stats = engine.get_stats()
    kept = stats["disk"] or {"capacity_blocks": 0, "hits": 0, "written_blocks": 0}
    return Row(
        tiers=tiers,
        host_blocks=stats["capacity_blocks"],
        disk_blocks=kept["capacity_blocks"],
        found=found,
        from_disk=kept["hits"],
        written=kept["written_blocks"],
        seconds=time.perf_counter() - start,
    )


def _engine(folder: str, host: int, disk: int, admission: str | None) -> kvortex.KVortexEngine:
    # Host memory is filled to its last slot, so that a number of blocks is one.
    knobs: dict[str, Any] = {"eviction_watermark": 1.0, "eviction_ratio": 0.0, "huge_pages": False, "device": "none"}
    if admission is not None:
        knobs |= {"disk_paths": [folder], "disk_size_bytes": disk_bytes(disk), "disk_admission": admission}
    return kvortex.KVortexEngine.create(
        {},
        cpu_pool_size_bytes=host * _PLACE,
        disk_queue_bytes=1 << 40,
        disk_read_deadline_ms=_PATIENCE_MS,
        namespace="replay",
        **knobs,
    )


def disk_bytes(blocks: int) -> int:
    """The size of a disk tier with room for `blocks` blocks of the replay, and for less than sixteen more."""
    net = -(-blocks // 16) * 16 * (_PLACE + _HEADER) + 2 * _HEADER
    # What docs/disk.md sets aside for the file system's own map of the file.
    return (net + (32 << 10)) * 1024 // 1023 + 1


def _wait_for_room(engine: kvortex.KVortexEngine) -> None:
    """The file grows in the background."""
    engine.flush(_PATIENCE_MS)
    before = -1
    while (disk := engine.get_stats()["disk"]) is not None and disk["capacity_blocks"] != before:
        before = disk["capacity_blocks"]
        time.sleep(0.1)


def _play(engine: kvortex.KVortexEngine, blocks: Sequence[int]) -> int:
    keys = b"".join(map(_key, blocks))
    found = engine.match_prefix(keys)
    engine.save_blocks(keys, memoryview(bytes(len(blocks) * _BLOCK)).cast("B", (len(blocks), _BLOCK)))
    engine.flush(_PATIENCE_MS)
    return found


def _key(block: int) -> bytes:
    return hashlib.sha256(str(block).encode()).digest()


def _title(outcome: Outcome) -> str:
    ideal = f"{outcome.ideal / outcome.asked:.1%} found if nothing were forgotten"
    asked = f"{outcome.requests:,} requests for {outcome.asked:,} blocks, {outcome.different:,} different; {ideal}"
    columns = f"{'tiers':<28}{'host':>9}{'disk':>9}{'found':>9}{'from disk':>11}{'written':>10}{'per block asked':>17}"
    return f"{asked}\n\n{columns}"


def _line(outcome: Outcome, row: Row) -> str:
    def share(blocks: int) -> str:
        return f"{blocks / outcome.asked:.1%}"

    written = f"{row.written * outcome.block_bytes / 2**40:.2f} TiB"
    sizes, per_block = f"{row.host_blocks:>9,}{row.disk_blocks:>9,}", row.written / outcome.asked
    return f"{row.tiers:<28}{sizes}{share(row.found):>9}{share(row.from_disk):>11}{written:>10}{per_block:>17.2f}"
