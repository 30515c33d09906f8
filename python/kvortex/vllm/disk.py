"""The disk under vLLM: whether blocks may go to it, whose they are there, and what requests wait for from it."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vllm.v1.core import kv_cache_utils

from kvortex.vllm import layout as layouts
from kvortex.vllm.promotion import Promotions

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

    from kvortex import KVortexConfig, PagedCache, RankPlanner
    from kvortex.vllm.identity import EngineIdentity
    from kvortex.vllm.layout import CacheLayout

__all__ = ["DiskSide", "seen_layout", "why_off"]

log = logging.getLogger("kvortex.vllm")

COUNTED_EACH_S = 1.0

ROOT_IS_RANDOM = (
    "vLLM's block hashes begin at random in each process; set PYTHONHASHSEED to the same number for every start"
)
WEIGHTS_UNKNOWN = (
    "nobody can tell whether the next start has the same weights: they are dummies or streamed, or a function "
    "overrides the model's configuration; serve the model from files"
)
SCALES_CALCULATED = (
    "the next start calculates other scales of the KV cache from its first request; leave --calculate-kv-scales out"
)
FORGOTTEN = (
    "everything was forgotten, as before sleep or new weights, and nobody knows which weights the engine has now; "
    "what was on the disk is gone, and the next start uses it again"
)


def why_off(identity: EngineIdentity, vllm_config: VllmConfig) -> str | None:
    """Why blocks may not go to the disk that is configured, and what to do; None if they may."""
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        return SCALES_CALCULATED
    if not identity.survives_restart:
        return WEIGHTS_UNKNOWN
    if not os.environ.get("PYTHONHASHSEED") and getattr(kv_cache_utils, "DEFAULT_NONE_HASH_SEED", None) is None:
        return ROOT_IS_RANDOM
    if vllm_config.parallel_config.data_parallel_size > 1:
        return "the engines of data parallelism would share its folders; start each by itself, with folders of its own"
    return None


def seen_layout(
    layout: CacheLayout, kv_caches: Mapping[str, torch.Tensor], cache: PagedCache, vllm_config: VllmConfig
) -> bytes:
    """A digest of all that decides which bytes a block of these tensors is, but not of how many blocks there are.

    For each layer the dtype, the shape of a block with the attention kernel's own blocks in it, and the order in memory
    of its dimensions; and how the layers follow each other.
    """
    views = {
        name: layouts._block_view(name, kv_caches[name], spec, layout.num_blocks, vllm_config)
        for name, spec in layout.layers.items()
        if name in kv_caches
    }
    order = sorted(views, key=lambda name: views[name].data_ptr())
    whole = len(cache.parts()) == 1
    start = views[order[0]].data_ptr() if order else 0
    seen = ["whole blocks" if whole else "layer after layer"]
    for name in order if whole else kv_caches:
        view = views.get(name)
        if view is None:
            seen.append(f"{name}: shared")
            continue
        place = view.data_ptr() - start if whole else "alone"
        seen.append(f"{name}: {view.dtype} {tuple(view.shape[1:])} in order {_order(view.stride())} at {place}")
    return hashlib.sha256("\n".join(seen).encode()).digest()


def _order(strides: tuple[int, ...]) -> list[int]:
    """The dimensions of a block in the order of their addresses."""
    return sorted(range(1, len(strides)), key=lambda dim: -strides[dim])


class DiskSide:
    """What the scheduler's side has to do with a disk."""

    def __init__(self, planner: RankPlanner, config: KVortexConfig, ahead: int) -> None:
        self._planner = planner
        self._config = config
        self._is_on = True
        self._counted = 0.0
        deadline = config.disk_read_deadline_ms / 1000
        self.promotions = Promotions(planner, deadline, ahead)
        self.hit_tokens = 0
        """Tokens that the engine was given and that came from the disk for it."""

    @property
    def is_on(self) -> bool:
        """Whether blocks go there and come from there."""
        return self._is_on

    def say(self) -> None:
        """Says once, when all ranks are there, what the disk is. Why it could not be opened has been said."""
        disk = self._planner.get_stats()["disk"]
        if disk is None:
            self._is_on = False
            return
        log.info(
            "KVortex keeps blocks in %s as well, up to %d bytes, %s; a request waits for them up to %d ms; blocks of "
            "another model, layout or vLLM are not found",
            ", ".join(self._config.disk_paths),
            disk["max_bytes"],
            "still looking for what is there"
            if disk["scanning"]
            else f"{disk['recovered_blocks']} of them found there",
            self._config.disk_read_deadline_ms,
        )

    def waits(self, name: str, reach: Callable[[], tuple[bytes, int]]) -> bool:
        """Whether a request waits for blocks; ``reach`` as for ``Promotions.waits``."""
        return self._is_on and self.promotions.waits(name, reach)

    def took(self, name: str, blocks: int, tokens: int) -> int:
        """The request was given its first ``blocks`` blocks, which give it ``tokens`` tokens; those that came from the
        disk for it.
        """
        tokens = self.promotions.has_taken(name, blocks) * tokens // blocks
        self.hit_tokens += tokens
        self.promotions.end(name)
        return tokens

    def counts(self) -> dict[str, Any] | None:
        """What the disk and its promotions have counted, at most once a second."""
        now = time.monotonic()
        if now < self._counted + COUNTED_EACH_S:
            return None
        self._counted = now
        disk: dict[str, Any] | None = self._planner.get_stats()["disk"]
        if disk is None:
            return None
        promotions = self.promotions.stats()
        counted = {f"{name}_promotions": promotions[name] for name in ("started", "late", "declined")}
        return {**disk, **counted, "prefill_tokens_per_second": promotions["prefill_tokens_per_second"]}

    def step(self, output: Any) -> None:
        """The engine scheduled a step: what runs waits no more."""
        for new in output.scheduled_new_reqs:
            self.promotions.end(new.req_id)
        for name in output.scheduled_cached_reqs.resumed_req_ids:
            self.promotions.end(name)
        self.promotions.step(output)

    def check(self, survives_restart: bool | None) -> None:
        """Leaves the disk when the keys turn out to be good for one process only."""
        if survives_restart is False:
            self.leave(ROOT_IS_RANDOM)

    def leave(self, why: str) -> None:
        """Ends the use of the disk, and says why."""
        if self._is_on:
            self._is_on = False
            log.warning("no block goes to the disk any more: %s", why)
            self.promotions.clear()
            self._planner.leave_disk()

    def stats(self) -> dict[str, Any]:
        """Of promotions, and the hit tokens."""
        return {"disk_hit_tokens": self.hit_tokens, "promotions": self.promotions.stats()}
