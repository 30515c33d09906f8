"""Every bad argument: a typed error that names the value and the remedy, and nothing is changed."""

import inspect

import numpy as np
import pytest

import kvortex
from blocks import BLOCK, block_of, blocks_of, key_of, keys_of

KEYS = keys_of(3, "bad input")
DATA = blocks_of(KEYS)


def rows(count, size=BLOCK, dtype=np.uint8):
    return np.zeros((count, size), dtype)


BAD_KEYS = [
    (b"".join(KEYS)[:-1], "95 bytes leave 31 over"),
    ([KEYS[0], KEYS[1][:31], KEYS[2]], r"keys\[1\] has 31 bytes: a key has 32"),
    ([KEYS[0], b"", KEYS[2]], r"keys\[1\] has 0 bytes"),
    ([KEYS[0], KEYS[1] * 2, KEYS[2]], r"keys\[1\] has 64 bytes"),
    ([KEYS[0], "text" * 8, KEYS[2]], r"keys\[1\] is str: a key is 32 bytes"),
    ((KEYS[0], bytearray(32), 3), r"keys\[1\] is bytearray: a key is 32 bytes"),
    ("k" * 96, "keys is str: pass packed bytes"),
    (None, "keys is NoneType"),
    (7, "keys is int"),
    ({KEYS[0]: 1}, "keys is dict"),
    (np.zeros((3, 8), np.float32), "keys is ndarray: pass packed bytes"),
]

BAD_BLOCKS = [
    (rows(2), r"{name} has shape \[2, 5000\] for 3 keys: the leading dimension must be 3"),
    (rows(4), r"{name} has shape \[4, 5000\] for 3 keys"),
    (bytearray(3 * BLOCK), r"{name} has shape \[15000\] for 3 keys"),
    (np.zeros(()), r"{name} has shape \[\] for 3 keys"),
    (list(rows(2)), "{name} has 2 tensors for 3 keys: pass one for each key"),
    ([rows(1)[0], rows(1)[0], rows(1, 4999)[0]], "{name}: bytes of a page: expected 5000, got 4999"),
    ([], "{name} has 0 tensors for 3 keys"),
    ([rows(1), 3, rows(1)], r"{name}\[1\] is int, which has neither __dlpack__ nor the buffer protocol"),
    ("text", "{name} is str, which has neither"),
    (None, "{name} is NoneType, which has neither"),
    ({"a": 1}, "{name} is dict"),
    (rows(3, 0), "{name}: a page must be at least one byte"),
    (kvortex.Segments([rows(3, 2500), rows(2, 2500)]), r"{name}.tensors\[1\] has shape \[2, 2500\] for 3 keys"),
    (kvortex.Segments([rows(3), None]), r"{name}.tensors\[1\] is NoneType"),
    (kvortex.Segments([rows(3, 2500), [rows(1)[0]] * 2]), r"{name}.tensors\[1\] has 2 tensors for 3 keys"),
]

BAD_LAYOUTS = [
    (rows(3, 4999), "5000 bytes, not 4999"),
    (rows(3, BLOCK, np.int16), "5000 bytes, not 10000"),
    (list(rows(3, 1)), "5000 bytes, not 1"),
    (kvortex.Segments([rows(3), rows(3)]), "5000 bytes, not 10000"),
]


def calls(engine, name):
    """What takes blocks, by the name of that argument."""
    return (
        [engine.save_blocks, engine.save_blocks_async]
        if name == "data"
        else [engine.load_blocks, engine.load_blocks_async]
    )


@pytest.fixture
def unchanged(engine):
    """An engine with three blocks, of which a test may change nothing."""
    engine.save_blocks(KEYS, DATA)
    before = engine.get_stats()
    yield engine
    assert engine.get_stats() == before
    assert [bytes(block) for block in engine.load_blocks(KEYS)] == [bytes(row) for row in DATA]


@pytest.mark.parametrize(("keys", "said"), BAD_KEYS)
def test_bad_keys(unchanged, keys, said):
    out = np.zeros_like(DATA)
    for call in (
        lambda: unchanged.save_blocks(keys, DATA),
        lambda: unchanged.load_blocks(keys, out),
        lambda: unchanged.load_blocks(keys),
        lambda: unchanged.check_blocks(keys),
        lambda: unchanged.match_prefix(keys),
        lambda: unchanged.lease_prefix(keys),
        lambda: unchanged.save_blocks_async(keys, DATA),
        lambda: unchanged.load_blocks_async(keys, out),
    ):
        with pytest.raises(kvortex.InvalidArgumentError, match=said):
            call()
    assert not out.any()


@pytest.mark.parametrize("name", ["data", "out"])
@pytest.mark.parametrize(("blocks", "said"), BAD_BLOCKS)
def test_bad_blocks(unchanged, name, blocks, said):
    if name == "out" and blocks is None:
        pytest.skip("no target means blocks in place")
    for call in calls(unchanged, name):
        with pytest.raises(kvortex.InvalidArgumentError, match=said.format(name=name)):
            call(KEYS, blocks)


@pytest.mark.parametrize("name", ["data", "out"])
@pytest.mark.parametrize(("blocks", "said"), BAD_LAYOUTS)
def test_blocks_of_another_size(unchanged, name, blocks, said):
    for call in calls(unchanged, name):
        with pytest.raises(kvortex.LayoutError, match=said):
            call(KEYS, blocks)


def test_targets_that_cannot_be_written(unchanged):
    same = np.zeros(BLOCK, np.uint8)
    for out, said in [
        ([bytes(BLOCK)] * 3, "is read-only: pass memory that can be written"),
        ([same, same, np.zeros(BLOCK, np.uint8)], "target pages 0 and 1 share bytes; pass targets that do not overlap"),
        (list(np.broadcast_to(same, (3, BLOCK))), "read-only"),
    ]:
        for call in calls(unchanged, "out"):
            with pytest.raises(kvortex.InvalidArgumentError, match=said):
                call(KEYS, out)
    assert not same.any()


@pytest.mark.parametrize("ticket", [None, 3, "ticket"])
def test_no_ticket(unchanged, ticket):
    with pytest.raises(TypeError, match="Ticket"):
        unchanged.wait(ticket)


@pytest.mark.parametrize("timeout", [-1, 1.5, "soon", 2**80])
def test_bad_timeouts(unchanged, timeout):
    ticket = unchanged.load_blocks_async([], [])
    for call in (lambda: unchanged.wait(ticket, timeout), lambda: unchanged.shutdown(timeout)):
        with pytest.raises(kvortex.InvalidArgumentError, match=r"timeout_ms is .*: give a whole number"):
            call()
    assert not unchanged.closed


@pytest.mark.parametrize("size", [-1, 0, 1.5, "4KiB", 2**80, None])
def test_bad_block_sizes(make_engine, size):
    engine = make_engine("1MiB")
    with pytest.raises(kvortex.InvalidArgumentError):
        engine.bind(size)
    assert engine.block_size_bytes is None


def test_one_block_larger_than_the_pool(make_engine):
    engine = make_engine("1MiB")
    for call in (
        lambda: engine.save_blocks(KEYS[:1], np.zeros((1, 2 << 20), np.uint8)),
        lambda: engine.bind(2 << 20),
        lambda: engine.bind(2**63),
        lambda: engine.bind(2**64 - 1),
    ):
        with pytest.raises(kvortex.ConfigError, match=r"cpu_pool_size_bytes cannot be 1048576: .*enlarge the pool"):
            call()
    assert engine.block_size_bytes is None
    engine.save_blocks(KEYS, DATA)


@pytest.mark.parametrize(
    ("knobs", "error", "said"),
    [
        ({"cpu_pool_size": 1}, kvortex.ConfigError, "nearest known one is cpu_pool_size_bytes"),
        ({"cpu_pool_size_bytes": 0}, kvortex.ConfigError, "cpu_pool_size_bytes"),
        ({"cpu_pool_size_bytes": "much"}, kvortex.ConfigError, "much"),
        ({"eviction_watermark": 1.1}, kvortex.ConfigError, "eviction_watermark"),
        ({"num_transfer_streams": 0}, kvortex.ConfigError, "num_transfer_streams"),
        ({"cpu_pool_size_bytes": "1MiB", "block_size_bytes": "2MiB"}, kvortex.ConfigError, "enlarge the pool"),
        ({"cpu_pool_size_bytes": 2**63 - 1}, kvortex.CapacityError, "asked for, but only"),
        ({"cpu_pool_size_bytes": 1 << 46}, kvortex.CapacityError, "bytes of host memory asked for, but only"),
        ({"cpu_pool_size_bytes": "1MiB", "numa_node": 999}, kvortex.ConfigError, "NUMA node 999 does not exist"),
    ],
)
def test_bad_settings(knobs, error, said):
    with pytest.raises(error, match=said):
        kvortex.KVortexEngine.create({}, **knobs)


def test_no_configuration():
    for config in (3, "text", [1]):
        with pytest.raises(kvortex.ConfigError, match="give a KVortexConfig, a mapping, or None"):
            kvortex.KVortexEngine.create(config)


def test_a_closed_engine(engine):
    engine.save_blocks(KEYS, DATA)
    assert engine.shutdown()
    out = np.zeros_like(DATA)
    for call in (
        lambda: engine.save_blocks(KEYS, DATA),
        lambda: engine.load_blocks(KEYS, out),
        lambda: engine.load_blocks(KEYS),
        lambda: engine.check_blocks(KEYS),
        lambda: engine.match_prefix(KEYS),
        lambda: engine.lease_prefix(KEYS),
        lambda: engine.save_blocks_async(KEYS, DATA),
        lambda: engine.load_blocks_async(KEYS, out),
        lambda: engine.save_blocks([], []),
        lambda: engine.bind(BLOCK),
        lambda: engine.reset(),
    ):
        with pytest.raises(kvortex.ClosedError, match="shut down: create a new one"):
            call()
    assert not out.any()
    assert engine.block_size_bytes is engine.capacity_blocks is None


def test_segments_of_nothing():
    with pytest.raises(kvortex.InvalidArgumentError, match=r"Segments\(\[\]\) has no bytes"):
        kvortex.Segments([])
    with pytest.raises(kvortex.InvalidArgumentError, match="takes a list of tensors, not ndarray"):
        kvortex.Segments(rows(3))


def test_a_failed_first_save_binds_nothing(engine):
    for blocks in (rows(2), [rows(1), 3, rows(1)], rows(3, 0)):
        with pytest.raises(kvortex.InvalidArgumentError):
            engine.save_blocks(KEYS, blocks)
    assert engine.block_size_bytes is None
    engine.save_blocks(KEYS, DATA)
    assert engine.block_size_bytes == BLOCK


def test_every_error_is_one_of_ours():
    kinds = [kind for _, kind in inspect.getmembers(kvortex, inspect.isclass) if issubclass(kind, BaseException)]
    assert len(kinds) == 16
    assert all(issubclass(kind, kvortex.KVortexError) for kind in kinds)
    assert all(kind.__module__ == "kvortex" and kind.__doc__ for kind in kinds)
    assert issubclass(kvortex.KVortexError, Exception)
    for kind in (kvortex.PoolExhaustedError, kvortex.ForeignPointerError, kvortex.DoubleFreeError):
        assert issubclass(kind, kvortex.PoolError)


def test_one_key_twice_in_a_call(engine):
    """Not an error: the second is there already, or being written by the same call."""
    key = key_of("twice")
    report = engine.save_blocks([key, key], np.stack([block_of(key)] * 2))
    assert report.blocks + report.present == 2
    out = np.zeros((2, BLOCK), np.uint8)
    assert engine.load_blocks([key, key], out).mask.all()
    assert (out == block_of(key)).all()
