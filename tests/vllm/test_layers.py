"""Which hooks of layers a load may count on."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvortex.vllm.layers import LEAST_PART_BYTES, MOST_PART_BYTES, LayerHooks

NAMES = ["a", "b", "c", "drafter"]


class Parts:
    """Remembers which parts were awaited."""

    def __init__(self):
        self.held = []

    def hold(self, index):
        self.held.append(index)


def context(mode="PIECEWISE", metadata=()):
    return SimpleNamespace(cudagraph_runtime_mode=SimpleNamespace(name=mode), attn_metadata=metadata)


def taught(seen=("a", "b", "c")):
    """Hooks that have seen a step with a load that was awaited as a whole."""
    hooks = LayerHooks({name: index for index, name in enumerate(NAMES)}, [10, 20, 30, 40])
    assert not hooks.may_split(context())
    for name in seen:
        hooks.computes(name)
    hooks.end()
    return hooks


def test_parts_end_where_their_layers_end():
    hooks = taught()
    assert hooks.ends([1, 2, 3, 4]) == [10, 30, 60, 100]
    assert hooks.ends([3, 4]) == [60, 100]
    assert hooks.ends([4]) == [100]


def test_small_loads_have_few_parts_and_the_first_and_the_last_are_the_smallest():
    hooks = LayerHooks({str(index): index for index in range(32)}, [64 << 10] * 32)
    assert [hooks.parts(blocks) for blocks in (1, 2, 16, 64)] == [
        [32],
        [32],
        [4, 12, 22, 27, 32],
        [1, 3, 7, 15, 23, 28, 30, 31, 32],
    ]
    assert hooks.parts(128) == [1, 2, 4, 8, 12, 16, 20, 24, 28, 30, 31, 32]
    assert hooks.parts(512) == hooks.parts(2000) == list(range(1, 33))


@given(st.lists(st.integers(1 << 10, 3 << 20), min_size=1, max_size=60), st.integers(1, 3000))
def test_parts_are_neither_small_nor_much_larger_than_they_must_be(layer_bytes, blocks):
    hooks = LayerHooks({str(index): index for index in range(len(layer_bytes))}, layer_bytes)
    parts = hooks.parts(blocks)
    assert parts == sorted(set(parts))
    assert parts[-1] == len(layer_bytes)
    sizes = [blocks * (end - start) for start, end in pairwise([0, *hooks.ends(parts)])]
    largest = blocks * max(layer_bytes)
    if len(sizes) > 1:
        assert min(sizes) >= LEAST_PART_BYTES
    assert all(size < MOST_PART_BYTES + largest for size in sizes[:-1])
    assert sizes[-1] < 2 * (LEAST_PART_BYTES + largest)


def test_each_layer_waits_for_its_own_part_once():
    hooks, parts = taught(), [Parts(), Parts()]
    assert hooks.may_split(context("NONE"))
    for one in parts:
        hooks.split(one, [1, 2, 3, 4])
    assert [one.held for one in parts] == [[3], [3]], "what had no hook is awaited up front"
    for name in ("a", "b", "unknown", "b", "c"):
        hooks.computes(name)
    hooks.end()
    assert [one.held for one in parts] == [[3, 0, 1, 2]] * 2


def test_layers_of_one_part_wait_once():
    hooks, parts = taught(), Parts()
    assert hooks.may_split(context())
    hooks.split(parts, [2, 4])
    for name in ("b", "a", "c"):
        hooks.computes(name)
    assert parts.held == [1, 0]


@pytest.mark.parametrize("other", [context("FULL"), context(metadata=None), SimpleNamespace(attn_metadata={}), None])
def test_without_hooks_to_come_nothing_is_split(other):
    hooks = taught()
    assert not hooks.may_split(other)
    assert hooks.may_split(context())


def test_a_step_in_a_graph_teaches_nothing():
    hooks = LayerHooks({"a": 0, "b": 1}, [1, 1])
    for other in (context("FULL"), context(metadata=None)):
        assert not hooks.may_split(other)
        hooks.computes("a")
        hooks.computes("b")
        hooks.end()
    assert not hooks.may_split(context())


def test_one_hook_is_no_reason_to_split():
    assert not taught(seen=["b"]).may_split(context())


def test_a_hook_that_is_left_out_fails_the_step():
    hooks = taught()
    assert hooks.may_split(context())
    hooks.split(Parts(), [1, 2, 3, 4])
    hooks.computes("a")
    hooks.computes("c")
    with pytest.raises(RuntimeError, match=r"layers \['b'\] without calling their hooks"):
        hooks.end()


def test_what_a_layer_without_a_hook_shares_is_awaited_up_front():
    """As layers of several groups do: one that nobody hears of may be computed before the other."""
    order = {"a": 0, "b": 1, "c": 2, "other a": 0, "other b": 1}
    hooks, parts = LayerHooks(order, [10, 20, 30]), Parts()
    assert not hooks.may_split(context())
    for name in ("a", "other a", "b", "c"):
        hooks.computes(name)
    hooks.end()
    assert hooks.may_split(context())
    hooks.split(parts, [1, 2, 3])
    assert parts.held == [1]
    for name in ("other a", "a", "b", "c"):
        hooks.computes(name)
    assert parts.held == [1, 0, 2]
    hooks.end()


def test_a_step_that_loads_nothing_may_leave_hooks_out():
    hooks = taught()
    hooks.computes("a")
    hooks.end()
    assert hooks.may_split(context())
