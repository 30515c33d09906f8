"""Who shares nothing: other adapters, other images, other tenants find nothing of each other, in any tier."""

import logging
import time
from types import SimpleNamespace

import harness
import pytest
from direct import Direct, whole_blocks
from disk_harness import DiskOptions, DiskRun
from harness import Options
from test_identity import adapter, request

from kvortex.vllm import disk as disks
from kvortex.vllm.stats import key

TOKENS = list(range(100, 200))
IMAGE_FROM = 20
"""Where the image of a request begins: blocks before it are the same without."""


def in_host(direct):
    """Leaves blocks in host memory, where they are."""


def on_disk(direct):
    """Fills host memory with others, which come from elsewhere: the blocks are left on the disk."""
    before = direct.side.stats()
    for other in range(before["capacity_blocks"] // 6 + 1):
        one = request(range(1000 * other + 5000, 1000 * other + 5100))
        one.request_id = f"other {other}"
        direct.serve(one)
    after = direct.side.stats()
    assert after["evictions"] >= before["evictions"] + 6
    assert after["disk"]["written_blocks"] > before["disk"]["written_blocks"]


TIERS = {"host": in_host, "disk": on_disk}
"""How blocks are brought into one tier, and only there."""


@pytest.fixture(scope="module")
def config(model_folder):
    logging.disable(logging.WARNING)
    return harness.vllm_config(model_folder, Options(0))


@pytest.fixture
def direct(config, model_folder, tmp_path, tier):
    logging.disable(logging.WARNING)
    run = None
    if tier == "disk":
        options = DiskOptions(0)
        run = DiskRun(model_folder, options, harness.vllm_config(model_folder, options), tmp_path / "disk")
    one = Direct(model_folder, config, run)
    with one.run.virtual():
        yield one
    if run is not None:
        run.end()


def of(name, **more):
    """A request with the same tokens as all others."""
    one = request(TOKENS, **more)
    one.request_id = name
    return one


def found(direct, one):
    """Tokens that a request is offered, which then goes away."""
    tokens = direct.hit_tokens(one)
    direct.scheduler.request_finished(one, [])
    return tokens


KINDS = {
    "nobody": {},
    "tenant a": {"cache_salt": "a"},
    "tenant b": {"cache_salt": "b"},
    "cat": {"image": "cat"},
    "dog": {"image": "dog"},
    "cat of tenant a": {"image": "cat", "cache_salt": "a"},
}


def may_share(one, other):
    """Tokens that two kinds have in common."""
    if one == other:
        return whole_blocks(of("", **KINDS[one]))
    same_tenant = KINDS[one].get("cache_salt") == KINDS[other].get("cache_salt")
    return IMAGE_FROM // harness.BLOCK * harness.BLOCK if same_tenant else 0


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("stored", KINDS)
def test_only_who_asks_the_same_finds_it(direct, tier, stored):
    direct.serve(of("first", **KINDS[stored]))
    TIERS[tier](direct)
    for asking, more in KINDS.items():
        assert found(direct, of(f"then {asking}", **more)) == may_share(stored, asking), asking


@pytest.mark.parametrize("tier", TIERS)
def test_adapters_share_nothing(direct, tier, tmp_path):
    """Nor when they have the same name; and the same files are the same adapter."""
    tuned = adapter(tmp_path / "one", b"weights", number=1)
    other = adapter(tmp_path / "other", b"weightz", number=2)
    kinds = {"none": {}, "tuned": {"lora_request": tuned}, "other": {"lora_request": other}}
    kinds["tuned, tenant a"] = {"lora_request": tuned, "cache_salt": "a"}
    for one in kinds.values():
        assert found(direct, of("early", **one)) == 0
    wait_for_adapters(direct, kinds)
    for stored, more in kinds.items():
        direct.side.reset()
        direct.serve(of(f"first {stored}", **more))
        TIERS[tier](direct)
        shared = {asking: found(direct, of(f"{stored}, then {asking}", **one)) for asking, one in kinds.items()}
        assert shared == {asking: 96 if asking == stored else 0 for asking in kinds}


def wait_for_adapters(direct, kinds):
    """Until their files have been read, their requests are misses."""
    from kvortex.vllm.identity import RequestKeys

    end = time.monotonic() + 10
    for name, more in kinds.items():
        keys = RequestKeys()
        while not keys.packed:
            assert time.monotonic() < end, name
            direct.side._source.extend(keys, of(name, **more))


@pytest.mark.parametrize("tier", ["disk"])
def test_numbers_and_answers_tell_what_came_from_the_disk(direct, tier, monkeypatch):
    monkeypatch.setattr(disks, "COUNTED_EACH_S", 0)
    direct.serve(of("first"))
    TIERS[tier](direct)
    asking = of("then")
    asking.kv_transfer_params = {"kvortex_report": True}
    tokens = direct.hit_tokens(asking)
    assert tokens == 96
    blocks = SimpleNamespace(get_block_ids=lambda: (list(range(1, 8)),))
    direct.scheduler.update_state_after_alloc(asking, blocks, tokens)
    direct._step([], {})
    _, answer = direct.scheduler.request_finished(asking, [])
    assert answer == {"kvortex_loaded_tokens": {"host": 0, "disk": 96}}
    disk, told = direct.side.stats()["disk"], direct.side.take_counts().data
    assert told[key("kvortex_hit_tokens", "disk")] == 96
    assert key("kvortex_hit_tokens", "host") not in told
    for name, direction in (("promoted", "load"), ("written", "store")):
        count = disk[f"{name}_blocks"]
        assert told[key("kvortex_transferred_blocks", "disk", direction)] == count >= 6
        assert told[key("kvortex_transferred_tokens", "disk", direction)] == count * harness.BLOCK
    assert told[key("kvortex_used_blocks", "disk")] == disk["blocks"]
    assert told[key("kvortex_capacity_bytes", "disk")] == disk["max_bytes"]
    assert told[key("kvortex_promotions", "started")] == 1
    assert told[key("kvortex_promotion_bytes_per_second")] == int(disk["promotion_bytes_per_second"]) > 0
