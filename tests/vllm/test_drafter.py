"""Blocks are stored when a drafter, which may compute after other hooks or after all, has written its part of them."""

from array import array
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import OLD
from kvortex.vllm import connector as connectors
from kvortex.vllm.metadata import KVortexMetadata, Load, Store
from kvortex.vllm.worker import Drafter, WorkerSide
from test_engine import ONE_PROCESS, run_file


class Said:
    """A mover that notes what it is told."""

    stores = True

    def __init__(self):
        self.notes = []

    def store(self, ticket, slots, blocks):
        self.notes.append(f"store {ticket}")

    def load(self, ticket, slots, blocks):
        self.notes.append(f"load {ticket}")

    def fence(self, blocks):
        self.notes.append("fence")

    def ended_loads(self):
        return []

    ended_later = ended_stores = ended_loads

    def shutdown(self):
        self.notes.append("shutdown")


def step(ticket, *loads):
    return KVortexMetadata(array("I", [1]), list(loads), Store(ticket, bytes(4), array("I", [1])))


def hooks(drafter, *, saves_after_drafting):
    """Two steps of a model runner, of which the second loads; what the mover was told, and when tokens were drafted."""
    mover = Said()
    cache = SimpleNamespace(block_size_bytes=1, blocks=lambda blocks: blocks)
    side = WorkerSide(mover, cache, drafter=drafter)
    for plans in (step(1), step(2, Load(3, "a", False, bytes(4), array("I", [1])))):
        side.begin(plans)
        side.fence()
        side.load()
        if not saves_after_drafting:
            side.store()
        side.end()
        side.finished()
        mover.notes.append("draft")
        if saves_after_drafting:
            side.store()
    side.shutdown()
    return mover.notes


def test_without_a_drafter_blocks_are_stored_after_the_pass():
    expected = ["fence", "store 1", "draft", "fence", "load 3", "store 2", "draft", "shutdown"]
    assert hooks(Drafter.NONE, saves_after_drafting=False) == expected


def test_what_is_drafted_before_saving_is_stored_then():
    expected = ["fence", "draft", "store 1", "fence", "load 3", "draft", "store 2", "shutdown"]
    assert hooks(Drafter.BEFORE_SAVING, saves_after_drafting=True) == expected


@pytest.mark.parametrize("saves_after_drafting", [False, True])
def test_what_is_drafted_after_all_hooks_is_stored_before_the_next_step_writes(saves_after_drafting):
    expected = ["fence", "draft", "store 1", "fence", "load 3", "draft", "store 2", "shutdown"]
    assert hooks(Drafter.AFTER_HOOKS, saves_after_drafting=saves_after_drafting) == expected


def test_which_hook_comes_last_is_known_of_each_vllm():
    drafts = SimpleNamespace(speculative_config=SimpleNamespace(method="eagle"))
    assert connectors._drafter(drafts, (0, 32, 0)) is Drafter.BEFORE_SAVING
    assert connectors._drafter(drafts, (0, 25, 1)) is Drafter.AFTER_HOOKS
    assert connectors._drafter(SimpleNamespace(speculative_config=None), (0, 15, 1)) is Drafter.NONE


@pytest.mark.skipif(OLD, reason="on the CPU this vLLM has no drafter with layers of its own")
@pytest.mark.timeout(400)
def test_what_is_drafted_after_a_hit_is_as_good_as_before(weights_folder):
    found, _ = run_file(Path(__file__).parent / "draft_run.py", weights_folder, {}, ONE_PROCESS)
    cold, hit = found["cold"], found["hit"]
    assert (cold["cached"], hit["cached"]) == (0, 576)
    assert hit["tokens"] == cold["tokens"]
    assert hit["accepted"] == cold["accepted"] > 12
