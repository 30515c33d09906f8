"""`kvortex bench transfer`: how fast this machine moves blocks, by the size of their fragments and the way to copy."""

import argparse
import itertools
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import kvortex
from kvortex._terminal import need_matplotlib, picture
from kvortex.config import KVortexConfig, parse_size

BLOCK_BYTES = 2 << 20
FRAGMENTS = "16KiB,32KiB,64KiB,256KiB,1MiB,2MiB"
METHODS = ("auto", "dma", "kernel", "staged")
_GB = 1e9


@dataclass(frozen=True)
class Rates:
    """Bytes per second of saves alone, of loads alone, and of both at once, together."""

    save: float
    load: float
    both: float


@dataclass(frozen=True)
class Row:
    """One way to copy blocks whose fragments have this size."""

    fragment_bytes: int
    method: str
    rates: Rates


@dataclass
class Table:
    """Everything that was measured: first one contiguous copy of the same bytes, then blocks."""

    device: str
    blocks: int
    contiguous: Rates
    block_bytes: int = BLOCK_BYTES
    rows: list[Row] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench transfer`."""
    parser.add_argument("--device", default="auto", metavar="GPU", help="auto, none, cuda or cuda:1 (default: auto)")
    parser.add_argument(
        "--size", metavar="SIZE", help="bytes of one transfer, a multiple of 2MiB (default: 1GiB, 128MiB without a GPU)"
    )
    parser.add_argument("--fragments", default=FRAGMENTS, metavar="SIZES", help=f"default: {FRAGMENTS}")
    parser.add_argument("--runs", type=int, choices=range(1, 101), default=5, metavar="N", help="1 to 100 (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON")
    parser.add_argument("--plot", type=picture, metavar="FILE", help="draw the table (.png, .svg or .pdf)")


def main(arguments: argparse.Namespace) -> int:
    """Measure and print the table. 0: done."""
    if arguments.plot is not None:
        need_matplotlib()
    device, name = find_device(arguments.device)
    fragments = _fragments(arguments.fragments)
    blocks = _block_count(arguments.size or ("128MiB" if device == "none" else "1GiB"))
    with Rig(device, blocks, arguments.runs) as rig:
        table = measure(rig, name, fragments, Progress(sys.stderr))
    show(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(asdict(table), indent=2) + "\n", encoding="utf-8")
        print(f"written: {arguments.json}")
    if arguments.plot is not None:
        draw(table, arguments.plot)
        print(f"drawn: {arguments.plot}")
    return 0


def find_device(wish: str) -> tuple[str, str]:
    """The device that is meant, "none" or "cuda:0", and its name. CudaUnavailableError if it is named and not there."""
    wish = str(KVortexConfig.of({}, device=wish).device)
    try:
        gpus = [] if wish == "none" else kvortex.gpus()
    except kvortex.CudaUnavailableError:
        if wish != "auto":
            raise
        gpus = []
    if not gpus:
        return "none", "the host's own memory"
    ordinal = int(wish.partition(":")[2] or 0)
    if ordinal >= len(gpus):
        raise kvortex.CudaUnavailableError(f"there is no {wish}: this process sees {len(gpus)} GPUs, from cuda:0 on")
    return f"cuda:{ordinal}", str(gpus[ordinal]["name"])


def _fragments(text: str) -> list[int]:
    sizes = [parse_size("--fragments", word) for word in text.split(",")]
    for size in sizes:
        if BLOCK_BYTES % size != 0 or size < 512:
            raise kvortex.ConfigError(f"--fragments {size}: give sizes that divide 2MiB, 512 bytes at least")
    return sizes


def _block_count(text: str) -> int:
    size = parse_size("--size", text)
    if size % BLOCK_BYTES != 0 or size < 4 * BLOCK_BYTES:
        raise kvortex.ConfigError(f"--size {text}: give a multiple of 2MiB, 8MiB at least")
    return size // BLOCK_BYTES


def measure(rig: "Rig", name: str, fragments: Sequence[int], progress: "Progress") -> Table:
    """The whole table."""
    methods = METHODS if rig.device != "none" else ("host",)
    cases = list(itertools.product(methods, fragments))
    progress.start(len(cases) + 1)
    progress.step("one contiguous copy")
    table = Table(name, rig.blocks, rig.contiguous(), machine=_machine(rig.device))
    for method, of_method in itertools.groupby(cases, key=lambda case: case[0]):
        with rig.engines(method) as (saving, loading):
            for _, fragment in of_method:
                progress.step(f"{size_text(fragment)}, {method}")
                table.rows.append(Row(fragment, method, rig.rates(saving, loading, rig.pages(fragment))))
    progress.end()
    table.rows.sort(key=lambda row: row.fragment_bytes)
    return table


def _machine(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "kvortex": kvortex.__version__}
    found["system"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    if device != "none":
        found["gpu"] = kvortex.gpus()[int(device.partition(":")[2])]
    return found


class Rig(ExitStack):
    """Memory for two lots of blocks where the device is, and engines to move them."""

    def __init__(self, device: str, blocks: int, runs: int) -> None:
        super().__init__()
        self.device, self.blocks, self.runs = device, blocks, runs
        self._bytes = 2 * blocks * BLOCK_BYTES

    def __enter__(self) -> Self:
        super().__enter__()
        if self.device == "none":
            self._memory: Any = kvortex.PinnedHostPool(self._bytes, device="none").allocate(self._bytes)
        else:
            self._memory = kvortex.GpuAsyncPool(self.device).allocate(self._bytes)
        self.callback(self._memory.free)
        return self

    def engine(self, method: str, block_bytes: int) -> kvortex.KVortexEngine:
        """An engine that has room for one lot."""
        knobs: dict[str, Any] = {} if method == "host" else {"copy_method": method}
        size = self.blocks * BLOCK_BYTES
        return kvortex.KVortexEngine.create(
            {},
            device=self.device,
            cpu_pool_size_bytes=size,
            block_size_bytes=block_bytes,
            eviction_watermark=1.0,
            **knobs,
        )

    def engines(self, method: str, block_bytes: int = BLOCK_BYTES) -> "_Engines":
        """One engine to save and one to load, until the end of the `with`."""
        return _Engines(self.engine(method, block_bytes), self.engine(method, block_bytes))

    def pages(self, fragment: int) -> tuple[Any, Any]:
        """Two lots of blocks, each in shuffled order, whose fragments lie in tensors of their own."""
        count = 2 * self.blocks
        starts = range(0, self._bytes, count * fragment)
        cache = kvortex.PagedCache([self._tensor(start, (count, fragment)) for start in starts])
        order = random.Random(1).sample(range(count), count)  # noqa: S311 - an order, no secret
        return cache.blocks(order[: self.blocks]), cache.blocks(order[self.blocks :])

    def _tensor(self, offset: int, shape: tuple[int, int]) -> kvortex.RawTensor:
        place = "cpu" if self.device == "none" else self.device
        return kvortex.RawTensor(self._memory.address + offset, shape, device=place, owner=self._memory)

    def contiguous(self) -> Rates:
        """One block that is all the bytes of a lot, in one piece."""
        size = self.blocks * BLOCK_BYTES
        cache = kvortex.PagedCache(self._tensor(0, (2, size)))
        with self.engines("host" if self.device == "none" else "dma", size) as (saving, loading):
            return self.rates(saving, loading, (cache.blocks([0]), cache.blocks([1])))

    def rates(self, saving: Any, loading: Any, lots: tuple[Any, Any]) -> Rates:
        """Medians of several runs after one that only warms up."""
        keys = [number.to_bytes(32, "little") for number in range(len(lots[0]))]
        size = self.blocks * BLOCK_BYTES
        stream = None if self.device == "none" else 0
        loading.reset()
        loading.save_blocks(keys, lots[1], stream=stream)

        def save() -> float:
            saving.reset()
            start = time.perf_counter()
            saving.save_blocks(keys, lots[0], stream=stream)
            return time.perf_counter() - start

        def load() -> float:
            start = time.perf_counter()
            loading.load_blocks(keys, lots[1], stream=stream)
            return time.perf_counter() - start

        def both() -> float:
            saving.reset()
            start = time.perf_counter()
            tickets = [(saving, saving.save_blocks_async(keys, lots[0], stream=stream))]
            tickets.append((loading, loading.load_blocks_async(keys, lots[1], stream=stream)))
            for engine, ticket in tickets:
                engine.wait(ticket)
            return time.perf_counter() - start

        return Rates(size / self._median(save), size / self._median(load), 2 * size / self._median(both))

    def _median(self, run: Callable[[], float]) -> float:
        run()
        return statistics.median(run() for _ in range(self.runs))


class _Engines:
    """Two engines that are shut down together."""

    def __init__(self, *engines: kvortex.KVortexEngine) -> None:
        self._engines = engines

    def __enter__(self) -> Iterator[kvortex.KVortexEngine]:
        return iter(self._engines)

    def __exit__(self, *_: object) -> None:
        for engine in self._engines:
            engine.shutdown()


class Progress:
    """A bar on a terminal; nothing anywhere else."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._done, self._all = 0, 1

    def start(self, steps: int) -> None:
        """Begins a bar of this many steps."""
        self._all = steps

    def step(self, title: str) -> None:
        """Says what goes on now."""
        if self._stream.isatty():
            filled = 30 * self._done // self._all
            bar = "#" * filled + "." * (30 - filled)
            self._stream.write(f"\r[{bar}] {self._done}/{self._all} {title:<30}")
            self._stream.flush()
        self._done += 1

    def end(self) -> None:
        """Takes the bar away."""
        if self._stream.isatty():
            self._stream.write("\r" + " " * 80 + "\r")
            self._stream.flush()


def size_text(size: int) -> str:
    """Bytes as "64 KiB" or "2 MiB"."""
    for unit, scale in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size % scale == 0:
            return f"{size // scale} {unit}"
    return f"{size} B"


_COLUMNS = "  {:<12}{:<9}{:>16}{:>16}{:>16}"


def show(table: Table) -> None:
    """The table: GB/s, and in brackets the share of the contiguous copy."""
    total = size_text(table.blocks * table.block_bytes)
    print(f"KVortex bench transfer: {table.device}; {table.blocks} blocks of 2 MiB ({total}) in shuffled order")
    print("GB/s, and in brackets the share of one contiguous copy of the same bytes\n")
    print(_COLUMNS.format("fragments", "way", "save", "load", "both at once"))
    print(_COLUMNS.format("contiguous", "", *(f"{rate / _GB:.1f}       " for rate in _three(table.contiguous))))
    for row in table.rows:
        told = zip(_three(row.rates), _three(table.contiguous), strict=True)
        shares = (f"{rate / _GB:.1f} ({rate / peak:.2f})" for rate, peak in told)
        print(_COLUMNS.format(size_text(row.fragment_bytes), row.method, *shares))


def _three(rates: Rates) -> tuple[float, float, float]:
    return rates.save, rates.load, rates.both


def draw(table: Table, path: Path) -> None:
    """Speed over the size of the fragments: a line for each way, dashed the contiguous copy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    sizes = sorted({row.fragment_bytes for row in table.rows})
    top = 1.1 / _GB * max(max(_three(rates)) for rates in [table.contiguous, *(row.rates for row in table.rows)])
    for axes, name in zip(figure.subplots(1, 3, sharey=True), ("save", "load", "both"), strict=True):
        for method in dict.fromkeys(row.method for row in table.rows):
            speeds = [getattr(row.rates, name) / _GB for row in table.rows if row.method == method]
            axes.plot(range(len(sizes)), speeds, marker="o", label=method)
        axes.axhline(getattr(table.contiguous, name) / _GB, color="#888888", linestyle="--", label="contiguous")
        axes.set_xticks(range(len(sizes)), [size_text(size) for size in sizes], rotation=30)
        axes.set_title("both at once" if name == "both" else name, loc="left")
        axes.set_ylim(0, top)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("GB/s")
    figure.supxlabel("fragment", fontsize="medium")
    figure.suptitle(f"Blocks of 2 MiB between {table.device} and the cache", x=0.01, ha="left")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=5, frameon=False)
    figure.savefig(path, dpi=150)
