"""`kvortex doctor`: what of this machine decides how fast KVortex is, and what to change."""

import argparse
import json
import os
import platform
import resource
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import kvortex
from kvortex import bench
from kvortex._terminal import size_of
from kvortex.config import KVortexConfig, cgroup_limit, default_pool_size, physical_memory

OK, NOTE, PROBLEM = "ok", "note", "problem"

# By the speed of a PCI Express lane that the system tells: its generation, and the GB/s that encoding leaves.
_LANES = {
    "2.5": (1, 0.25),
    "5.0": (2, 0.5),
    "8.0": (3, 0.985),
    "16.0": (4, 1.969),
    "32.0": (5, 3.938),
    "64.0": (6, 7.563),
}
_SYS = Path("/sys")
_SHARED = "/dev/shm"  # noqa: S108 - looked at, not written
# What of a link's nominal speed a good machine reaches.
_GOOD_SHARE = 0.7
_TRIAL_BYTES = 256 << 20


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: "ok", a "note" (it works, slower than it could) or a "problem"."""

    subject: str
    state: str
    text: str
    remedy: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `doctor`."""
    parser.add_argument("--device", default="auto", metavar="GPU", help="auto, none, cuda or cuda:1 (default: auto)")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def main(arguments: argparse.Namespace) -> int:
    """Look at the machine and say what was found. 0: everything works, perhaps with notes; 1: there is a problem."""
    findings = list(examine(arguments.device))
    problems = sum(finding.state == PROBLEM for finding in findings)
    if arguments.json:
        told = {"kvortex": kvortex.__version__, "ok": problems == 0, "findings": [asdict(found) for found in findings]}
        print(json.dumps(told, indent=2))
    else:
        show(findings)
    return 1 if problems else 0


def show(findings: list[Finding]) -> None:
    """A line for each finding, with its remedy below."""
    for found in findings:
        print(f"{found.state:<9}{found.subject:<18}{found.text}")
        if found.remedy:
            print(f"{'':<27}-> {found.remedy}")
    notes, problems = (sum(found.state == state for found in findings) for state in (NOTE, PROBLEM))
    print(f"\n{problems} problems, {notes} notes." if problems or notes else "\nNothing to change.")


def examine(device: str) -> Iterator[Finding]:
    """Every finding, the machine first."""
    yield Finding("kvortex", OK, f"{kvortex.__version__}, Python {platform.python_version()}, {platform.platform()}")
    yield from configuration()
    yield from memory()
    yield huge_pages()
    yield shared_memory()
    wish = str(KVortexConfig.of({}, device=device).device)
    if wish == "none":
        yield Finding("GPU", OK, "none asked for: blocks in host memory")
    else:
        yield from graphics(wish)


def configuration() -> Iterator[Finding]:
    """Whether the environment's settings can work."""
    try:
        config = KVortexConfig.of(None)
    except kvortex.ConfigError as error:
        yield Finding("configuration", PROBLEM, str(error), "change or unset the KVORTEX_ variable")
        return
    changed = sorted(name for name in os.environ if name.startswith("KVORTEX_"))
    yield Finding("configuration", OK, ", ".join(changed) or "the defaults")
    pool, most = int(config.cpu_pool_size_bytes), physical_memory()
    if pool > most:
        remedy = "make cpu_pool_size_bytes smaller"
        yield Finding("pool", PROBLEM, f"{size_of(pool)} of the {size_of(most)} that there are", remedy)


def memory() -> Iterator[Finding]:
    """Memory, its limit, and the pool that follows from them."""
    limit = cgroup_limit()
    bound = "no control-group limit" if limit is None else f"control-group limit {size_of(limit)}"
    yield Finding("memory", OK, f"{size_of(physical_memory())}, {bound}; default pool {size_of(default_pool_size())}")


def huge_pages() -> Finding:
    """Whether the kernel gives large pages to who asks."""
    setting = _read("kernel/mm/transparent_hugepage/enabled").partition("[")[2].partition("]")[0] or "unknown"
    if setting != "never":
        return Finding("huge pages", OK, f"transparent: {setting}")
    remedy = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled (as root)"
    return Finding("huge pages", NOTE, "off: the pool starts and copies more slowly", remedy)


def shared_memory() -> Finding:
    """Room in /dev/shm, which engines of several processes share their pool in."""
    try:
        stat = os.statvfs(_SHARED)
    except OSError as error:
        return Finding("shared memory", NOTE, f"{_SHARED}: {error.strerror}", "mount a tmpfs there")
    size = stat.f_frsize * stat.f_blocks
    if size >= 1 << 30:
        return Finding("shared memory", OK, f"{_SHARED} has {size_of(size)}")
    remedy = "needed only for engines of several processes: start the container with --shm-size=16g or --ipc=host"
    return Finding("shared memory", NOTE, f"{_SHARED} has only {size_of(size)}", remedy)


def graphics(wish: str) -> Iterator[Finding]:
    """The GPU that is meant, its link and how it copies."""
    try:
        gpus = kvortex.gpus()
    except kvortex.CudaUnavailableError as error:
        yield _without_gpu(str(error), wish)
        return
    ordinal = int(wish.partition(":")[2] or 0)
    if ordinal >= len(gpus):
        text = f"there is no {wish}: this process sees {len(gpus)}"
        yield Finding("GPU", PROBLEM, text, "look at CUDA_VISIBLE_DEVICES")
        return
    gpu = gpus[ordinal]
    free, total = size_of(gpu["memory_free_bytes"]), size_of(gpu["memory_bytes"])
    capability = f"compute capability {gpu['compute_capability']}"
    yield Finding("GPU", OK, f"cuda:{ordinal} of {len(gpus)}: {gpu['name']}, {capability}, {free} of {total} free")
    yield Finding("driver", OK, f"CUDA {gpu['driver_cuda']}")
    yield numa(gpu)
    yield memlock()
    yield from link(gpu)


def _without_gpu(reason: str, wish: str) -> Finding:
    if wish == "auto" and not any(Path("/dev").glob("nvidia[0-9]*")):
        return Finding("GPU", OK, "none on this machine: blocks in host memory")
    return Finding("GPU", PROBLEM, reason, "blocks stay in host memory until this is mended")


def numa(gpu: dict[str, Any]) -> Finding:
    """Whether this process may run next to the GPU."""
    node = gpu["numa_node"]
    nodes = sorted(_SYS.glob("devices/system/node/node[0-9]*"))
    if node is None or len(nodes) < 2:
        return Finding("NUMA", OK, "one node" if len(nodes) < 2 else "the system does not say which node the GPU is on")
    near = _cpus(_read(f"devices/system/node/node{node}/cpulist"))
    if near & os.sched_getaffinity(0):
        return Finding("NUMA", OK, f"the GPU is on node {node} of {len(nodes)}, where this process may run")
    remedy = f"run under numactl --cpunodebind={node}"
    return Finding("NUMA", NOTE, f"the GPU is on node {node}, and this process may run on none of its CPUs", remedy)


def _cpus(text: str) -> set[int]:
    """The numbers of a list such as "0-3,8"."""
    found: set[int] = set()
    for word in filter(None, text.split(",")):
        first, _, last = word.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def memlock() -> Finding:
    """The limit on locked memory, which some systems hold page-locked memory to."""
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    text = "no limit" if soft == resource.RLIM_INFINITY else f"limit {size_of(soft)}"
    return Finding("locked memory", OK, f"{text} (ulimit -l)")


def link(gpu: dict[str, Any]) -> Iterator[Finding]:
    """What the link is, what it does, and how copies are made on it."""
    device = f"cuda:{gpu['ordinal']}"
    with bench.Rig(device, _TRIAL_BYTES // bench.BLOCK_BYTES, runs=3) as rig:
        peak = rig.contiguous()
    if not kvortex.PinnedHostPool(_TRIAL_BYTES, device=device).pinned:
        remedy = "raise ulimit -l and the control group's memory limit; the log has the driver's answer"
        text = f"{size_of(_TRIAL_BYTES)} could not be page-locked: copies are slow"
        yield Finding("page-locking", PROBLEM, text, remedy)
    else:
        yield Finding("page-locking", OK, "works")
    yield lanes(gpu, min(peak.save, peak.load))
    speeds = f"save {peak.save / 1e9:.1f}, load {peak.load / 1e9:.1f}, both at once {peak.both / 1e9:.1f} GB/s"
    yield Finding("measured", OK, f"{speeds} for {size_of(_TRIAL_BYTES)} in one piece")
    profile = kvortex.gpu_link(gpu["ordinal"], fresh=True)
    for name in ("save", "load"):
        yield Finding(f"copy method, {name}", OK, _methods(profile["store" if name == "save" else name]["methods"]))


def lanes(gpu: dict[str, Any], measured: float) -> Finding:
    """The generation and width of the link, now and at most, against what was measured."""
    at = f"bus/pci/devices/{gpu['bus_id'].lower()}"
    now, most = ((_read(f"{at}/{which}_link_speed"), _read(f"{at}/{which}_link_width")) for which in ("current", "max"))
    nominal, best = _nominal(*now), _nominal(*most)
    if nominal is None or best is None:
        return Finding("link", OK, "the system does not say what it is")
    text = f"{_link_text(*now)}, {nominal:.0f} GB/s"
    if nominal < best:
        remedy = "look at the slot, the riser and the firmware's settings"
        return Finding("link", NOTE, f"{text}, of {_link_text(*most)}, {best:.0f} GB/s", remedy)
    if measured / 1e9 < _GOOD_SHARE * nominal:
        remedy = "look for other traffic, a switch that GPUs share, memory of another NUMA node, or an IOMMU"
        return Finding("link", NOTE, f"{text}, of which {measured / 1e9:.0f} are reached", remedy)
    return Finding("link", OK, text)


def _nominal(speed: str, width: str) -> float | None:
    lane = _LANES.get(speed.split(" ")[0])
    return lane[1] * int(width) if lane and width.isdigit() and int(width) else None


def _link_text(speed: str, width: str) -> str:
    return f"PCIe {_LANES[speed.split(' ')[0]][0]} x{width}"


def _methods(methods: dict[int, str]) -> str:
    """Which way from which size of fragment on."""
    told: list[str] = []
    last = ""
    for size, method in sorted(methods.items()):
        if method != last:
            told.append(f"{method} from {bench.size_text(size)}" if told else method)
        last = method
    return ", ".join(told)


def _read(path: str) -> str:
    try:
        return (_SYS / path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
