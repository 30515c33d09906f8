"""What is counted, how it travels to vLLM's metrics, and what it is called there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from prometheus_client import Counter, Gauge
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

try:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
except ImportError:
    # Before 0.32 vLLM does not tell where tokens came from.
    CacheHitSource = None

if TYPE_CHECKING:
    from kvortex import RankPlanner

__all__ = ["HIT_SOURCE", "METRICS", "KVortexPromMetrics", "KVortexStats", "Ledger", "key"]

HOST, DISK, LOAD, STORE = "host", "disk", "load", "store"

HIT_SOURCE = None if CacheHitSource is None else CacheHitSource.HOST
"""What vLLM's own counter of cached tokens calls host memory."""


class Metric(NamedTuple):
    """One metric. Prometheus appends ``_total`` to the names of counters."""

    name: str
    kind: type
    labels: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]
    """The values of its labels that are there from the start, with 0."""
    text: str


BOTH_WAYS = ((HOST, LOAD), (HOST, STORE), (DISK, LOAD), (DISK, STORE))
TIERS = ((HOST,), (DISK,))

METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "kvortex_transferred_bytes", Counter, ("tier", "direction"), BOTH_WAYS, "Bytes copied well, of all ranks."
        ),
        Metric(
            "kvortex_transferred_blocks",
            Counter,
            ("tier", "direction"),
            BOTH_WAYS,
            "Blocks that every rank has loaded or stored: between GPU and host memory, or host memory and disk.",
        ),
        Metric("kvortex_transferred_tokens", Counter, ("tier", "direction"), BOTH_WAYS, "Tokens of those blocks."),
        Metric(
            "kvortex_failed_transfers",
            Counter,
            ("tier", "direction"),
            BOTH_WAYS[:2],
            "Loads and stores that failed whole.",
        ),
        Metric(
            "kvortex_refused_blocks",
            Counter,
            ("tier",),
            TIERS,
            "Blocks that were not stored for want of room, or since the disk was too slow.",
        ),
        Metric("kvortex_evicted_blocks", Counter, ("tier",), TIERS, "Blocks forgotten to make room."),
        Metric("kvortex_expired_blocks", Counter, ("tier",), ((HOST,),), "Blocks forgotten since their time was over."),
        Metric("kvortex_lookups", Counter, (), ((),), "Requests whose blocks were looked up, each once."),
        Metric(
            "kvortex_lookup_tokens",
            Counter,
            (),
            ((),),
            "Tokens looked up: in whole blocks, and not in vLLM's own cache.",
        ),
        Metric("kvortex_hit_tokens", Counter, ("tier",), TIERS, "Those of them that were there, by where from."),
        Metric(
            "kvortex_promotions",
            Counter,
            ("outcome",),
            (("started",), ("late",), ("declined",)),
            "Requests with blocks on the disk only: those brought up, those of them that came too late, and those not "
            "brought up since computing is faster.",
        ),
        Metric(
            "kvortex_promotion_bytes_per_second",
            Gauge,
            (),
            ((),),
            "How fast blocks came up from the disk lately; 0 if unknown.",
        ),
        Metric(
            "kvortex_prefill_tokens_per_second",
            Gauge,
            (),
            ((),),
            "How fast the engine computes prompts, with which the disk is compared; 0 if unknown.",
        ),
        Metric(
            "kvortex_disk_faults",
            Counter,
            ("kind",),
            (("error",), ("corrupt",), ("late",)),
            "Calls of the disk that failed, blocks that were not what was stored, reads after their deadline.",
        ),
        Metric(
            "kvortex_ignored_params",
            Counter,
            ("reason",),
            (("value",), ("key",)),
            "Parameters of requests that could not be used.",
        ),
        Metric("kvortex_capacity_blocks", Gauge, ("tier",), TIERS, "Blocks that fit."),
        Metric("kvortex_used_blocks", Gauge, ("tier",), TIERS, "Blocks that have room, those being stored too."),
        Metric("kvortex_capacity_bytes", Gauge, ("tier",), TIERS, "Bytes for blocks, of all ranks."),
        Metric("kvortex_used_bytes", Gauge, ("tier",), TIERS, "Bytes of blocks that have room, of all ranks."),
    )
}


def key(name: str, *labels: str) -> str:
    """One series of a metric, as it is written in ``KVortexStats``."""
    return "|".join((name, *labels))


def _is_gauge(series: str) -> bool:
    metric = METRICS.get(series.partition("|")[0])
    return metric is not None and metric.kind is Gauge


class KVortexStats(KVConnectorStats):
    """What was counted since the last time, by series, and what gauges show now: plain numbers, since it travels."""

    data: dict[str, Any]

    def reset(self) -> None:
        """Begins anew."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVortexStats:
        """Adds what another rank, or a later step, counted."""
        for series, value in other.data.items():
            self.data[series] = value if _is_gauge(series) else self.data.get(series, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log line: what is not 0."""
        return {series.replace("kvortex_", "").replace("|", " "): value for series, value in self.data.items() if value}

    def is_empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not self.data

    def add(self, series: str, value: int) -> None:
        """Counts."""
        self.data[series] = self.data.get(series, 0) + value


FROM_PLANNER = {
    "stored_blocks": key("kvortex_transferred_blocks", HOST, STORE),
    "failed_stores": key("kvortex_failed_transfers", HOST, STORE),
    "refused_blocks": key("kvortex_refused_blocks", HOST),
    "evicted_blocks": key("kvortex_evicted_blocks", HOST),
    "expired_blocks": key("kvortex_expired_blocks", HOST),
}


FROM_DISK = {
    "promoted_blocks": key("kvortex_transferred_blocks", DISK, LOAD),
    "promoted_bytes": key("kvortex_transferred_bytes", DISK, LOAD),
    "written_blocks": key("kvortex_transferred_blocks", DISK, STORE),
    "bytes_written": key("kvortex_transferred_bytes", DISK, STORE),
    "dropped": key("kvortex_refused_blocks", DISK),
    "unoffered_blocks": key("kvortex_refused_blocks", DISK),
    "evictions": key("kvortex_evicted_blocks", DISK),
    "errors": key("kvortex_disk_faults", "error"),
    "corrupt": key("kvortex_disk_faults", "corrupt"),
    "late": key("kvortex_disk_faults", "late"),
    "started_promotions": key("kvortex_promotions", "started"),
    "late_promotions": key("kvortex_promotions", "late"),
    "declined_promotions": key("kvortex_promotions", "declined"),
}

TOKENS_OF_DISK = {
    "promoted_blocks": key("kvortex_transferred_tokens", DISK, LOAD),
    "written_blocks": key("kvortex_transferred_tokens", DISK, STORE),
}

DISK_NOW = {
    "capacity_blocks": key("kvortex_capacity_blocks", DISK),
    "blocks": key("kvortex_used_blocks", DISK),
    "max_bytes": key("kvortex_capacity_bytes", DISK),
    "bytes": key("kvortex_used_bytes", DISK),
    "promotion_bytes_per_second": key("kvortex_promotion_bytes_per_second"),
    "prefill_tokens_per_second": key("kvortex_prefill_tokens_per_second"),
}


class Ledger:
    """Counts on the scheduler's side, and hands out what is new."""

    def __init__(self, planner: RankPlanner, block_tokens: int, engine_block_bytes: int) -> None:
        """``engine_block_bytes``: what a block takes on all ranks together."""
        self._planner = planner
        self._block_tokens = block_tokens
        self._block_bytes = engine_block_bytes
        self._seen: dict[str, int] = {}
        self._seen_disk: dict[str, Any] = {}
        self._new = KVortexStats()

    def looked_up(self, asked: int, found: int, promoted: int = 0) -> None:
        """A request was looked up for the first time: blocks asked for, found, and brought up from the disk for it."""
        self._new.add("kvortex_lookups", 1)
        self._new.add("kvortex_lookup_tokens", asked * self._block_tokens)
        for tier, blocks in ((HOST, found - promoted), (DISK, promoted)):
            if blocks > 0:
                self._new.add(key("kvortex_hit_tokens", tier), blocks * self._block_tokens)

    def loaded(self, blocks: int, ok: bool) -> None:
        """A load has ended on all ranks."""
        if not ok:
            self._new.add(key("kvortex_failed_transfers", HOST, LOAD), 1)
            return
        self._new.add(key("kvortex_transferred_blocks", HOST, LOAD), blocks)
        self._new.add(key("kvortex_transferred_tokens", HOST, LOAD), blocks * self._block_tokens)

    def ignored(self, values: int, keys: int) -> None:
        """Parameters of a request could not be used."""
        for reason, count in (("value", values), ("key", keys)):
            if count:
                self._new.add(key("kvortex_ignored_params", reason), count)

    def take(self, disk: dict[str, Any] | None = None) -> KVortexStats | None:
        """What is new since the last call, with what the disk has counted so far; None if nothing is."""
        if disk is not None:
            self._take_in_disk(disk)
        counts = self._planner.counts()
        if counts == self._seen:
            if self._new.is_empty():
                return None
        else:
            self._take_in(counts)
        new, self._new = self._new, KVortexStats()
        return new

    def _take_in_disk(self, counts: dict[str, Any]) -> None:
        new = self._new
        for name, series in FROM_DISK.items():
            more = counts[name] - self._seen_disk.get(name, 0)
            if more > 0:
                new.add(series, more)
                if name in TOKENS_OF_DISK:
                    new.add(TOKENS_OF_DISK[name], more * self._block_tokens)
        for name, series in DISK_NOW.items():
            if counts[name] != self._seen_disk.get(name):
                new.data[series] = int(counts[name] or 0)
        self._seen_disk = counts

    def _take_in(self, counts: dict[str, int]) -> None:
        seen, self._seen, new = self._seen, counts, self._new
        for name, series in FROM_PLANNER.items():
            if more := counts[name] - seen.get(name, 0):
                new.add(series, more)
        if more := counts["stored_blocks"] - seen.get("stored_blocks", 0):
            new.add(key("kvortex_transferred_tokens", HOST, STORE), more * self._block_tokens)
        for name in ("capacity", "used"):
            blocks = counts[f"{name}_blocks"]
            new.data[key(f"kvortex_{name}_blocks", HOST)] = blocks
            new.data[key(f"kvortex_{name}_bytes", HOST)] = blocks * self._block_bytes


class CopyCounts:
    """Counts on a rank: bytes of its copies that ended well."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._open: dict[int, tuple[str, int]] = {}
        self._new = KVortexStats()

    def started(self, direction: str, ticket: int, blocks: int) -> None:
        """A copy is under way."""
        self._open[ticket] = (direction, blocks)

    def ended(self, ticket: int, ok: bool) -> None:
        """It is not any more."""
        direction, blocks = self._open.pop(ticket, (LOAD, 0))
        if ok and blocks:
            self._new.add(key("kvortex_transferred_bytes", HOST, direction), blocks * self._block_bytes)

    def take(self) -> KVortexStats:
        """What is new since the last call."""
        new, self._new = self._new, KVortexStats()
        return new


class KVortexPromMetrics(KVConnectorPromMetrics):
    """The metrics as Prometheus sees them, with vLLM's labels before ours."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._labels_of_engine = per_engine_labelvalues
        self._made = {metric.name: self._make(metric, metric_types, labelnames) for metric in METRICS.values()}
        self._series: dict[tuple[int, str], Any] = {}
        for engine in per_engine_labelvalues:
            for metric in METRICS.values():
                for values in metric.values:
                    self._of(engine, key(metric.name, *values))

    @staticmethod
    def _make(metric: Metric, metric_types: Any, labelnames: list[str]) -> Any:
        more = {"multiprocess_mode": "mostrecent"} if metric.kind is Gauge else {}
        return metric_types[metric.kind](
            name=metric.name, documentation=metric.text, labelnames=[*labelnames, *metric.labels], **more
        )

    def _of(self, engine: int, series: str) -> Any:
        found = self._series.get((engine, series))
        if found is None:
            name, *labels = series.split("|")
            found = self._made[name].labels(*self._labels_of_engine[engine], *labels)
            self._series[engine, series] = found
        return found

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Takes in the data of ``KVortexStats``."""
        for series, value in transfer_stats_data.items():
            metric = self._of(engine_idx, series)
            if _is_gauge(series):
                metric.set(value)
            elif value:
                metric.inc(value)
