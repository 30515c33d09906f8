"""Before vLLM sleeps it resets the connector: nothing is found afterwards, and nothing copies any more."""

import hashlib
import uuid
from types import SimpleNamespace

import pytest

from kvortex import KVortexConfig, KVortexTimeoutError, Namespace, PagedCache, RankMover, RankPlanner
from kvortex.vllm import KVortexConnector, scheduler
from kvortex.vllm.groups import LayerGroup
from kvortex.vllm.layout import CacheLayout
from kvortex.vllm.scheduler import SchedulerSide
from kvortex.vllm.settings import LoadMode

BYTES, BLOCK = 4096, 16
TOKENS = 4 * BLOCK


class Engine:
    """A scheduler's connector and a mover, without vLLM between them."""

    def __init__(self, *, sleeps):
        name, shape = uuid.uuid4().hex, {"block_size_bytes": BYTES, "namespace": Namespace()}
        planner = RankPlanner(name, 1, cpu_pool_size_bytes=1 << 20, **shape)
        config = KVortexConfig(cpu_pool_size_bytes=1 << 20, device="none", huge_pages=False)
        self.mover = RankMover(config, name, 1, 0, **shape)
        self.cache = PagedCache([memoryview(bytearray(BYTES * 8)).cast("B", (8, BYTES))])
        self.connector = KVortexConnector.__new__(KVortexConnector)
        layout = CacheLayout({}, {}, 8, BLOCK, BYTES, replicated=False, groups=(LayerGroup(()),))
        self.connector._scheduler = SchedulerSide(planner, layout, LoadMode("sync"))
        self.connector._vllm = SimpleNamespace(model_config=SimpleNamespace(enable_sleep_mode=sleeps))
        self.hashes = [hashlib.sha256(bytes([number])).digest() for number in range(TOKENS // BLOCK)]

    def matched(self, name):
        request = SimpleNamespace(
            request_id=name, num_tokens=TOKENS + BLOCK, block_hashes=self.hashes, lora_request=None
        )
        return self.connector.get_num_new_matched_tokens(request, 0)[0]

    def step(self, name):
        """The plan to store what a request has computed."""
        blocks = (list(range(1, 1 + TOKENS // BLOCK)),)
        new = SimpleNamespace(req_id=name, block_ids=blocks, num_computed_tokens=0)
        cached = SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set())
        output = SimpleNamespace(
            scheduled_new_reqs=[new], num_scheduled_tokens={name: TOKENS}, scheduled_cached_reqs=cached
        )
        return self.connector.build_connector_meta(output).store

    def store(self, plan):
        self.mover.store(plan.ticket, plan.slots, self.cache.blocks(plan.blocks))


def test_nothing_is_found_after_a_sleep():
    engine = Engine(sleeps=True)
    assert engine.matched("first") == 0
    engine.store(engine.step("first"))
    engine.connector._scheduler.drain()
    assert engine.matched("second") == TOKENS
    assert engine.connector.reset_cache() is True
    assert engine.matched("third") == 0


def test_no_copy_is_under_way_when_memory_goes(monkeypatch):
    engine = Engine(sleeps=True)
    engine.matched("first")
    plan = engine.step("first")
    monkeypatch.setattr(scheduler, "DRAIN_S", 0.05)
    with pytest.raises(KVortexTimeoutError, match="1 plans of copies are not done after"):
        engine.connector.reset_cache()
    engine.store(plan)
    monkeypatch.setattr(scheduler, "DRAIN_S", 10.0)
    assert engine.connector.reset_cache() is True
    assert engine.connector._scheduler.stats()["in_flight"] == 0


def test_an_engine_that_cannot_sleep_does_not_wait():
    engine = Engine(sleeps=False)
    engine.matched("first")
    engine.step("first")
    assert engine.connector.reset_cache() is True
    assert engine.connector._scheduler.stats()["in_flight"] == 1
