"""When a request waits for the disk, and whose blocks those on it are."""

from types import SimpleNamespace
from unittest import mock

import harness
import pytest
import rote
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from kvortex.vllm import KVortexConnector
from kvortex.vllm import disk as disks
from kvortex.vllm import layout as layouts
from kvortex.vllm import promotion as promotions
from kvortex.vllm.promotion import PrefillSpeed, Promotions


def test_prefill_is_measured_from_step_to_step():
    speed = PrefillSpeed(ahead=0)
    speed.step(512, 1, goes_on=False, now=10.0)
    assert speed.tokens_per_second is None
    speed.step(512, 1, goes_on=True, now=11.0)
    assert speed.tokens_per_second == 512
    # A pause, and answers, say nothing.
    speed.step(512, 1, goes_on=False, now=100.0)
    speed.step(8, 8, goes_on=True, now=101.0)
    speed.step(8, 8, goes_on=True, now=190.0)
    assert speed.tokens_per_second == 512
    for i in range(40):
        speed.step(1024, 2, goes_on=i > 0, now=200.0 + i)
    assert speed.tokens_per_second == pytest.approx(1024, rel=0.01)


def test_an_engine_that_is_ahead_asks_for_a_step_when_the_one_before_the_last_is_done():
    speed = PrefillSpeed(ahead=1)
    # Two steps are given at once; the third is asked for when the first, of 2 s, is done; the fourth after the second.
    for tokens, now in ((512, 0.0), (64, 0.0), (8, 2.0), (8, 2.25), (8, 2.26)):
        speed.step(tokens, 1, goes_on=now > 0 or tokens == 64, now=now)
    kept = promotions.KEEP
    assert speed.tokens_per_second == (kept * 512 + 64) / (kept * 2.0 + 0.25)


def reach():
    """Keys of four blocks, and their tokens."""
    return bytes(4 * 32), 64


class FakePromotion:
    def __init__(self, blocks, seconds):
        self.blocks, self.seconds = blocks, seconds
        self.pending, self.late, self.released = True, False, False

    def __len__(self):
        return self.blocks

    def among(self, count):
        return min(self.blocks, max(0, count - 2))

    def release(self):
        self.released = True


class FakePlanner:
    def __init__(self, found):
        self.found, self.asked, self.promoted = found, 0, []

    def find_below(self, keys):
        self.asked += 1
        return self.found

    def promote(self, promotion):
        self.promoted.append(promotion)


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(promotions, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def make(found, tokens_per_second=None):
    planner = FakePlanner(found)
    side = Promotions(planner, deadline_s=0.25, ahead=0)
    if tokens_per_second:
        side._speed._tokens, side._speed._seconds = tokens_per_second, 1.0
    return planner, side


def step(side):
    cached = SimpleNamespace(req_ids=[], resumed_req_ids=set())
    side.step(SimpleNamespace(scheduled_cached_reqs=cached, num_scheduled_tokens={}, total_num_scheduled_tokens=0))


@pytest.mark.usefixtures("clock")
def test_a_request_waits_once_until_its_blocks_have_come():
    found = FakePromotion(4, None)
    planner, side = make(found)
    assert side.waits("a", reach)
    assert side.waits("a", reach)
    found.pending = False
    assert not side.waits("a", reach)
    assert (planner.asked, planner.promoted, side.has_taken("a", 5)) == (1, [found], 3)
    # It finds no room and is asked about again: nothing is brought up twice.
    found.late = True
    assert not side.waits("a", reach)
    assert (planner.asked, side.stats()["late"]) == (1, 0)
    side.end("a")
    assert found.released
    assert side.waits("a", reach) is True, "preempted and resumed, it may wait again"


@pytest.mark.usefixtures("clock")
def test_one_that_is_late_is_counted_once():
    found = FakePromotion(4, None)
    _, side = make(found)
    assert side.waits("a", reach)
    found.pending, found.late = False, True
    assert [side.waits("a", reach) for _ in range(3)] == [False] * 3
    assert (side.stats()["late"], side.stats()["waiting"]) == (1, 0)


@pytest.mark.usefixtures("clock")
def test_what_is_computed_faster_is_not_brought_up():
    # 64 tokens: 0.064 s at 1000 tokens a second.
    for seconds, starts in ((0.05, True), (0.07, False), (None, True)):
        found = FakePromotion(4, seconds)
        planner, side = make(found, tokens_per_second=1000)
        assert side.waits("a", reach) is starts
        assert (planner.promoted == [found], found.released) == (starts, not starts)
        stats = side.stats()
        assert (stats["started"], stats["declined"]) == (int(starts), int(not starts))
        assert side.waits("a", reach) is starts, "the decision stands"
        assert planner.asked == 1


@pytest.mark.usefixtures("clock")
def test_nothing_below_is_asked_for_again():
    planner, side = make(None)
    assert not side.waits("a", reach)
    assert not side.waits("a", reach)
    assert planner.asked == 2, "it may still be looking for what it kept"


def test_blocks_of_a_request_that_is_not_asked_about_again_are_let_go(clock):
    found = FakePromotion(4, None)
    _, side = make(found)
    assert side.waits("a", reach)
    clock.now = 1.2
    step(side)
    assert not found.released
    clock.now = 1.3
    step(side)
    assert found.released
    assert not side.waits("a", reach)


@pytest.fixture(scope="module")
def config(model_folder):
    return harness.vllm_config(model_folder, harness.Options(0))


def seen(config, blocks, layout="NHD", change=lambda caches: caches):
    config.kv_transfer_config.engine_id = f"seen-{blocks}-{layout}"
    caches = harness.kv_cache_config(blocks)
    described = layouts.describe(caches)
    registered, _ = rote.kv_tensors(blocks, layout, rote.SHAPES["one group"])
    registered = change(registered)
    cache = layouts.paged_cache(described, registered, config)
    return disks.seen_layout(described, registered, cache, config)


def test_what_lies_otherwise_is_another_layout(config):
    same = seen(config, 40)
    assert len(same) == 32
    assert seen(config, 56) == same, "how many blocks there are changes none of them"
    assert seen(config, 40, "HND") != same
    other_order = seen(config, 40, change=lambda caches: dict(reversed(caches.items())))
    assert other_order != same, "layers follow each other otherwise"


def test_a_disk_is_for_names_that_survive(config, monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    identity = SimpleNamespace(survives_restart=True)
    assert disks.why_off(identity, config) is None
    assert disks.why_off(SimpleNamespace(survives_restart=False), config) == disks.WEIGHTS_UNKNOWN
    with monkeypatch.context() as patch:
        patch.setattr(config.cache_config, "calculate_kv_scales", True, raising=False)
        assert disks.why_off(identity, config) == disks.SCALES_CALCULATED
    monkeypatch.delenv("PYTHONHASHSEED")
    monkeypatch.setattr(disks.kv_cache_utils, "DEFAULT_NONE_HASH_SEED", None, raising=False)
    assert disks.why_off(identity, config) == disks.ROOT_IS_RANDOM
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    monkeypatch.setattr(config.parallel_config, "data_parallel_size", 2)
    assert "folders of its own" in disks.why_off(identity, config)


def test_rows_are_shared_for_a_disk_only(config, tmp_path):
    transfer = config.kv_transfer_config
    for index, (paths, rows) in enumerate(((None, "private"), ([str(tmp_path / "kv")], "open"))):
        transfer.engine_id = f"rows-{tmp_path.name}-{index}"
        extra = {"cpu_pool_size_bytes": "1MiB"} | ({"disk_paths": paths} if paths else {})
        with mock.patch.object(transfer, "kv_connector_extra_config", extra):
            made = KVortexConnector(config, KVConnectorRole.SCHEDULER, harness.kv_cache_config(40))
        assert made._rows == rows
        assert made._scheduler.stats()["disk"] is None, "these weights are not known"
        made.shutdown()
