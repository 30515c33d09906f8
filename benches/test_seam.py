"""The engine through Python, beside numpy doing the same: `.ci/dev bench`, or `pytest --benchmark-enable benches`."""

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import kvortex

PROMPT_TOKENS = 131_072
PROMPT_BLOCKS = PROMPT_TOKENS // 16
NAMESPACE = kvortex.Namespace(model="bench")


def tokens(seed: int) -> np.ndarray:
    return ((np.arange(PROMPT_TOKENS, dtype=np.uint32) * np.uint32(2_654_435_761) + np.uint32(seed)) % 128_000).astype(
        np.uint32
    )


@pytest.fixture(scope="module", params=[100_000, 1_000_000], ids="{:,} resident".format)
def resident(request: pytest.FixtureRequest) -> Iterator[tuple[kvortex.KVortexEngine, Callable[[], bytes]]]:
    """An engine that holds many prompts, and the keys of another one of them at each call."""
    prompts = request.param // PROMPT_BLOCKS
    with kvortex.KVortexEngine.create(
        cpu_pool_size_bytes="5GiB", block_size_bytes=64, eviction_watermark=1.0
    ) as engine:
        keys = [kvortex.hash_tokens(NAMESPACE, tokens(seed)) for seed in range(prompts)]
        kv = np.zeros((PROMPT_BLOCKS, 64), np.uint8)
        for prompt in keys:
            assert engine.save_blocks(prompt, kv).blocks == PROMPT_BLOCKS
        turns = itertools.cycle(keys)
        yield engine, lambda: next(turns)


def test_keys_of_a_prompt(benchmark):
    prompt = tokens(0)
    keys = benchmark(kvortex.hash_tokens, NAMESPACE, prompt)
    assert len(keys) == PROMPT_BLOCKS * 32


def test_longest_prefix(benchmark, resident):
    engine, turn = resident
    assert benchmark(lambda: engine.match_prefix(turn())) == PROMPT_BLOCKS


def test_longest_prefix_leased_and_returned(benchmark, resident):
    engine, turn = resident

    def lease() -> int:
        with engine.lease_prefix(turn()) as leased:
            return len(leased)

    assert benchmark(lease) == PROMPT_BLOCKS


def test_which_blocks_are_there(benchmark, resident):
    engine, turn = resident
    assert benchmark(lambda: engine.check_blocks(turn())).all()


def test_a_miss(benchmark, resident):
    engine, _ = resident
    unknown = kvortex.hash_tokens(NAMESPACE, tokens(1_000_000))
    assert benchmark(engine.match_prefix, unknown) == 0


BLOCKS = 1000
KEYS = kvortex.hash_tokens(NAMESPACE, tokens(7)[: 16 * BLOCKS])


@pytest.fixture(scope="module")
def kv() -> np.ndarray:
    """A thousand blocks of 1 MiB."""
    return np.random.default_rng(0).integers(0, 255, (BLOCKS, 1 << 20), np.uint8)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[kvortex.KVortexEngine]:
    """As many copying threads as numpy has."""
    settings = {"cpu_pool_size_bytes": "1010MiB", "eviction_watermark": 1.0, "num_transfer_streams": 1}
    with kvortex.KVortexEngine.create(settings) as engine:
        yield engine


def test_thousand_blocks_by_numpy(benchmark, kv):
    target = np.ones_like(kv)

    def copy() -> None:
        for mine, theirs in zip(target, kv, strict=True):
            np.copyto(mine, theirs)

    benchmark(copy)


def test_thousand_blocks_saved(benchmark, one_thread, kv):
    setup = lambda: one_thread.reset() and None  # noqa: E731 - nothing to name
    report = benchmark.pedantic(one_thread.save_blocks, (KEYS, kv), setup=setup, rounds=5)
    assert report.blocks == BLOCKS


def test_thousand_blocks_loaded(benchmark, one_thread, kv):
    one_thread.save_blocks(KEYS, kv)
    target = np.ones_like(kv)
    assert benchmark(one_thread.load_blocks, KEYS, target).mask.all()


def test_thousand_blocks_lent(benchmark, one_thread, kv):
    one_thread.save_blocks(KEYS, kv)
    assert None not in benchmark(one_thread.load_blocks, KEYS)


@pytest.mark.parametrize("statement", ["pass", "import kvortex"])
def test_start(benchmark, statement):
    """Python's own start, and with kvortex imported."""
    benchmark(subprocess.run, [sys.executable, "-c", statement], check=True)
