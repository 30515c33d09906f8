"""The configuration of an engine: every knob, its unit and its default.

A configuration comes from keywords, a mapping, ``KVORTEX_*`` variables or TOML, and says the same in each. This module
is imported with the package, so it imports nothing that the interpreter has not loaded anyway: not even ``typing``.
"""

from __future__ import annotations

import os

from kvortex._core import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import NoReturn

ENV_PREFIX = "KVORTEX_"

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS[f"{_letter}b"] = 1000**_power
    _UNITS[f"{_letter}ib"] = 1024**_power

_METHODS = ("auto", "dma", "kernel", "staged")
_ADMISSIONS = ("all", "second_touch")
_SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def _bad(key: str, value: object, remedy: str) -> NoReturn:
    raise ConfigError(f"{key} = {value!r}: {remedy}")


def parse_size(key: str, value: object) -> int:
    """Bytes from an int or from text such as "16GiB" (1024-based), "1.5GB" (1000-based) or "4096"."""
    remedy = 'give a positive number of bytes, or text such as "16GiB", "512MiB" or "1.5GB"'
    size = _size_of_text(value) if isinstance(value, str) else value
    if isinstance(size, bool) or not isinstance(size, int) or not 0 < size < 1 << 63:
        _bad(key, value, remedy)
    return size


def _size_of_text(text: str) -> int | None:
    number = text.strip().rstrip("iIbBkKmMgGtT").rstrip()
    scale = _UNITS.get(text.strip()[len(number) :].strip().lower())
    whole, _, fraction = number.partition(".")
    digits = whole + fraction
    if scale is None or not (digits.isascii() and digits.isdigit()):
        return None
    size: int = int(digits) * scale // 10 ** len(fraction)
    return size


def _parse_count(key: str, value: object, low: int, high: int) -> int:
    remedy = f"give a whole number from {low} to {high}"
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        _bad(key, value, remedy)
    return value


def _parse_streams(key: str, value: object) -> int:
    return _parse_count(key, value, 1, 256)


def _parse_node(key: str, value: object) -> int:
    return _parse_count(key, value, 0, 1023)


def _parse_number(key: str, value: object, remedy: str) -> float:
    if not isinstance(value, (int, float, str)) or isinstance(value, bool):
        _bad(key, value, remedy)
    try:
        return float(value)
    except ValueError:
        _bad(key, value, remedy)


def _parse_watermark(key: str, value: object) -> float:
    remedy = "give a share of the slots above 0 and at most 1, such as 0.8"
    share = _parse_number(key, value, remedy)
    return share if 0.0 < share <= 1.0 else _bad(key, value, remedy)


def _parse_ratio(key: str, value: object) -> float:
    remedy = "give a share of the watermark from 0 to 1, such as 0.2"
    share = _parse_number(key, value, remedy)
    return share if 0.0 <= share <= 1.0 else _bad(key, value, remedy)


def _parse_switch(key: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    switch = _SWITCH.get(str(value).strip().lower())
    return _bad(key, value, "give true or false") if switch is None else switch


def _parse_device(key: str, value: object) -> str:
    text = str(value).strip().lower()
    kind, _, number = text.partition(":")
    if text in ("auto", "none") or (kind == "cuda" and ((number.isascii() and number.isdigit()) or text == "cuda")):
        return text
    return _bad(key, value, 'give "auto", "none", "cuda" or "cuda:N" with the number of a GPU')


def _parse_method(key: str, value: object) -> str:
    method = str(value).strip().lower()
    return method if method in _METHODS else _bad(key, value, f"give one of {', '.join(_METHODS)}")


def _parse_gpu_streams(key: str, value: object) -> int:
    return _parse_count(key, value, 1, 4)


def _parse_staging(key: str, value: object) -> int:
    size = parse_size(key, value)
    return size if 1 << 20 <= size <= 1 << 30 else _bad(key, value, "give 1MiB to 1GiB; 32MiB is usual")


def _parse_paths(key: str, value: object) -> tuple[str, ...]:
    """Folders from a list, or from text with a colon between them; kept as absolute paths."""
    remedy = "give the path of a folder, a list of paths, or paths with a colon between them"
    paths = value.split(":") if isinstance(value, str) else [value] if isinstance(value, os.PathLike) else value
    if not isinstance(paths, (list, tuple)) or not all(isinstance(path, (str, os.PathLike)) for path in paths):
        _bad(key, value, remedy)
    found = tuple(os.path.abspath(os.path.expanduser(os.fsdecode(path))) for path in paths if path)
    if len(set(found)) != len(found) or any("\0" in path for path in found):
        _bad(key, value, remedy + ", each once")
    return found


def _parse_admission(key: str, value: object) -> str:
    rule = str(value).strip().lower()
    return rule if rule in _ADMISSIONS else _bad(key, value, f"give one of {', '.join(_ADMISSIONS)}")


def _parse_deadline(key: str, value: object) -> int:
    return _parse_count(key, value, 1, 600_000)


def _parse_text(key: str, value: object) -> str:
    return value if isinstance(value, str) else _bad(key, value, "give text")


def physical_memory() -> int:
    """RAM of this machine in bytes, whatever this process may use of it."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _read_limit(path: str) -> int | None:
    try:
        with open(path, encoding="ascii") as file:
            text = file.read().strip()
    except OSError:
        return None
    # Version 1 says "no limit" as a number that no machine has.
    return int(text) if text.isdigit() and int(text) < 1 << 60 else None


def _cgroup_folders(cgroup: str, root: str) -> list[tuple[str, str]]:
    """(folder, file) of every group this process is in, its own first, version 2 and version 1."""
    folders = []
    for line in cgroup.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = f"{root}/memory", "memory.limit_in_bytes"
        else:
            continue
        parts = [part for part in path.split("/") if part and part != ".."]
        folders += [("/".join([base, *parts[:depth]]), name) for depth in range(len(parts), -1, -1)]
    return folders


def cgroup_limit(proc: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> int | None:
    """The smallest memory limit, in bytes, of the control groups of this process; None when there is none."""
    try:
        with open(proc, encoding="utf-8", errors="surrogateescape") as file:
            folders = _cgroup_folders(file.read(), root)
    except OSError:
        return None
    limits = [_read_limit(f"{folder}/{name}") for folder, name in folders]
    return min((limit for limit in limits if limit is not None), default=None)


def default_pool_size() -> int:
    """Bytes of the host pool when none are configured: the smaller of 25 % of RAM and half the cgroup limit."""
    quarter = physical_memory() // 4
    limit = cgroup_limit()
    return quarter if limit is None else min(quarter, limit // 2)


def _default_streams() -> int:
    return min(4, len(os.sched_getaffinity(0)))


class Knob:
    """One setting: how a value is read, what it is when unset, and what a reader of the guide is told."""

    __slots__ = ("default", "default_text", "meaning", "parse", "unit")

    def __init__(
        self,
        parse: Callable[[str, object], object],
        default: Callable[[], object],
        default_text: str,
        unit: str,
        meaning: str,
    ) -> None:
        self.parse, self.default = parse, default
        self.default_text, self.unit, self.meaning = default_text, unit, meaning


KNOBS = {
    "cpu_pool_size_bytes": Knob(
        parse_size,
        default_pool_size,
        "25 % of RAM, or half the cgroup limit if that is less",
        "bytes",
        "Host memory that keeps blocks, taken from the system at once.",
    ),
    "block_size_bytes": Knob(
        parse_size,
        lambda: None,
        "learned from the first save or `bind`",
        "bytes",
        "Payload of one block, all layers together.",
    ),
    "num_transfer_streams": Knob(
        _parse_streams,
        _default_streams,
        "4, or the number of usable CPUs if that is less",
        "threads",
        "Copies that run at once.",
    ),
    "eviction_watermark": Knob(
        _parse_watermark,
        lambda: 0.8,
        "0.8",
        "share of slots",
        "Above this share in use, an allocation evicts.",
    ),
    "eviction_ratio": Knob(
        _parse_ratio,
        lambda: 0.2,
        "0.2",
        "share of the watermark",
        "What eviction gives back: it stops at watermark * (1 - ratio).",
    ),
    "huge_pages": Knob(
        _parse_switch,
        lambda: True,
        "true",
        "switch",
        "Ask the kernel for transparent huge pages.",
    ),
    "numa_node": Knob(
        _parse_node,
        lambda: None,
        "wherever the kernel puts it",
        "node number",
        "NUMA node that the pool's memory is bound to.",
    ),
    "device": Knob(
        _parse_device,
        lambda: "auto",
        "`auto`: GPU 0 if there is one",
        "`auto`, `none`, `cuda` or `cuda:N`",
        "GPU whose memory may hold the caller's blocks; the pool is then page-locked for it.",
    ),
    "copy_method": Knob(
        _parse_method,
        lambda: "auto",
        "`auto`: measured once, chosen per transfer",
        "`auto`, `dma`, `kernel` or `staged`",
        "How bytes go between a GPU and the pool.",
    ),
    "gpu_streams": Knob(
        _parse_gpu_streams,
        lambda: 4,
        "4",
        "streams",
        "CUDA streams for copies: 2 part saves from loads, 4 their staging too; 3 share one for it.",
    ),
    "staging_bytes": Knob(
        _parse_staging,
        lambda: 32 << 20,
        "32 MiB",
        "bytes",
        "One of up to four buffers in the GPU's memory, taken when staged copies first need them; without that memory "
        "copies go another way.",
    ),
    "disk_paths": Knob(
        _parse_paths,
        tuple,
        "none: no disk tier",
        "paths",
        "Folders that keep blocks beyond host memory and this process, one for each device; a namespace, this one or a "
        "bound one, must say which model they belong to.",
    ),
    "disk_size_bytes": Knob(
        parse_size,
        lambda: 64 << 30,
        "64 GiB",
        "bytes",
        "Room that all `disk_paths` may take together, as the file system counts it.",
    ),
    "disk_admission": Knob(
        _parse_admission,
        lambda: "all",
        "`all`",
        "`all` or `second_touch`",
        "Which blocks are written: every one, or those that are saved again; the second wears a disk less.",
    ),
    "disk_queue_bytes": Knob(
        parse_size,
        lambda: 256 << 20,
        "256 MiB",
        "bytes",
        "Blocks that may wait to be written; beyond it they are dropped and counted.",
    ),
    "disk_read_deadline_ms": Knob(
        _parse_deadline,
        lambda: 250,
        "250",
        "milliseconds",
        "How long a lookup or load may wait for blocks from the disk; what is not there by then is a miss.",
    ),
    "namespace": Knob(
        _parse_text,
        lambda: "",
        "empty",
        "text",
        "Mixed into the identity of every block, such as the revision of the weights.",
    ),
}


def _check_names(names: Mapping[str, object], prefix: str = "") -> None:
    for name in names:
        if name not in KNOBS:
            import difflib

            near = difflib.get_close_matches(name, KNOBS, n=1, cutoff=0.0)[0]
            shown, near = (prefix + name.upper(), prefix + near.upper()) if prefix else (name, near)
            raise ConfigError(f"{shown} = {names[name]!r}: no such setting; the nearest known one is {near}")


class KVortexConfig:
    """Settings of one engine. Immutable; every default is filled in, so what it shows is what the engine uses.

    Each keyword is a name of ``KNOBS``; None stands for the default. Raises ConfigError naming key, value and remedy.
    """

    __slots__ = tuple(KNOBS)

    cpu_pool_size_bytes: int
    block_size_bytes: int | None
    num_transfer_streams: int
    eviction_watermark: float
    eviction_ratio: float
    huge_pages: bool
    numa_node: int | None
    device: str
    copy_method: str
    gpu_streams: int
    staging_bytes: int
    disk_paths: tuple[str, ...]
    disk_size_bytes: int
    disk_admission: str
    disk_queue_bytes: int
    disk_read_deadline_ms: int
    namespace: str

    def __init__(self, **knobs: object) -> None:
        _check_names(knobs)
        for name, knob in KNOBS.items():
            value = knobs.get(name)
            object.__setattr__(self, name, knob.default() if value is None else knob.parse(name, value))

    @classmethod
    def from_dict(cls, mapping: Mapping[str, object]) -> KVortexConfig:
        """From a mapping of knob names to values, such as the extra configuration of a serving engine."""
        return cls(**dict(mapping))

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> KVortexConfig:
        """From ``KVORTEX_<KNOB>`` variables; an empty variable counts as unset."""
        return cls(**_env_knobs(os.environ if environ is None else environ))

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> KVortexConfig:
        """From the ``[kvortex]`` table of a TOML file, or from its top level if it has no such table."""
        return cls(**_toml_knobs(os.fspath(path)))

    @classmethod
    def of(cls, value: KVortexConfig | Mapping[str, object] | None = None, **overrides: object) -> KVortexConfig:
        """From whatever a caller has: a configuration, a mapping, or None for the environment; overrides win."""
        if value is None:
            return cls(**{**_env_knobs(os.environ), **overrides})
        if isinstance(value, KVortexConfig):
            return cls(**{**value.to_dict(), **overrides}) if overrides else value
        try:
            given = dict(value)
        except (TypeError, ValueError):
            _bad("config", value, "give a KVortexConfig, a mapping, or None for the environment")
        return cls(**{**given, **overrides})

    def to_dict(self) -> dict[str, object]:
        """Every knob and its value; ``from_dict`` gives an equal configuration back."""
        return {name: getattr(self, name) for name in KNOBS}

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(
            f"a KVortexConfig does not change; make another one with KVortexConfig.of(config, {name}=...)"
        )

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a KVortexConfig does not change; {name} cannot be removed")

    def __eq__(self, other: object) -> bool:
        return self.to_dict() == other.to_dict() if isinstance(other, KVortexConfig) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self.to_dict().values()))

    def __repr__(self) -> str:
        return f"KVortexConfig({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    def __reduce__(self) -> tuple[object, ...]:
        return KVortexConfig.from_dict, (self.to_dict(),)


def _env_knobs(environ: Mapping[str, str]) -> dict[str, object]:
    found = {name: text for name, text in environ.items() if name.startswith(ENV_PREFIX) and text.strip()}
    knobs: dict[str, object] = {name.removeprefix(ENV_PREFIX).lower(): text for name, text in found.items()}
    _check_names(knobs, ENV_PREFIX)
    return knobs


def _toml_knobs(path: str) -> dict[str, object]:
    import tomllib

    try:
        with open(path, "rb") as file:
            document = tomllib.load(file)
    except OSError as error:
        raise ConfigError(
            f"config file {path!r} cannot be read: {error.strerror}; give the path of a TOML file"
        ) from error
    except ValueError as error:
        raise ConfigError(f"config file {path!r} is not TOML: {error}") from error
    table = document.get("kvortex", document)
    return table if isinstance(table, dict) else _bad("kvortex", table, "make it a table: [kvortex]")
