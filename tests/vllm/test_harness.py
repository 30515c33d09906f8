"""Random schedules of vLLM's own scheduler: no position is ever read wrong, nothing leaks, every request ends."""

import logging
import os
from array import array

import harness
import pytest
from harness import NEW, Options, Run, Wrong

SEEDS = int(os.environ.get("KVORTEX_VLLM_SEEDS", "20"))
LOSSES = {"load_failures": 0.2, "store_failures": 0.1}
MODES = {"sync": {"load_mode": "sync"}, "async": {"load_mode": "async", **LOSSES}, "auto": {"load_mode": "auto"}}
ORDERS = ["v1", "v2"] if NEW else ["v1"]


@pytest.fixture(scope="module")
def config(model_folder):
    logging.disable(logging.WARNING)
    return harness.vllm_config(model_folder, Options(0))


def runs(config, model_folder, count=SEEDS, **options):
    """Runs seeds 0 to ``count`` and adds up what they did."""
    logging.disable(logging.CRITICAL)
    totals = {}
    for seed in range(count):
        counts = Run(model_folder, Options(seed, **options), config).go()
        totals = {name: totals.get(name, 0) + number for name, number in vars(counts).items()}
    return totals


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", ORDERS)
def test_no_position_is_ever_wrong(config, model_folder, order, mode, layout, record_property):
    totals = runs(config, model_folder, order=order, layout=layout, **MODES[mode])
    record_property("totals", str(totals))
    print(f"\n{order} {mode} {layout}: {totals}")
    assert totals["finished"] == totals["requests"] > 30 * SEEDS
    assert totals["hit_tokens"] > 300 * SEEDS
    assert totals["read_back"] > 100 * SEEDS
    assert totals["preempted"] > SEEDS
    assert totals["aborted"] > SEEDS
    assert (totals["background"] > SEEDS) == (mode == "async" or (mode == "auto" and NEW))
    if mode == "async":
        assert totals["failed_loads"] > SEEDS / 2


def test_a_run_is_replayed_from_its_seed(config, model_folder):
    options = Options(7, **MODES["async"])
    logging.disable(logging.CRITICAL)
    assert Run(model_folder, options, config).go() == Run(model_folder, options, config).go()


# Planted defects: each must be noticed, or the harness proves nothing.


def appends_on_resume(run, monkeypatch):
    go_on = type(run.scheduler.connector._scheduler)._go_on

    def wrong(self, cached, *rest):
        before = {name: list(self._tracked[name].blocks) for name in cached.resumed_req_ids}
        go_on(self, cached, *rest)
        for name, blocks in before.items():
            self._tracked[name].blocks = blocks + self._tracked[name].blocks

    monkeypatch.setattr(type(run.scheduler.connector._scheduler), "_go_on", wrong)


def promises_a_block_too_many(run, monkeypatch):
    side = run.scheduler.connector._scheduler
    lookup, allocated = side._lookup, side.allocated

    def one_more(request, computed):
        tokens, later = lookup(request, computed)
        room = request.num_tokens - 1 - computed - (tokens or 0) >= harness.BLOCK
        return (tokens + harness.BLOCK if tokens and room else tokens), later

    def taken(request, blocks, tokens):
        tracked = side._tracked[request.request_id]
        if tracked.lease is not None and tokens > len(tracked.lease) * harness.BLOCK:
            tokens -= harness.BLOCK
        allocated(request, blocks, tokens)

    monkeypatch.setattr(side, "_lookup", one_more)
    monkeypatch.setattr(side, "allocated", taken)


def stores_before_full(run, monkeypatch):
    side = run.scheduler.connector._scheduler
    plan = side._plan_store
    monkeypatch.setattr(side, "_plan_store", lambda full: plan([(one, tokens + harness.BLOCK) for one, tokens in full]))
    go_on = side._go_on

    def eager(cached, scheduled, step, full):
        go_on(cached, scheduled, step, full)
        have = {id(one) for one, _ in full}
        for name, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            tracked = side._tracked[name]
            if id(tracked) not in have:
                full.append((tracked, computed + scheduled[name]))

    monkeypatch.setattr(side, "_go_on", eager)


def loads_without_the_barrier(run, monkeypatch):
    monkeypatch.setattr(run.side, "fence", lambda: None)


def fences_after_the_write(run, monkeypatch):
    fence, store = run.side.fence, run.side.store
    monkeypatch.setattr(run.side, "fence", lambda: None)

    def late():
        fence()
        store()

    monkeypatch.setattr(run.side, "store", late)


def takes_errors_for_successes(run, monkeypatch):
    monkeypatch.setattr(run.connector, "get_block_ids_with_load_errors", set)


def publishes_failed_stores(run, monkeypatch):
    carry_out = run.mover._carry_out

    def all_well(method, ticket, slots, blocks, fails):
        if fails and method == run.mover.real.store:
            method(ticket, slots, run.side._cache.blocks(array("I", [0] * len(blocks))))
            return
        carry_out(method, ticket, slots, blocks, fails)

    monkeypatch.setattr(run.mover, "_carry_out", all_well)


def stores_upon_a_failed_load(run, monkeypatch):
    """A load fails unnoticed, and what was computed from it is stored: reading back must find it wrong."""
    monkeypatch.setattr(run.connector, "get_block_ids_with_load_errors", set)
    monkeypatch.setattr(run.worker, "_check", lambda *_: None)
    monkeypatch.setattr(
        run.worker, "_write", lambda table, start, end, _: _write_from_what_is_there(run, table, start, end)
    )


def _write_from_what_is_there(run, table, start, end):
    """As a model does: what is written follows from what is read; here, from the one position before."""
    before, (first, *_) = 0, run.worker.views
    if start > 0:
        block, offset = divmod(start - 1, harness.BLOCK)
        before = int(first[table[block], offset].reshape(-1)[0] ^ harness.SALTS[0][0]) & harness.MASK
    name = next(name for name, other in run.worker.tables.items() if other is table)
    chain = harness.chain_of(run.requests[name].request.all_token_ids[start:end], before)
    for layer, view in enumerate(run.worker.views):
        for at, words in enumerate(harness.words_of(chain, layer), start):
            block, offset = divmod(at, harness.BLOCK)
            view[table[block], offset] = words.reshape(view.shape[2:])


PLANTED = {
    "appends_on_resume": (appends_on_resume, "sync"),
    "promises_a_block_too_many": (promises_a_block_too_many, "sync"),
    "stores_before_full": (stores_before_full, "sync"),
    "loads_without_the_barrier": (loads_without_the_barrier, "sync"),
    "fences_after_the_write": (fences_after_the_write, "sync"),
    "takes_errors_for_successes": (takes_errors_for_successes, "async"),
    "publishes_failed_stores": (publishes_failed_stores, "async"),
    "stores_upon_a_failed_load": (stores_upon_a_failed_load, "async"),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("defect", PLANTED)
def test_a_planted_defect_is_noticed(config, model_folder, monkeypatch, defect):
    plant, mode = PLANTED[defect]
    logging.disable(logging.CRITICAL)
    for seed in range(20):
        run = Run(model_folder, Options(seed, **MODES[mode]), config)
        with monkeypatch.context() as patch:
            plant(run, patch)
            try:
                run.go()
            except Wrong as error:
                print(f"\n{defect}: seed {seed}: {error}")
                return
    pytest.fail(f"nobody noticed that it {defect.replace('_', ' ')}")
