"""A worker's side: makes the copies of each step in the order that keeps every page right, and decides nothing."""

from __future__ import annotations

import logging
from enum import Enum
from typing import TYPE_CHECKING, Any

from kvortex import Parts
from kvortex.vllm.stats import LOAD, STORE, CopyCounts

if TYPE_CHECKING:
    from kvortex import PagedBlocks, PagedCache, RankMover
    from kvortex.vllm.layers import LayerHooks
    from kvortex.vllm.metadata import KVortexMetadata, Load

__all__ = ["Drafter", "WorkerSide"]

log = logging.getLogger("kvortex.vllm")


class Drafter(Enum):
    """When a drafter, whose layers have a part of each block, computes in a step."""

    NONE = "there is none"
    BEFORE_SAVING = "before wait_for_save"
    AFTER_HOOKS = "when all hooks of the step have been called"


class WorkerSide:
    """One rank. Its methods are called by the hooks of the model runner, in whatever order the version has.

    The order that matters is kept here: before the engine or a load writes blocks of this step, unfinished stores that
    read them are put first; loads inside the step come before the forward pass, or each layer's part before that
    layer; stores come after it, and after a drafter's.
    """

    def __init__(
        self, mover: RankMover, cache: PagedCache, hooks: LayerHooks | None = None, drafter: Drafter = Drafter.NONE
    ) -> None:
        """Without ``hooks`` loads inside a step are awaited as a whole."""
        self._drafter = drafter
        self._mover = mover
        self._cache = cache
        self._hooks = hooks
        self._step: KVortexMetadata | None = None
        self._fenced = self._loaded = self._stored = True
        self._background: dict[int, Load] = {}
        self._unstarted: list[int] = []
        self._failed: list[Load] = []
        self.counts = CopyCounts(cache.block_size_bytes)

    def begin(self, step: KVortexMetadata) -> None:
        """A step begins; called again for the same step it does nothing."""
        if step is not self._step:
            self._close()
            self._step = step
            self._fenced = self._loaded = self._stored = False
            if self._hooks is not None:
                self._hooks.begin()

    def fence(self) -> None:
        """Before anything writes the blocks of this step."""
        step = self._step
        if step is not None and not self._fenced:
            self._fenced = True
            if step.written:
                self._mover.fence(self._cache.blocks(step.written))

    def load(self, forward_context: Any = None) -> None:
        """Starts the loads of this step. What is inside the step is in place before what the engine does next, or, if
        ``forward_context`` allows, each layer before it is computed."""
        step = self._step
        if step is None or self._loaded:
            return
        self.fence()
        self._loaded = True
        inside = any(not load.background for load in step.loads)
        hooks = self._hooks if inside and self._hooks is not None and self._hooks.may_split(forward_context) else None
        for load in sorted(step.loads, key=lambda load: load.ticket):
            blocks = self._cache.blocks(load.blocks)
            if not load.background:
                self._load_inside(load, blocks, hooks)
                continue
            self._background[load.ticket] = load
            try:
                self._mover.load_later(load.ticket, load.slots, blocks)
                self.counts.started(LOAD, load.ticket, len(blocks))
            except Exception:
                log.exception("load %d did not start", load.ticket)
                self._unstarted.append(load.ticket)

    def _load_inside(self, load: Load, blocks: PagedBlocks, hooks: LayerHooks | None) -> None:
        self.counts.started(LOAD, load.ticket, len(blocks))
        if hooks is None:
            self._mover.load(load.ticket, load.slots, blocks)
            return
        parts = hooks.parts(len(load.blocks))
        started = Parts(hooks.ends(parts))
        self._mover.load(load.ticket, load.slots, blocks, parts=started)
        hooks.split(started, parts)

    def computes(self, layer: str) -> None:
        """``layer`` is about to be computed. Raises if a load inside the step was left out."""
        if not self._loaded:
            self._check_promises()
        if self._hooks is not None:
            self._hooks.computes(layer)

    def store(self) -> None:
        """After the forward pass: starts to store the blocks that it filled, unless a drafter may still write them."""
        if self._drafter is not Drafter.AFTER_HOOKS:
            self._store()

    def _store(self) -> None:
        step = self._step
        if step is None or self._stored:
            return
        self._check_promises()
        self._stored = True
        if self._hooks is not None:
            self._hooks.end()
        if step.store is not None:
            try:
                blocks = self._cache.blocks(step.store.blocks)
                self._mover.store(step.store.ticket, step.store.slots, blocks)
                self.counts.started(STORE, step.store.ticket, len(blocks) if self._mover.stores else 0)
            except Exception:
                log.exception("store %d did not start; its blocks are not kept", step.store.ticket)

    def end(self) -> None:
        """The pass is over: what no hook has started starts now, but for stores that come after a drafter."""
        if self._drafter is Drafter.NONE:
            self._close()
        else:
            self._check_promises()
            self.load()

    def _close(self) -> None:
        """Nothing of the step is computed any more."""
        if self._step is not None:
            self._check_promises()
            self.load()
            self._store()
            self._step = None

    def _check_promises(self) -> None:
        step = self._step
        if step is not None and not self._loaded and any(not load.background for load in step.loads):
            raise RuntimeError("vLLM computes a step without what it was promised: start_load_kv comes before it")

    def finished(self) -> set[str]:
        """Requests whose loads in the background have ended, also those that have been aborted meanwhile.

        Raises RuntimeError for a load inside a step that failed after its start: the step computed with wrong bytes.
        """
        ended, later = self._mover.ended_loads(), self._mover.ended_later()
        for ticket, ok in (*ended, *later, *self._mover.ended_stores()):
            self.counts.ended(ticket, ok)
        failed = [ticket for ticket, ok in ended if not ok]
        if failed:
            raise RuntimeError(f"loads {failed}, which a step was promised, failed: what it computed is wrong")
        received: set[str] = set()
        unstarted, self._unstarted = [(ticket, False) for ticket in self._unstarted], []
        for ticket, ok in unstarted + later:
            load = self._background.pop(ticket, None)
            if load is None:
                continue
            received.add(load.request_id)
            if not ok:
                self._failed.append(load)
        return received

    def take_failed(self) -> list[Load]:
        """Loads in the background that left blocks unfilled, since the last call."""
        failed, self._failed = self._failed, []
        return failed

    def shutdown(self) -> None:
        """Waits for the copies under way."""
        self._close()
        self._mover.shutdown()
