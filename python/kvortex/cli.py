"""The ``kvortex`` command. A subcommand's module is imported only when that subcommand is asked for."""

import argparse
import os
import platform
import sys
from collections.abc import Callable, Sequence

import kvortex
from kvortex._terminal import size_of
from kvortex.config import cgroup_limit, default_pool_size, physical_memory

FAILED = 1
INTERRUPTED = 130

Command = Callable[[argparse.Namespace], int]


def demo(parser: argparse.ArgumentParser) -> Command:
    """A long document and several questions about it: computed again each time, then with the prefix reused."""
    import kvortex.demo as module

    module.add_arguments(parser)
    return module.main


def bench(parser: argparse.ArgumentParser) -> Command:
    """Measurements: `transfer`, how fast blocks move on this machine; `replay`, what a trace would have found."""
    import kvortex.bench as transfer
    import kvortex.replay as replay

    kinds = parser.add_subparsers(dest="kind", metavar="what", required=True)
    for name, module, summary in (
        ("transfer", transfer, "how fast blocks move, by the size of their fragments and the way to copy"),
        ("replay", replay, "what a trace of requests would have found in memory and on a disk, and written"),
    ):
        sub = kinds.add_parser(name, help=summary, description=summary)
        module.add_arguments(sub)
        sub.set_defaults(start=module.main)

    def start(arguments: argparse.Namespace) -> int:
        status: int = arguments.start(arguments)
        return status

    return start


def doctor(parser: argparse.ArgumentParser) -> Command:
    """What of this machine decides how fast KVortex is, and what to change."""
    import kvortex.doctor as module

    module.add_arguments(parser)
    return module.main


def disk(parser: argparse.ArgumentParser) -> Command:
    """What a folder of the disk tier keeps: `ls`, `stat`, `fsck` and `trim`, while no engine uses it."""
    import kvortex.disk as module

    module.add_arguments(parser)
    return module.main


def info(_parser: argparse.ArgumentParser) -> Command:
    """Version, build and machine: what a bug report needs."""

    def show(_arguments: argparse.Namespace) -> int:
        for name, value in facts().items():
            print(f"{name:<16}{value}")
        return 0

    return show


# Each adds its arguments to its parser and returns what runs it; only the one asked for is called.
COMMANDS: tuple[Callable[[argparse.ArgumentParser], Command], ...] = (demo, doctor, bench, disk, info)


def facts() -> dict[str, str]:
    """What `kvortex info` prints, by name."""
    limit = cgroup_limit()
    return {
        "kvortex": kvortex.__version__,
        **{name: str(value) for name, value in kvortex.build_info().items() if name != "version"},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": str(len(os.sched_getaffinity(0))),
        "memory": size_of(physical_memory()),
        "cgroup limit": "none" if limit is None else size_of(limit),
        "default pool": size_of(default_pool_size()),
        "huge pages": _selected("/sys/kernel/mm/transparent_hugepage/enabled"),
    }


def _selected(path: str) -> str:
    """The bracketed word of a kernel setting such as "always [madvise] never"."""
    try:
        with open(path, encoding="ascii") as file:
            return file.read().partition("[")[2].partition("]")[0]
    except OSError:
        return "unknown"


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvortex", description="KV-cache memory hierarchy for LLM inference")
    parser.add_argument("--version", action="version", version=f"kvortex {kvortex.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for command in COMMANDS:
        summary = command.__doc__
        sub = commands.add_parser(command.__name__, help=summary, description=summary)
        if command.__name__ == chosen:
            sub.set_defaults(run=command(sub))
    return parser


def _failure(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"the module {error.name} is not installed; pip install 'kvortex[demo]' brings it"
    return " ".join(str(error).split())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. 0: done, 1: it failed and said why in one line, 2: the command line is wrong."""
    words = sys.argv[1:] if argv is None else list(argv)
    chosen = next((word for word in words if not word.startswith("-")), None)
    try:
        arguments = _parser(chosen).parse_args(words)
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has seen enough; without this the interpreter would complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (kvortex.KVortexError, OSError, ModuleNotFoundError) as error:
        print(f"kvortex: {_failure(error)}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return status
