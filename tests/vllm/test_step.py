"""What a step costs the scheduler's side: requests that are given no block and fill none cost one look each."""

import hashlib
import sys
import uuid
from types import SimpleNamespace

import pytest

from conftest import OLD
from kvortex import KVortexConfig, Namespace, RankMover, RankPlanner
from kvortex.vllm.groups import LayerGroup
from kvortex.vllm.layout import CacheLayout
from kvortex.vllm.scheduler import SchedulerSide
from kvortex.vllm.settings import LoadMode

BLOCK, BYTES, PROMPT = 16, 4096, 64
NOTHING = SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set())


class Decoding:
    """Requests that have computed their prompts and ``lengths`` tokens in all, as vLLM's scheduler tells of them."""

    def __init__(self, lengths, groups=1):
        engine, pool = uuid.uuid4().hex, BYTES * groups * 4096
        shape = {"block_size_bytes": BYTES, "namespace": Namespace()}
        self.planner = RankPlanner(engine, 1, cpu_pool_size_bytes=pool, **shape)
        self.rank = RankMover(KVortexConfig(cpu_pool_size_bytes=pool, device="none"), engine, 1, 0, **shape)
        kinds = tuple(LayerGroup((f"layer {group}",)) for group in range(groups))
        self.side = SchedulerSide(self.planner, CacheLayout({}, {}, 8, BLOCK, BYTES, False, kinds), LoadMode("sync"))
        self.groups, self.lengths = groups, dict(lengths)
        self.requests = {name: self._request(name) for name in self.lengths}
        for request in self.requests.values():
            self.side.matched(request, 0)
        new = [
            SimpleNamespace(req_id=name, block_ids=self._tables(-(-length // BLOCK)), num_computed_tokens=0)
            for name, length in self.lengths.items()
        ]
        self.build(scheduled_new_reqs=new, num_scheduled_tokens=self.lengths, scheduled_cached_reqs=NOTHING)

    def _request(self, name):
        hashes = [hashlib.sha256(f"{name} {block}".encode()).digest() for block in range(PROMPT // BLOCK)]
        known = {"num_tokens": PROMPT, "num_prompt_tokens": PROMPT, "lora_request": None}
        return SimpleNamespace(request_id=name, block_hashes=hashes, **known)

    def _tables(self, blocks):
        return tuple([1 + group] * blocks for group in range(self.groups))

    def name_block(self, name):
        """vLLM knows the last token of the next block."""
        hashes = self.requests[name].block_hashes
        hashes.append(hashlib.sha256(f"{name} {len(hashes)}".encode()).digest())

    def build(self, **output):
        return self.side.build(SimpleNamespace(**output))

    def decode(self):
        """Each request computes one token more."""
        names, lengths = list(self.lengths), list(self.lengths.values())
        cached = SimpleNamespace(
            req_ids=names,
            new_block_ids=[None if length % BLOCK else self._tables(1) for length in lengths],
            num_computed_tokens=lengths,
            resumed_req_ids=set(),
        )
        self.lengths = {name: length + 1 for name, length in self.lengths.items()}
        scheduled = dict.fromkeys(names, 1)
        return self.build(scheduled_new_reqs=[], num_scheduled_tokens=scheduled, scheduled_cached_reqs=cached)


def calls_of(work):
    """How many functions were called, Python's own among them."""
    count = 0

    def counted(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


GROUPS = [1] if OLD else [1, 6]


@pytest.mark.parametrize("groups", GROUPS)
def test_who_fills_no_block_and_is_given_none_costs_one_look(groups):
    fills = {f"fills {number}": 5 * BLOCK - 1 for number in range(4)}
    given = {f"is given one {number}": 5 * BLOCK for number in range(4)}

    def calls(others):
        going = {f"other {number}": 4 * BLOCK + 1 + number % 8 for number in range(others)}
        engine = Decoding(fills | given | going, groups)
        for name in fills:
            engine.name_block(name)
        plans = []
        count = calls_of(lambda: plans.append(engine.decode()))
        assert len(plans[0].store.blocks) == 4 * groups
        assert len(plans[0].written) == 4 * groups
        return count

    few, many = calls(40), calls(240)
    assert many - few <= 200


@pytest.mark.parametrize("groups", GROUPS)
def test_a_block_that_is_named_a_step_later_is_stored_then(groups):
    engine = Decoding({"one": 5 * BLOCK - 1, "other": 5 * BLOCK - 8}, groups)
    assert engine.decode().store is None
    engine.name_block("one")
    assert len(engine.decode().store.blocks) == groups
    assert engine.decode().store is None


def test_a_request_that_the_connector_was_never_asked_about_stores_nothing_and_its_blocks_are_put_in_order():
    engine = Decoding({"one": 5 * BLOCK - 1})
    engine.lengths["stranger"] = 5 * BLOCK - 1
    engine.name_block("one")
    assert len(engine.decode().store.blocks) == 1
    assert len(engine.decode().written) == 2


def test_blocks_without_a_name_are_looked_at_again_with_the_next_one(monkeypatch):
    """As those of an adapter whose files are still being read."""
    engine = Decoding({"one": 5 * BLOCK - 1})
    source, asked = engine.side._source, []
    with monkeypatch.context() as patch:
        patch.setattr(source, "keys", lambda hashes, lora: asked.append(len(hashes)) or b"")
        engine.name_block("one")
        assert [engine.decode().store for _ in range(BLOCK)] == [None] * BLOCK
    assert asked == [1]
    engine.name_block("one")
    assert len(engine.decode().store.blocks) == 2
