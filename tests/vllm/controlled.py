"""Random schedules whose requests ask for things, and somebody who hears of nothing but events and numbers."""

from __future__ import annotations

import math
from collections import Counter

from harness import HASH, Run
from rote import BLOCK, LAYER_BYTES, NEW
from streams import LOAD
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import hash_block_tokens

from kvortex.vllm.params import LOADED_TOKENS
from kvortex.vllm.stats import KVortexStats, key

KINDS = ("store", "load", "priority", "ttl")
LIVES_S = (0.3, 1, 3)
LATE_S = 0.26
"""How late a block may be forgotten, by the clock of the step."""
SALTS = [None, "a", "b"]
EXTRA = {salt: None if salt is None else (("cache_salt", salt) if NEW else salt,) for salt in SALTS}


class Listener:
    """Somebody who takes for stored what events say, and checks that each event says what was hashed."""

    def __init__(self):
        self.stored: set[bytes] = set()
        self.cautious: set[bytes] = set()
        """As ``stored``, of somebody who takes the end of the engine's own cache for the end of everything."""
        self.counts: Counter[str] = Counter()

    def hear(self, events):
        for event in events:
            self.counts[type(event).__name__] += 1
            if isinstance(event, AllBlocksCleared):
                self.cautious.clear()
            elif event.medium != "CPU":
                continue
            elif isinstance(event, BlockStored):
                self._check(event)
                assert not self.stored & set(event.block_hashes), "stored twice"
                self.stored.update(event.block_hashes)
                self.cautious.update(event.block_hashes)
            elif isinstance(event, BlockRemoved):
                assert self.stored.issuperset(event.block_hashes), "removed, but never stored"
                self.stored.difference_update(event.block_hashes)
                self.cautious.difference_update(event.block_hashes)

    def _check(self, event):
        """The hashes are those of the tokens after the parent."""
        parent, tokens = event.parent_block_hash, event.token_ids
        assert event.block_size == BLOCK
        assert len(tokens) == BLOCK * len(event.block_hashes)
        self.counts["blocks"] += len(event.block_hashes)
        for i, found in enumerate(event.block_hashes):
            block = tuple(tokens[i * BLOCK : (i + 1) * BLOCK])
            extras = EXTRA.values() if parent is None else [None]
            fitting = [extra for extra in extras if hash_block_tokens(HASH, parent, block, extra) == found]
            assert fitting, "an event names tokens that were not hashed"
            if NEW:
                assert event.extra_keys is None or [keys and keys[0] for keys in event.extra_keys][i] in SALTS
            parent = found


class Shared:
    """The planner, for reading back: what its ``poll`` tells goes to the connector, which would miss it otherwise."""

    def __init__(self, side):
        self._planner, self.poll = side._planner, side._poll

    def __getattr__(self, name):
        return getattr(self._planner, name)


class ControlledRun(Run):
    """A run of the harness whose requests ask for things; ``kinds`` names what they may ask for."""

    def __init__(self, model, options, config=None, *, kinds=KINDS):
        self.kinds = kinds
        self.listener = Listener()
        self.numbers = KVortexStats()
        self.asked: dict[str, dict] = {}
        self.told: dict[str, int] = {}
        self.may_be_kept: dict[bytes, float] = {}
        """Until when the blocks may be there that requests which store have named."""
        super().__init__(model, options, config)
        self.scheduler.kv_event_publisher.publish = lambda batch: self.listener.hear(batch.events)
        self.planner = Shared(self.scheduler.connector._scheduler)
        self._listen_to_answers()
        self._listen_to_numbers()

    def _configure(self, config):
        super()._configure(config)
        config.kv_events_config = KVEventsConfig(enable_kv_cache_events=True, publisher="null")

    def _listen_to_answers(self):
        side = self.scheduler.connector._scheduler
        finished = side.finished

        def told(request):
            loading, report = finished(request)
            if report is not None:
                self.told[request.request_id] = report[LOADED_TOKENS]["host"]
            return loading, report

        side.finished = told

    def _listen_to_numbers(self):
        make_stats = self.scheduler.make_stats

        def heard(speculation, counted, *rest, **more):
            if counted is not None:
                self.numbers.aggregate(counted)
            return make_stats(speculation, counted, *rest, **more)

        self.scheduler.make_stats = heard

    def _add(self):
        super()._add()
        request = self.requests[f"r{self.counts.requests}"].request
        asks = self.asked[request.request_id] = {"kvortex_report": True, "do_remote_decode": False, **self._asks()}
        request.kv_transfer_params = asks

    def _asks(self):
        rng = self.rng
        given = {
            "store": ("kvortex_store", rng.random() < 0.5),
            "load": ("kvortex_load", rng.random() < 0.5),
            "priority": ("kvortex_priority", rng.choice(("low", "normal", "high", -1, 0, 1))),
            "ttl": ("kvortex_ttl_s", rng.choice(LIVES_S)),
        }
        asks = dict(given[kind] for kind in self.kinds if rng.random() < 0.35)
        if rng.random() < 0.2:
            asks |= {rng.choice(("kvortex_ttl_s", "kvortex_stores")): "soon"}
        return asks

    def _note(self):
        """Who may keep what, and until when: a life counts from when a block was stored, so from now at the latest."""
        for tracked in self.requests.values():
            request = tracked.request
            asks = request.kv_transfer_params
            if asks.get("kvortex_store", True):
                ttl = asks.get("kvortex_ttl_s")
                until = math.inf if ttl in (None, "soon") else self.device.now + ttl
                for name in request.block_hashes:
                    self.may_be_kept[name] = max(self.may_be_kept.get(name, 0), until)
        super()._note()

    def read_back(self):
        # Whoever reads back takes the ends of loads away.
        self.device.wait(self.device.streams[LOAD].mark())
        for ended in self.mover.real.ended_loads():
            self.side.counts.ended(*ended)
        super().read_back()
        self.planner.poll()
        self.listener.hear(self.scheduler.connector.take_events())
        there = {name for name in self.everything if len(self.planner.lease_prefix(name))}
        now = self.device.now
        for name in there:
            assert self.may_be_kept.get(name, 0) > now - LATE_S, "a block is there that nobody may keep"
        assert self.listener.stored <= there, "somebody believes in blocks that are not there"
        assert self.listener.cautious <= self.listener.stored
        if "ttl" not in self.kinds:
            assert self.listener.stored == there, "nobody heard of some blocks"

    def number(self, name, *labels):
        """What was counted of one series."""
        return self.numbers.data.get(key(name, *labels), 0)

    @property
    def block_bytes(self):
        """What a block takes."""
        return LAYER_BYTES * self.shape.places
