"""The connector that vLLM makes, one in the scheduler and one in every worker."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, Literal

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole, SupportsHMA

import vllm
from kvortex import KVortexConfig, RankMover, RankPlanner, UnsupportedError
from kvortex.vllm import disk as disks
from kvortex.vllm import events, settings
from kvortex.vllm import layout as layouts
from kvortex.vllm.identity import EngineIdentity, check_hashes, identify
from kvortex.vllm.metadata import KVortexMetadata
from kvortex.vllm.scheduler import SchedulerSide
from kvortex.vllm.stats import HIT_SOURCE, KVortexPromMetrics, KVortexStats
from kvortex.vllm.worker import Drafter, WorkerSide

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

__all__ = ["KVortexConnector"]

log = logging.getLogger("kvortex.vllm")

OLDEST = (0, 15, 1)

WAITS_FOR_ABORTED = (0, 25, 0)
"""Tested from here on: vLLM keeps the blocks of an aborted load until it has ended, reserves room for loads, and tells
when it sleeps. Before, 0.15.1 was seen to do none of it."""

ASKS_SCHEDULER = (0, 32, 0)
"""Tested from here on: the scheduler's numbers are asked for in each step. Before, only if a rank has some."""

SAVES_LAST = (0, 32, 0)
"""Read from here on: ``wait_for_save`` comes after a drafter's pass. On 0.15.1 it comes after the model's."""


def _log_as_vllm_does() -> None:
    """Sends the records of KVortex where vLLM's go, unless somebody has decided otherwise."""
    own, host = logging.getLogger("kvortex"), logging.getLogger("vllm")
    if not own.hasHandlers() and own.level == logging.NOTSET:
        own.handlers, own.propagate = host.handlers, False
        own.setLevel(host.level)


def version_of(text: str) -> tuple[int, int, int]:
    """The first three numbers of a version."""
    numbers = ["".join(letter for letter in part if letter.isdigit()) or "0" for part in text.split(".")[:3]]
    major, minor, patch = [int(number) for number in (*numbers, "0", "0")[:3]]
    return major, minor, patch


class KVortexConnector(KVConnectorBase_V1):
    """Keeps the KV cache of one engine in host memory. See docs/vllm.md.

    Raises UnsupportedError for what KVortex does not do, ConfigError for a knob that cannot work, and what
    ``KVortexEngine.create`` raises when memory is not to be had: each with what to do.
    """

    _cache_hit_source = HIT_SOURCE

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig | None = None
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _log_as_vllm_does()
        self._version = version_of(vllm.__version__)
        _refuse(vllm_config, self._version)
        if kv_cache_config is None:
            raise UnsupportedError("vLLM passed no KV-cache configuration: use vLLM 0.15.1 or later")
        transfer = vllm_config.kv_transfer_config
        self._frees_aborted = self._version < WAITS_FOR_ABORTED
        self._ranks = vllm_config.parallel_config.tensor_parallel_size
        self._layout = layouts.describe(kv_cache_config)
        spare = None
        if self._frees_aborted or (not self._layout.is_whole and not layouts.FAILS_BY_REQUEST):
            spare = self._layout.spare_blocks(vllm_config.model_config.max_model_len)
        config, mode = settings.read(transfer.kv_connector_extra_config, spare)
        settings.check_block_size(config, self._layout.block_size_bytes)
        identity = identify(vllm_config, self._layout, vllm.__version__, config.namespace)
        self._namespace = identity.namespace
        self._engine_id = str(transfer.engine_id)
        self._rows: Literal["private", "open", "one"] = "open" if config.disk_paths else "private"
        if self._layout.replicated and self._ranks > 1:
            self._rows = "one"
        self._shares = 1 if self._rows == "one" else self._ranks
        share = max(1, config.cpu_pool_size_bytes // self._shares)
        self._config = KVortexConfig.of(config, cpu_pool_size_bytes=share)
        self._vllm = vllm_config
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = self._plan(mode, self._has_disk(identity))
            self._scheduler.prepare()

    def _has_disk(self, identity: EngineIdentity) -> bool:
        """Whether blocks go to a disk. Says once why not if one is configured."""
        why_not = disks.why_off(identity, self._vllm) if self._config.disk_paths else ""
        if why_not:
            log.warning("the disk tier stays off: %s", why_not)
        return why_not is None

    def _plan(self, mode: settings.LoadMode, has_disk: bool) -> SchedulerSide:
        planner = RankPlanner(
            self._engine_id,
            self._ranks,
            cpu_pool_size_bytes=self._config.cpu_pool_size_bytes,
            block_size_bytes=self._layout.block_size_bytes,
            namespace=self._namespace,
            rows=self._rows,
            eviction_watermark=self._config.eviction_watermark,
            eviction_ratio=self._config.eviction_ratio,
            disk=self._config if has_disk else None,
        )
        blocks = planner.get_stats()["capacity_blocks"]
        log.info(
            "KVortex keeps %d blocks of %d tokens, %d bytes %s of %d ranks (%s), loads: %s, namespace %s",
            blocks,
            self._layout.block_tokens,
            self._layout.block_size_bytes,
            "once for all" if self._rows == "one" else "on each",
            self._ranks,
            self._layout,
            mode.name,
            self._namespace.hex()[:16],
        )
        engines = self._vllm.parallel_config.data_parallel_size
        if engines > 1:
            total = engines * self._shares * self._config.cpu_pool_size_bytes
            log.info("%d engines (data parallelism) take %d bytes of host memory in all", engines, total)
        ahead = int(bool(_of(self._vllm.scheduler_config, "async_scheduling", False)))
        disk = disks.DiskSide(planner, self._config, ahead) if has_disk else None
        source = events.EventSource(planner, self._layout.block_tokens) if events.are_wanted(self._vllm) else None
        return SchedulerSide(planner, self._layout, mode, disk, shares=self._shares, events=source)

    # Scheduler.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens beyond ``num_computed_tokens`` that can be loaded, and whether beside the steps."""
        return self._of_scheduler.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """vLLM takes what it was offered, or not."""
        self._of_scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVortexMetadata:
        """The plans of this step."""
        return self._of_scheduler.build(scheduler_output)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Its blocks may be reused at once, for copies are ordered before whatever writes them.

        Only vLLM that does not wait for aborted loads is told to keep them until those have ended.
        """
        is_loading, report = self._of_scheduler.finished(request)
        return is_loading and self._frees_aborted, report

    def take_events(self) -> list[Any]:
        """KV events since the last call."""
        return self._of_scheduler.take_events()

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As ``request_finished``, whose blocks do not matter."""
        return self.request_finished(request, block_ids[0])

    def update_connector_output(self, connector_output: Any) -> None:
        """What the ranks report of a step, before vLLM looks at it."""
        received = connector_output.finished_recving or set()
        left = self._of_scheduler.reported(received)
        if left and self._frees_aborted:
            # This vLLM frees the blocks of a request that has ended when it is told that something was sent from them.
            connector_output.finished_recving = received - left
            connector_output.finished_sending = (connector_output.finished_sending or set()) | left

    def reset_cache(self) -> bool | None:
        """Forgets every block. vLLM calls this before it sleeps: then copies have ended before their memory goes."""
        side, model = self._of_scheduler, self._vllm.model_config
        log.info("%d blocks forgotten", side.reset())
        if _of(model, "enable_sleep_mode", False) or _of(model, "enable_cumem_allocator", False):
            side.drain()
        return True

    # Both.

    def get_kv_connector_stats(self) -> KVortexStats | None:
        """What was counted here since the last call."""
        if self._scheduler is not None:
            return self._scheduler.take_counts()
        counted = self._worker.counts.take() if self._worker is not None else None
        return None if counted is None or (counted.is_empty() and self._version >= ASKS_SCHEDULER) else counted

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVortexStats:
        """Numbers that came from another process."""
        return KVortexStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVortexPromMetrics:
        """The metrics of every engine."""
        return KVortexPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # Scheduler.

    @property
    def requires_kv_delivery(self) -> bool:
        """A block that is not kept is computed again; nobody waits for it."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Nothing depends on the hooks of single layers, which full CUDA graphs do not call."""
        return False

    # Worker.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The memory of the engine's blocks is there."""
        cache = layouts.paged_cache(self._layout, kv_caches, self._vllm)
        rank = _rank()
        place = next(iter(kv_caches.values())).device
        device = f"cuda:{place.index or 0}" if place.type == "cuda" else "none"
        start = time.perf_counter()
        mover = RankMover(
            KVortexConfig.of(self._config, device=device),
            self._engine_id,
            self._ranks,
            rank,
            block_size_bytes=self._layout.block_size_bytes,
            namespace=self._namespace,
            rows=self._rows,
            layout=disks.seen_layout(self._layout, kv_caches, cache, self._vllm) if self._config.disk_paths else None,
        )
        log.info(
            "KVortex rank %d of %d: %s, %d bytes of %s memory%s in %.2f s, copies to %s by %s, namespace %s",
            rank,
            self._ranks,
            cache,
            self._config.cpu_pool_size_bytes,
            "page-locked" if mover.pinned else "plain",
            {"one": " that all ranks share", "open": " that the scheduler shares"}.get(self._rows, ""),
            time.perf_counter() - start,
            place,
            self._config.copy_method if device != "none" else "the CPU",
            self._namespace.hex()[:16],
        )
        hooks = None
        if device != "none" and self._vllm.speculative_config is None:
            # A drafter's layers run with their hooks in some steps and inside a graph in others.
            hooks = layouts.layer_hooks(self._layout, kv_caches, cache)
        self._worker = WorkerSide(mover, cache, hooks, _drafter(self._vllm, self._version))

    def handle_preemptions(self, arg: Any) -> None:
        """Before the engine writes the blocks of the step. Older versions pass names of requests, and seldom."""
        if isinstance(arg, KVortexMetadata):
            worker = self._of_worker
            worker.begin(arg)
            worker.fence()

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """The plans of the step that begins."""
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None:
            self._worker.begin(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Starts the loads of the step."""
        self._of_worker.load(forward_context)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Puts the layer's part of the step's loads, where they are not awaited as a whole, before its computation."""
        self._of_worker.computes(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Blocks are stored whole, after the pass."""

    def wait_for_save(self) -> None:
        """The pass is enqueued: starts to store the blocks that it fills. Waits for nothing."""
        self._of_worker.store()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Which loads beside the steps have ended."""
        worker = self._of_worker
        worker.end()
        return None, worker.finished() or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """As ``get_finished``. Where blocks do not tell which tokens to compute again, failed requests are named."""
        results = super().get_transfer_results(finished_req_ids)
        if not self._layout.is_whole:
            results.failed_recving = {load.request_id for load in self._of_worker.take_failed()}
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that must be computed after all."""
        if self._worker is None or not self._layout.is_whole:
            return set()
        return {block for load in self._worker.take_failed() for block in load.blocks}

    def shutdown(self) -> None:
        """Waits for what is under way, for a bounded time."""
        if self._worker is not None:
            self._worker.shutdown()
        if self._scheduler is not None:
            self._scheduler.shutdown()

    @property
    def _of_scheduler(self) -> SchedulerSide:
        if self._scheduler is None:
            raise RuntimeError("this is a worker's connector: vLLM asked it what the scheduler's knows")
        return self._scheduler

    @property
    def _of_worker(self) -> WorkerSide:
        if self._worker is None:
            raise RuntimeError("vLLM runs a step before register_kv_caches, or asks the scheduler for copies")
        return self._worker


if layouts.FAILS_BY_REQUEST:
    # Such a vLLM gives models of several kinds of attention several groups; an older one must leave them in one.
    SupportsHMA.register(KVortexConnector)


def _rank() -> int:
    """Which of the engine's ranks this process is."""
    from vllm.distributed import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())


def _drafter(vllm_config: Any, version: tuple[int, int, int]) -> Drafter:
    """When one computes that may have a part of each block."""
    if vllm_config.speculative_config is None:
        return Drafter.NONE
    return Drafter.BEFORE_SAVING if version >= SAVES_LAST else Drafter.AFTER_HOOKS


def _refuse(vllm_config: Any, version: tuple[int, int, int]) -> None:
    """Raises UnsupportedError for a configuration that KVortex does not serve, and names it."""
    parallel, transfer = vllm_config.parallel_config, vllm_config.kv_transfer_config
    check_hashes(vllm_config.cache_config)
    wrong = {
        f"vLLM {vllm.__version__}": (version < OLDEST, "use 0.15.1 or later"),
        f"kv_role {transfer.kv_role}": (transfer.kv_role != "kv_both", "set kv_role to kv_both"),
        "pipeline parallelism": (parallel.pipeline_parallel_size > 1, "use tensor parallelism only"),
        "prefill context parallelism": (_of(parallel, "prefill_context_parallel_size", 1) > 1, "set it to 1"),
        "decode context parallelism": (_of(parallel, "decode_context_parallel_size", 1) > 1, "set it to 1"),
        "elastic expert parallelism": (_of(parallel, "enable_elastic_ep", False), "leave --enable-elastic-ep out"),
        "sleep mode on this vLLM, which unmaps the cache without a word": (
            version < WAITS_FOR_ABORTED and _of(vllm_config.model_config, "enable_sleep_mode", False),
            "leave --enable-sleep-mode out, or use a later vLLM",
        ),
        "tensor parallelism over several hosts": (_of(parallel, "nnodes", 1) > 1, "keep one engine on one host"),
    }
    for what, (is_so, remedy) in wrong.items():
        if is_so:
            raise UnsupportedError(f"KVortex does not serve {what}: {remedy}")


def _of(config: Any, name: str, default: Any) -> Any:
    return getattr(config, name, default)
