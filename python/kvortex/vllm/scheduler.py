"""The scheduler's side: decides what is loaded and stored, and never touches a byte."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from kvortex import KVortexTimeoutError
from kvortex.vllm import params
from kvortex.vllm.disk import FORGOTTEN
from kvortex.vllm.groups import Tables
from kvortex.vllm.identity import KEY, KeySource
from kvortex.vllm.metadata import KVortexMetadata, Load, Store, block_ids
from kvortex.vllm.stats import Ledger
from kvortex.vllm.tracked import Given, Tracked

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvortex import Lease, RankPlanner
    from kvortex.vllm.disk import DiskSide
    from kvortex.vllm.events import EventSource
    from kvortex.vllm.layout import CacheLayout
    from kvortex.vllm.settings import LoadMode
    from kvortex.vllm.stats import KVortexStats

__all__ = ["SchedulerSide"]

log = logging.getLogger("kvortex.vllm")

DRAIN_S = 10.0
"""How long copies under way are waited for before the engine sleeps."""

NEVER = 1 << 62
"""More tokens than any request has."""


_Filled = tuple[Tracked, int, int]
"""A request that fills a block in a step, its tokens before the step, and after it."""

_Run = tuple[Tracked, int, bytes]
"""Blocks of a request that are stored: the first one's place, and the packed keys."""


class SchedulerSide:
    """Answers the scheduler's questions from the index, and turns its decisions into plans."""

    def __init__(
        self,
        planner: RankPlanner,
        layout: CacheLayout,
        load_mode: LoadMode,
        disk: DiskSide | None = None,
        *,
        shares: int = 1,
        events: EventSource | None = None,
    ) -> None:
        """``shares``: how many times a block is kept, on all ranks together."""
        self._planner = planner
        self._ledger = Ledger(planner, layout.block_tokens, shares * layout.block_size_bytes)
        self._events = events
        self._disk = disk
        self._layout = layout
        self._source = KeySource()
        self._load_mode = load_mode
        self._block_tokens = layout.block_tokens
        self._tables = Tables(layout.groups, layout.block_tokens)
        self._tracked: dict[str, Tracked] = {}
        self._next_full: dict[str, int] = {}
        """Tokens at which the next block of each of them is full."""
        self._offers: list[Tracked] = []
        self._step = KVortexMetadata()
        self._running = 0
        self._loading: dict[bytes, tuple[int, float]] = {}
        """First key of each load in the background: its ticket, and until when others wait for it."""
        self._unreported: set[str] = set()
        """Requests with a load in the background of whose end the engine has not heard from the ranks."""
        self._left: set[str] = set()
        """Those of them that have ended before."""
        self._held: dict[str, int] = {}
        """Blocks of requests that load, or have loaded, in the background and were not scheduled since."""
        self._under_way: dict[int, Given] = {}
        """What each load brings, and to whom."""
        self._mortal = False
        """Whether any request has ever asked that its blocks be kept for a time only."""
        self._particular = False
        """Whether any request has ever asked for other than the usual terms."""
        self._ready = False
        self._refused = False
        self.hit_tokens = 0
        """Tokens that the engine was given so far."""

    # What the engine asks.

    def matched(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens that can be loaded beyond ``num_computed_tokens``; None to be asked again in the next step."""
        try:
            return self._lookup(request, num_computed_tokens)
        except Exception:
            log.exception("a lookup failed; the request is computed")
            return 0, False

    def _lookup(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        tracked = self._track(request)
        tracked.local = first = num_computed_tokens // self._block_tokens
        # At least two tokens are left to be computed: a step of one token is a full CUDA graph, before which whole
        # loads are awaited.
        end = max(0, request.num_tokens - 2) // self._block_tokens
        tracked.end_lease()
        if not self._is_ready():
            return 0, False
        self._poll()
        if tracked.loading is not None or not tracked.loads:
            return 0, False
        keys = self._keys_of(tracked)[first * KEY : (end + self._tables.ahead) * KEY]
        if end <= first or not keys:
            return 0, False
        if self._is_being_loaded(keys):
            return None, False
        reach = partial(self._tables.reach, self._planner, keys, first, end)
        if self._disk is not None and self._disk.waits(request.request_id, reach):
            return None, False
        hit, lease = self._tables.lease(self._planner, keys, first, end)
        if not tracked.looked_up:
            tracked.looked_up = True
            self._note_lookup(request.request_id, end - first, max(0, hit - first), lease)
        if not len(lease):
            return 0, False
        tracked.lease, tracked.hit = lease, hit
        self._offers.append(tracked)
        tracked.background = self._is_background(first, len(lease))
        return (hit - first) * self._block_tokens, tracked.background

    def _note_lookup(self, name: str, asked: int, found: int, lease: Lease) -> None:
        """Counts a request's first lookup, of which ``lease`` has the blocks."""
        promoted = 0
        if self._disk is not None and len(lease):
            promoted = self._disk.promotions.has_taken(name, len(lease)) * found // len(lease)
        self._ledger.looked_up(asked, found, promoted)

    def allocated(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The engine takes ``num_external_tokens`` of what it was offered, into the blocks of the request's table."""
        if num_external_tokens == 0:
            return
        tracked = self._tracked[request.request_id]
        lease, tracked.lease = tracked.lease, None
        if lease is None:
            raise RuntimeError(f"vLLM took {num_external_tokens} tokens for {request.request_id} that were not offered")
        count, offered = num_external_tokens // self._block_tokens, tracked.hit - tracked.local
        targets = block_ids(self._tables.targets(blocks.get_block_ids(), tracked.local, tracked.local + count))
        if not 0 < count <= offered or len(targets) != self._tables.taken(lease, offered, count):
            raise RuntimeError(
                f"vLLM took {count} blocks for {request.request_id} of {offered} offered, for which {len(lease)} are "
                f"loaded, and gave it {len(targets)}"
            )
        ticket, slots = self._planner.plan_load(lease, background=tracked.background)
        load = Load(ticket, request.request_id, tracked.background, slots[: 4 * len(targets)], targets)
        self._step.loads.append(load)
        self._step.written.extend(targets)
        self.hit_tokens += num_external_tokens
        promoted = 0
        if self._disk is not None:
            promoted = self._disk.took(request.request_id, len(targets), num_external_tokens)
        given = self._under_way[ticket] = Given(tracked, len(targets), num_external_tokens, promoted)
        given.count(1)
        if tracked.background:
            # From now on, as its blocks: what it had computed before is gone, and a reset may come before it runs.
            tracked.loading, tracked.keeps = ticket, tracked.wishes.store
            self._unreported.add(request.request_id)
            self._held[request.request_id] = tracked.local + count
            self._announce(tracked, ticket, len(targets))

    def build(self, output: Any) -> KVortexMetadata:
        """The plans of the step that was just scheduled."""
        step, self._step = self._step, KVortexMetadata()
        full: list[_Filled] = []
        written: list[int] = []
        scheduled = output.num_scheduled_tokens
        for new in output.scheduled_new_reqs:
            tracked = self._tracked.get(new.req_id)
            if tracked is None:
                written += self._unknown(new.block_ids)
                continue
            written += self._begin(tracked, new.req_id, new.block_ids)
            tokens = new.num_computed_tokens + scheduled[new.req_id]
            if tokens >= self._next_full[new.req_id]:
                full.append((tracked, new.num_computed_tokens, tokens))
        self._go_on(output.scheduled_cached_reqs, scheduled, written, full)
        step.written.extend(written)
        self._running = len(scheduled)
        if full:
            step.store = self._plan_store(full)
        for tracked in self._offers:
            tracked.end_lease()
        self._offers.clear()
        if self._disk is not None:
            self._disk.step(output)
        self._poll()
        return step

    def _go_on(self, cached: Any, scheduled: dict[str, int], written: list[int], full: list[_Filled]) -> None:
        """Takes in what requests that ran before were given. Of hundreds of them few are given a block, or fill one."""
        next_full = self._next_full
        for name, new, computed in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
            tokens = computed + scheduled[name]
            if new is None and tokens < next_full.get(name, NEVER):
                continue
            tracked = self._tracked.get(name)
            if tracked is None:
                written += self._unknown(new)
                continue
            if new is not None:
                if name in cached.resumed_req_ids:
                    # The table is new, and everything in it was computed or found since, or loaded beside the steps.
                    if name not in self._held:
                        tracked.keeps = tracked.wishes.store
                    self._start_over(tracked)
                    written += self._begin(tracked, name, new)
                else:
                    ids = self._tables.listed(new)
                    tracked.blocks += ids
                    written += ids
            if tokens >= next_full[name]:
                full.append((tracked, computed, tokens))

    def _begin(self, tracked: Tracked, name: str, ids: Sequence[list[int]]) -> list[int]:
        """The request runs with a table of its own; returns the blocks in it that it writes."""
        tracked.blocks = self._tables.listed(ids)
        self._held.pop(name, None)
        return self._tables.beyond(tracked.blocks, tracked.local)

    def _unknown(self, ids: Sequence[list[int]] | None) -> list[int]:
        """The blocks that a request writes of which nothing is known, since its lookup failed."""
        return [] if ids is None else self._tables.beyond(self._tables.listed(ids), 0)

    def finished(self, request: Any) -> tuple[bool, dict[str, Any] | None]:
        """The request has ended. Whether the ranks will still report a load into its blocks, and what its answer tells.

        The planner may know the load's end before; but a report comes for every load, and only once.
        """
        name = request.request_id
        tracked = self._tracked.pop(name, None)
        if tracked is None:
            return False, None
        del self._next_full[name]
        self._held.pop(name, None)
        tracked.end_lease()
        if self._disk is not None:
            self._disk.promotions.end(name)
        self._poll()
        report = {params.LOADED_TOKENS: self._sources(tracked)} if tracked.wishes.report else None
        if name not in self._unreported:
            return False, report
        self._unreported.remove(name)
        self._left.add(name)
        return True, report

    def reported(self, names: set[str]) -> set[str]:
        """The ranks report that the loads of ``names`` have ended; returns those of requests that had ended before."""
        left = names & self._left
        self._left -= left
        self._unreported -= names
        return left

    def reset(self) -> int:
        """Forgets every block and returns how many there were. What requests have computed or loaded is never kept."""
        for tracked in self._offers:
            tracked.end_lease()
        self._offers.clear()
        for name, tracked in self._tracked.items():
            tracked.keeps = tracked.keeps and not tracked.blocks and name not in self._held
        forgotten = self._planner.reset()
        if self._disk is not None:
            self._disk.leave(FORGOTTEN)
        return forgotten

    def prepare(self) -> None:
        """Opens what needs all ranks, if they are there."""
        self._is_ready()

    def shutdown(self) -> None:
        """Waits for what is on its way to the disk, for a bounded time."""
        self._planner.leave_disk()

    def drain(self) -> None:
        """Waits for the copies under way, for the memory that they use is about to go.

        Raises KVortexTimeoutError if they take too long.
        """
        deadline = time.monotonic() + DRAIN_S
        while copies := self._planner.get_stats()["in_flight"]:
            if time.monotonic() > deadline:
                raise KVortexTimeoutError(f"{copies} plans of copies are not done after {DRAIN_S} s: sleep later")
            time.sleep(0.001)
            self._poll()

    def stats(self) -> dict[str, Any]:
        """Numbers of the planner, and ``hit_tokens``; of those, and of promotions, if there is a disk."""
        disk = self._disk.stats() if self._disk is not None else {}
        return {**self._planner.get_stats(), "hit_tokens": self.hit_tokens, **disk}

    def take_counts(self) -> KVortexStats | None:
        """What was counted since the last call."""
        return self._ledger.take(self._disk.counts() if self._disk is not None else None)

    def take_events(self) -> list[Any]:
        """What became visible or was forgotten since the last call, if somebody listens."""
        return self._events.take() if self._events is not None else []

    # What goes on inside.

    def _track(self, request: Any) -> Tracked:
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            wishes, ignored = params.read(getattr(request, "kv_transfer_params", None))
            self._ledger.ignored(ignored.values, ignored.keys)
            self._mortal |= wishes.ttl_ms is not None
            self._particular |= wishes.is_particular
            tracked = self._tracked[request.request_id] = Tracked(request, wishes)
            self._start_over(tracked)
        return tracked

    def _start_over(self, tracked: Tracked) -> None:
        """Offers all its blocks, again if it is not new."""
        tracked.offered = 0
        self._next_full[tracked.request.request_id] = self._block_tokens

    def _keys_of(self, tracked: Tracked) -> bytes:
        """The packed keys of the request's full blocks, as far as the engine has named them."""
        if not self._source.extend(tracked.keys, tracked.request):
            self._start_over(tracked)
        self._check_keys()
        return tracked.keys.packed

    def _check_keys(self) -> None:
        if self._disk is not None:
            self._disk.check(self._source.survives_restart)

    def _is_ready(self) -> bool:
        """Whether every rank has the memory that plans count on; until then nothing is promised."""
        if not self._ready and not self._refused:
            try:
                self._ready = self._planner.ready()
                if self._ready and self._disk is not None:
                    self._disk.say()
            except Exception:
                self._refused = True
                log.exception("the ranks do not agree; nothing is kept")
        return self._ready

    def _poll(self) -> None:
        if self._mortal:
            self._planner.expire(_now_ms())
        for ticket, ok in self._planner.poll():
            if not ok:
                log.warning("load %d failed; what it was for is computed", ticket)
            self._count_load(ticket, ok)
            for key, (other, _) in list(self._loading.items()):
                if other == ticket:
                    del self._loading[key]
            for tracked in self._tracked.values():
                if tracked.loading == ticket:
                    tracked.loading, tracked.loads = None, ok

    def _count_load(self, ticket: int, ok: bool) -> None:
        given = self._under_way.pop(ticket, None)
        self._ledger.loaded(given.blocks if given is not None else 0, ok)
        if given is not None and not ok:
            given.count(-1)

    def _sources(self, tracked: Tracked) -> dict[str, int]:
        """Tokens that a request was given, by tier."""
        disk = {"disk": tracked.promoted} if self._disk is not None else {}
        return {"host": tracked.loaded - tracked.promoted, **disk}

    def _is_background(self, local: int, count: int) -> bool:
        """Whether to load ``count`` blocks, beyond ``local`` that the engine has, beside the steps."""
        mode = self._load_mode
        held = sum(self._held.values()) + local + count
        if mode.held_blocks is not None and held > mode.held_blocks:
            return False
        return mode.is_background(count * self._layout.block_size_bytes, self._running)

    def _announce(self, tracked: Tracked, ticket: int, count: int) -> None:
        key = tracked.keys.packed[tracked.local * KEY : (tracked.local + 1) * KEY]
        seconds = self._load_mode.seconds(count * self._layout.block_size_bytes)
        self._loading[key] = (ticket, time.monotonic() + seconds)

    def _is_being_loaded(self, keys: bytes) -> bool:
        """Whether another request loads the same prefix; it is not waited for longer than it should take."""
        found = self._loading.get(keys[:KEY])
        return found is not None and time.monotonic() < found[1]

    def _plan_store(self, full: list[_Filled]) -> Store | None:
        if not self._is_ready():
            return None
        runs, blocks = self._named(full)
        self._check_keys()
        if not runs:
            return None
        hashes = b"".join([keys for _, _, keys in runs])
        terms = self._terms(runs) if self._particular else []
        store = self._tables.plan_store(self._planner, hashes, blocks, terms)
        if self._events is not None:
            described = (
                (tracked.request, packed, first, group)
                for tracked, first, keys in runs
                for group, packed in enumerate(self._tables.keys(keys))
            )
            self._events.planned(store.ticket if store is not None else None, described)
        return store

    def _named(self, full: list[_Filled]) -> tuple[list[_Run], list[int]]:
        """What has a name now and was not offered yet, and its blocks as ``Tables`` lists them."""
        runs: list[_Run] = []
        blocks: list[int] = []
        for tracked, computed, tokens in full:
            request, first = tracked.request, tracked.offered
            hashes = request.block_hashes
            if len(hashes) <= first:
                # An engine that schedules ahead names a block when it knows the last token in it: in the next step.
                continue
            behind = self._behind(tracked, tokens)
            end = min(tokens // self._block_tokens - behind, len(hashes), self._tables.length(tracked.blocks))
            if tracked.keeps and end > first and (keys := self._source.keys(hashes[first:end], request.lora_request)):
                runs.append((tracked, first, keys))
                blocks += self._tables.kept(tracked.blocks, first, end, computed)
                tracked.offered = end
            self._next_full[request.request_id] = (max(first, end) + 1 + behind) * self._block_tokens
        return runs, blocks

    def _behind(self, tracked: Tracked, tokens: int) -> int:
        """Full blocks that are not stored yet: the last one while tokens are generated, where a drafter's layers look
        ahead. What they keep of its end is computed again when the drafted token behind it is rejected.
        """
        return int(self._tables.ahead and tokens > tracked.request.num_prompt_tokens)

    @staticmethod
    def _terms(runs: list[_Run]) -> params.Terms:
        wished = ((len(keys) // KEY, tracked.wishes) for tracked, _, keys in runs)
        return params.terms(wished, _now_ms())


def _now_ms() -> int:
    return int(time.monotonic() * 1000)
