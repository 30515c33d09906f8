"""Random schedules with a disk below: whatever was kept, spoiled or lost there, no position is ever read wrong."""

import logging
from collections import Counter

import disk_files
import harness
import pytest
from disk_harness import DiskOptions, DiskRun, LatePromotion
from harness import FITTING, NEW, Wrong
from test_harness import LOSSES, ORDERS_OF_GROUPS, SEEDS

from kvortex.vllm import disk as disks

MODES = {"sync": {"load_mode": "sync"}, "async": {"load_mode": "async", **LOSSES}}
LIVES = max(2, SEEDS // 5)
SHAPES_OF_LATE = ["one group", "one window", "uneven"] if NEW else ["one group"]


@pytest.fixture(scope="module")
def config(model_folder):
    logging.disable(logging.WARNING)
    return harness.vllm_config(model_folder, DiskOptions(0))


def live(model_folder, config, folder, options):
    """One life; what the schedule did, and what the disk did."""
    logging.disable(logging.CRITICAL)
    run = DiskRun(model_folder, options, config, folder)
    try:
        counts = run.go()
    finally:
        run.end()
    return counts, run.disk


def add(totals, counts, disk):
    found = {
        "requests": counts.requests,
        "finished": counts.finished,
        "checked": counts.checked,
        "resets": counts.resets,
        "hit_tokens": counts.hit_tokens,
        "disk_hit_tokens": disk["disk_hit_tokens"],
        "promoted": disk["disk"]["promoted_blocks"] if disk["disk"] else 0,
        "corrupt": disk["disk"]["corrupt"] if disk["disk"] else 0,
        "declined": disk["promotions"]["declined"],
    }
    return {name: totals.get(name, 0) + number for name, number in found.items()}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", FITTING)
def test_no_position_is_ever_wrong_with_a_disk(config, model_folder, tmp_path, order, mode, record_property):
    totals = {}
    for seed in range(LIVES):
        for life in range(2):
            options = DiskOptions(seed, order=order, life=life, keeps_disk=bool(seed % 2), steps=200, **MODES[mode])
            totals = add(totals, *live(model_folder, config, tmp_path / str(seed), options))
    record_property("totals", str(totals))
    print(f"\n{order} {mode}: {totals}")
    assert totals["finished"] == totals["requests"]
    assert totals["disk_hit_tokens"] > 100 * LIVES
    assert totals["promoted"] > 10 * LIVES
    assert totals["declined"] > LIVES
    assert totals["resets"] > LIVES
    assert totals["corrupt"] == 0


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", FITTING)
def test_no_position_is_ever_wrong_when_the_disk_is_late(config, model_folder, tmp_path, order, mode, record_property):
    totals = Counter()
    for seed in range(LIVES):
        for life in range(2):
            shape = SHAPES_OF_LATE[seed % len(SHAPES_OF_LATE)] if order in ORDERS_OF_GROUPS else "one group"
            more = {"shape": shape, "keeps_disk": bool(seed % 2), "is_late": True, **MODES[mode]}
            options = DiskOptions(seed, order=order, life=life, steps=200, **more)
            counts, disk = live(model_folder, config, tmp_path / str(seed), options)
            totals.update(add({}, counts, disk) | disk["landed"])
            totals["waited in vain"] += disk["promotions"]["late"]
    record_property("totals", str(totals))
    print(f"\n{order} {mode}: {totals}")
    assert totals["finished"] == totals["requests"]
    assert totals["disk_hit_tokens"] > 50 * LIVES
    assert totals["resets"] > LIVES
    assert totals["waited in vain"] > LIVES
    assert totals["landed"] > totals["landed late"] > LIVES
    assert totals["landed for nobody"] > LIVES


@pytest.mark.skipif(not NEW, reason="with a connector this vLLM has one group")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("shape", ["one window", "five to one", "uneven"])
def test_no_position_inside_a_window_is_ever_wrong_with_a_disk(config, model_folder, tmp_path, shape, record_property):
    totals = {}
    for seed in range(LIVES):
        mode, order = list(MODES)[seed % 2], ORDERS_OF_GROUPS[seed % len(ORDERS_OF_GROUPS)]
        for life in range(2):
            more = {"life": life, "keeps_disk": bool(seed % 3), "steps": 200, "shape": shape, **MODES[mode]}
            totals = add(
                totals, *live(model_folder, config, tmp_path / str(seed), DiskOptions(seed, order=order, **more))
            )
    record_property("totals", str(totals))
    print(f"\n{shape}: {totals}")
    assert totals["finished"] == totals["requests"]
    assert totals["disk_hit_tokens"] > 100 * LIVES
    assert totals["promoted"] > 10 * LIVES
    assert totals["corrupt"] == 0


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("how", disk_files.SPOILED)
def test_no_position_is_ever_wrong_with_spoiled_files(config, model_folder, tmp_path, how, record_property):
    totals = {}
    for seed in range(LIVES):
        folder = tmp_path / str(seed)
        for life in range(3):
            options = DiskOptions(seed, life=life, steps=120)
            totals = add(totals, *live(model_folder, config, folder, options))
            disk_files.SPOILED[how](folder)
    record_property("totals", str(totals))
    print(f"\n{how}: {totals}")
    assert totals["finished"] == totals["requests"]
    # A file that is cut is a shorter file: what lay behind is not looked for.
    assert (totals["corrupt"] > LIVES) == (how != "truncated")


@pytest.mark.timeout(600)
@pytest.mark.skipif(not NEW, reason="a block has the same bytes in both layouts of 0.15.1")
@pytest.mark.parametrize("defect", [False, True])
def test_a_layout_that_is_left_out_of_the_name_is_noticed(config, model_folder, tmp_path, monkeypatch, defect):
    """The next life has the same blocks in another order of their dimensions."""
    if defect:
        monkeypatch.setattr(disks, "seen_layout", lambda *_: b"?" * 32)
    wrong = 0
    for seed in range(LIVES):
        for life, layout in enumerate(("NHD", "HND")):
            options = DiskOptions(seed, life=life, layout=layout, steps=120)
            try:
                live(model_folder, config, tmp_path / str(seed), options)
            except Wrong:
                assert life == 1
                wrong += 1
    assert (wrong > 0) == defect


# Planted defects, which only a disk that is late shows.


def promises_what_was_asked_for(run, monkeypatch):
    """Blocks that were asked for count as there, and what is there is loaded."""
    asked, room, lease, targets = {}, [], run.tables.lease, run.tables.targets
    promote = run.planner.promote

    def note(promotion):
        promote(promotion)
        blocks = next(count for count in range(10_000) if promotion.among(count) == len(promotion))
        asked[promotion.keys[:32]] = blocks

    def more(planner, hashes, first, most):
        hit, leased = lease(planner, hashes, first, most)
        room[:] = [len(leased)]
        return (max(hit, min(most, first + asked.get(hashes[:32], 0))) if len(leased) else hit), leased

    monkeypatch.setattr(run.planner, "promote", note)
    monkeypatch.setattr(run.tables, "lease", more)
    monkeypatch.setattr(run.tables, "targets", lambda *rest: targets(*rest)[: room[0]])


def waits_as_long_as_it_takes(run, monkeypatch):
    monkeypatch.setattr(LatePromotion, "pending", property(lambda promotion: not promotion.has_landed))
    monkeypatch.setattr(run.scheduler.connector._scheduler._disk.promotions, "_held_s", float("inf"))


def holds_blocks_for_ever(run, monkeypatch):
    run.kept = []
    monkeypatch.setattr(LatePromotion, "release", lambda promotion: run.kept.append(promotion))


PLANTED = {
    "promises what was asked for": (promises_what_was_asked_for, "reads wrong KV"),
    "waits as long as it takes": (waits_as_long_as_it_takes, "requests never end"),
    "holds blocks for ever": (holds_blocks_for_ever, "'leased_blocks': "),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("defect", PLANTED)
def test_a_defect_that_shows_when_the_disk_is_late_is_noticed(config, model_folder, tmp_path, monkeypatch, defect):
    plant, message = PLANTED[defect]
    logging.disable(logging.CRITICAL)
    for seed in range(20):
        run = DiskRun(model_folder, DiskOptions(seed, steps=120, is_late=True), config, tmp_path / str(seed))
        with monkeypatch.context() as patch:
            plant(run, patch)
            try:
                run.go()
            except AssertionError as error:
                if message in str(error):
                    return
                raise
            finally:
                run.end()
    pytest.fail(f"nobody noticed that it {defect}")
