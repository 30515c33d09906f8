"""What requests may ask for, and what others are told: random schedules, and every value of ``kv_transfer_params``."""

import logging

import harness
import pytest
from controlled import KINDS, ControlledRun
from harness import FITTING, Options
from test_harness import MODES, SEEDS

from kvortex.vllm.stats import KVortexStats

RUNS = max(1, SEEDS // 4)


@pytest.fixture(scope="module")
def config(model_folder):
    logging.disable(logging.WARNING)
    return harness.vllm_config(model_folder, Options(0))


@pytest.fixture(autouse=True)
def _whole_hashes(monkeypatch):
    """Events name blocks by all bytes of their hashes, not by 64 bits."""
    monkeypatch.setenv("VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES", "0")


def controlled(config, model_folder, seed, *, kinds=KINDS, **options):
    logging.disable(logging.CRITICAL)
    run = ControlledRun(model_folder, Options(seed, **options), config, kinds=kinds)
    run.go()
    for connector in (run.scheduler.connector, run.connector):
        run.numbers.aggregate(connector.get_kv_connector_stats() or KVortexStats())
    return run


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kinds", [KINDS, ("store", "load", "priority")], ids=["all", "no ttl"])
@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("order", FITTING)
def test_events_numbers_and_answers_say_what_happened(config, model_folder, order, mode, kinds):
    heard = expired = ignored = told_of_loads = hits = 0
    for seed in range(RUNS):
        run = controlled(config, model_folder, seed, order=order, kinds=kinds, **MODES[mode])
        counts, side = run.planner.counts(), run.scheduler.connector._scheduler
        assert run.number("kvortex_transferred_blocks", "host", "store") == counts["stored_blocks"]
        assert run.number("kvortex_evicted_blocks", "host") == counts["evicted_blocks"]
        assert run.number("kvortex_refused_blocks", "host") == counts["refused_blocks"]
        assert run.number("kvortex_used_blocks", "host") == counts["used_blocks"]
        assert run.number("kvortex_capacity_bytes", "host") == run.slots * run.block_bytes
        stored = run.number("kvortex_transferred_bytes", "host", "store")
        assert stored >= counts["stored_blocks"] * run.block_bytes > 0
        loaded = run.number("kvortex_transferred_tokens", "host", "load")
        assert run.number("kvortex_transferred_bytes", "host", "load") == loaded // harness.BLOCK * run.block_bytes
        if mode == "sync":
            assert loaded == side.hit_tokens == sum(run.told.values()) > 0
            assert run.number("kvortex_failed_transfers", "host", "load") == 0
        else:
            assert loaded <= side.hit_tokens
        hits += run.number("kvortex_hit_tokens", "host")
        assert run.number("kvortex_hit_tokens", "host") < run.number("kvortex_lookup_tokens")
        heard += run.listener.counts["blocks"]
        expired += run.number("kvortex_expired_blocks", "host")
        ignored += run.number("kvortex_ignored_params", "value")
        told_of_loads += sum(run.told.values())
    assert heard > 100 * RUNS
    assert (expired > RUNS / 2) == ("ttl" in kinds)
    assert ignored > RUNS
    assert told_of_loads > 300 * RUNS
    assert hits > 100 * RUNS


def test_requests_that_do_not_load_are_given_nothing(config, model_folder):
    refused, told = [], []
    for seed in range(5):
        run = controlled(config, model_folder, seed, kinds=("load",))
        told += run.told.values()
        never = {name for name, asks in run.asked.items() if asks.get("kvortex_load") is False}
        refused += [tokens for name, tokens in run.told.items() if name in never]
    assert set(refused) == {0}
    assert any(told)
