"""Blocks of an engine's paged memory: every layout and type, by block id and by slot mapping, byte for byte."""

import array
import gc
import time
import weakref

import numpy as np
import pytest

import kvortex
from blocks import keys_of

LAYERS, BLOCKS, TOKENS, HEADS, SIZE = 3, 23, 16, 2, 8
# Shape of one tensor, how many of them, and the dimension of blocks.
LAYOUTS = {
    "a tensor per layer, K and V outside blocks": ((2, BLOCKS, TOKENS, HEADS, SIZE), LAYERS, 1),
    "a tensor per layer, K and V inside blocks": ((BLOCKS, 2, TOKENS, HEADS, SIZE), LAYERS, 0),
    "K and V apart": ((BLOCKS, TOKENS, HEADS, SIZE), 2 * LAYERS, 0),
    "all layers in each block": ((BLOCKS, LAYERS, 2, TOKENS, HEADS, SIZE), 1, 0),
    "the original's": ((2, LAYERS, BLOCKS, TOKENS, HEADS, SIZE), 1, 2),
    "blocks innermost": ((TOKENS, HEADS, BLOCKS), 2, -1),
}
DTYPES = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
PICKED = [17, 3, 22, 0, 9, 10, 11, 4]


def tensors_of(torch, layout, dtype):
    """Random bytes in one layout."""
    shape, count, dim = LAYOUTS[layout]
    torch.manual_seed(count)
    kind = getattr(torch, dtype)
    size = int(np.prod(shape)) * kind.itemsize
    return [torch.randint(0, 256, (size,), dtype=torch.uint8).view(kind).reshape(shape) for _ in range(count)], dim


def block_bytes(torch, tensors, dim, block):
    """What a block is, by torch's own indexing."""
    parts = (tensor.select(dim, block).contiguous().flatten().view(torch.uint8) for tensor in tensors)
    return b"".join(bytes(part.numpy()) for part in parts)


def slots_of(ids, tokens=TOKENS):
    return [block * tokens + offset for block in ids for offset in range(tokens)]


def moved(engine, torch, layout, dtype, pick):
    """Saves blocks from one cache, loads them into others of a second one, and compares all bytes of both."""
    (source, dim), (target, _) = tensors_of(torch, layout, dtype), tensors_of(torch, layout, dtype)
    before = [block_bytes(torch, source, dim, block) for block in range(BLOCKS)]
    for tensor in target:
        tensor.view(torch.uint8).fill_(77)
    keys, into = keys_of(len(PICKED), layout, dtype), [(block + 1) % BLOCKS for block in PICKED]
    report = engine.save_blocks(keys, pick(kvortex.PagedCache(source, block_dim=dim), PICKED))
    assert (report.blocks, report.bytes) == (len(PICKED), len(PICKED) * len(before[0]))
    assert [bytes(block) for block in engine.load_blocks(keys)] == [before[block] for block in PICKED]
    assert engine.load_blocks(keys, pick(kvortex.PagedCache(target, block_dim=dim), into)).mask.all()
    expected = {there: before[here] for here, there in zip(PICKED, into, strict=True)}
    for block in range(BLOCKS):
        assert block_bytes(torch, source, dim, block) == before[block]
        assert block_bytes(torch, target, dim, block) == expected.get(block, bytes([77]) * len(before[0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_by_block_id(engine, torch, layout, dtype):
    moved(engine, torch, layout, dtype, lambda cache, ids: cache.blocks(ids))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_by_slot_mapping(engine, torch, layout, dtype):
    moved(engine, torch, layout, dtype, lambda cache, ids: cache.slots(torch.tensor(slots_of(ids))))


def small():
    """A cache of 40 blocks of 6 bytes."""
    memory = np.arange(240, dtype=np.uint8).reshape(40, 6)
    return memory, kvortex.PagedCache(memory)


@pytest.mark.parametrize(
    "form",
    [list, tuple, lambda ids: np.array(ids, np.int64), lambda ids: np.array(ids, np.int32),
     lambda ids: np.array(ids, np.uint64), lambda ids: np.repeat(np.array(ids, np.int16), 3)[::3],
     lambda ids: array.array("q", ids)],
    ids=["list", "tuple", "int64", "int32", "uint64", "strided", "array"],
)  # fmt: skip
def test_every_form_of_numbers(engine, form):
    memory, cache = small()
    picked = cache.blocks(form([7, 39, 0]))
    assert (len(picked), picked.block_ids) == (3, [7, 39, 0])
    engine.save_blocks(keys_of(3), picked)
    assert [bytes(block) for block in engine.load_blocks(keys_of(3))] == [bytes(memory[i]) for i in (7, 39, 0)]
    assert cache.slots(form(slots_of([5, 6, 1], 4)), 4).block_ids == [5, 6, 1]
    assert cache.slots(form([]), block_tokens=4).block_ids == []


def test_torch_numbers_and_no_numbers(engine, torch):
    _, cache = small()
    for kind in (torch.int32, torch.int64):
        assert cache.blocks(torch.tensor([3, 1], dtype=kind)).block_ids == [3, 1]
    assert engine.save_blocks([], cache.blocks([])).blocks == 0
    assert (cache.num_blocks, cache.block_size_bytes) == (40, 6)
    assert repr(cache) == "<kvortex.PagedCache of 40 blocks of 6 bytes in 1 tensors>"


def test_later_and_beside_each_other(engine):
    memory, cache = small()
    ticket = engine.save_blocks_async(keys_of(40), cache.blocks(list(range(40))))
    assert engine.wait(ticket).mask.all()
    copy = memory.copy()
    memory[:] = 0
    assert engine.wait(engine.load_blocks_async(keys_of(20), cache.blocks(np.arange(20)))).mask.all()
    assert (memory[:20] == copy[:20]).all()
    assert not memory[20:].any()


def test_the_tensors_live_as_long_as_the_cache():
    class Watched(np.ndarray):
        pass

    memory = np.zeros((4, 6), np.uint8).view(Watched)
    alive, cache = weakref.ref(memory), kvortex.PagedCache([memory])
    del memory
    picked = cache.blocks([1])
    del cache
    assert alive() is not None
    del picked
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([3, 40], "block 40, number 1 of the call, does not exist: the cache has 40 blocks"),
        ([3, -1], r"block_ids\[1\] is -1: a block id is a whole number from 0 to 4294967295"),
        ([1.5], r"block_ids\[0\] is 1.5"),
        (np.array([2**40]), r"block_ids\[0\] is 1099511627776"),
        (np.zeros(3), "block_ids is ndarray of no integer type"),
        (np.zeros((2, 2), int), r"block_ids has shape \[2, 2\]"),
        (7, "block_ids is int"),
        (None, "block_ids is NoneType"),
    ],
)
def test_bad_block_ids(ids, said):
    with pytest.raises(kvortex.InvalidArgumentError, match=said):
        small()[1].blocks(ids)


@pytest.mark.parametrize(
    ("slots", "said"),
    [
        (
            [0, 1, 2],
            r"slot_mapping has 3 slots, no multiple of block_tokens \(4\): pass the slots of whole blocks in order",
        ),
        ([0, 1, 2, 3, 5, 6, 7, 8], r"slot_mapping\[4\] is 5, no multiple of block_tokens \(4\)"),
        ([8, 9, 11, 10], r"slot_mapping\[2\] is 11, not 10"),
        ([8, 9, 10, -1], r"slot_mapping\[3\] is -1: a slot is a whole number"),
        ([4, 5, 6, 7, 160, 161, 162, 163], "block 40, number 1 of the call, does not exist"),
    ],
)
def test_bad_slots(slots, said):
    with pytest.raises(kvortex.InvalidArgumentError, match=said):
        small()[1].slots(np.array(slots), block_tokens=4)
    with pytest.raises(kvortex.InvalidArgumentError, match="block_tokens is 0"):
        small()[1].slots([], block_tokens=0)


@pytest.mark.parametrize(
    ("tensors", "dim", "said"),
    [
        ([], 0, r"PagedCache\(\[\]\) has no bytes"),
        ([3], 0, r"tensors\[0\] is int, which has neither"),
        (np.zeros((4, 2)), 2, r"block_dim is 2, and tensors\[0\] has shape \[4, 2\]"),
        (np.zeros((4, 2)), -3, "block_dim is -3"),
        (np.zeros((4, 2)), "x", "block_dim is 'x': give the number of a dimension"),
        (np.zeros(()), 0, "block_dim is 0"),
        (np.zeros((4, 0)), 0, r"tensors\[0\] has no bytes in a block"),
        ([np.zeros((4, 2)), np.zeros((5, 2))], 0, r"tensors\[1\] has 5 blocks where tensors\[0\] has 4"),
    ],
)
def test_bad_caches(tensors, dim, said):
    with pytest.raises(kvortex.InvalidArgumentError, match=said):
        kvortex.PagedCache(tensors, block_dim=dim)


def test_what_blocks_cannot_be(engine):
    memory, cache = small()
    with pytest.raises(
        kvortex.InvalidArgumentError, match="data has 2 blocks for 3 keys: give one block id for each key"
    ):
        engine.save_blocks(keys_of(3), cache.blocks([1, 2]))
    engine.save_blocks(keys_of(3), cache.blocks([1, 1, 2]))  # a block may be read twice
    for call in (engine.load_blocks, engine.load_blocks_async):
        with pytest.raises(kvortex.InvalidArgumentError, match="target pages 0 and 2 share bytes"):
            call(keys_of(3), cache.blocks([1, 2, 1]))
    memory.setflags(write=False)
    with pytest.raises(kvortex.InvalidArgumentError, match=r"out: tensors\[0\] is read-only"):
        engine.load_blocks(keys_of(1), kvortex.PagedCache([memory]).blocks([1]))


def test_raw_tensors(engine):
    memory = np.arange(480, dtype=np.int16).reshape(2, 40, 6)
    raw = kvortex.RawTensor(memory.ctypes.data, memory.shape, (240, 6, 1), 2, device="cpu", owner=memory)
    assert (raw.ptr, raw.itemsize) == (memory.ctypes.data, 2)
    engine.save_blocks(keys_of(2), kvortex.PagedCache([raw], block_dim=1).blocks([30, 2]))
    assert bytes(engine.load_blocks(keys_of(2))[0]) == memory[:, 30].tobytes()
    out = np.zeros((2, 2, 6), np.int16)
    flat = kvortex.RawTensor(out.ctypes.data, [2, 12], itemsize=2, owner=out)
    assert engine.load_blocks(keys_of(2), flat).mask.all()
    assert (out == memory[:, [30, 2]].transpose(1, 0, 2)).all()
    unwritable = kvortex.RawTensor(out.ctypes.data, [2, 12], None, 2, owner=out, writable=False)
    with pytest.raises(kvortex.InvalidArgumentError, match="out is read-only"):
        engine.load_blocks(keys_of(2), unwritable)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"shape": (2, 3), "strides": (3,)}, r"strides \[3\] do not go with shape \[2, 3\]"),
        ({"shape": 3}, "shape is 3: give a list"),
        ({"shape": (-1,)}, r"shape is \(-1,\)"),
        ({"ptr": -1}, "ptr is -1"),
        ({"itemsize": 0}, "itemsize is 0"),
        ({"device": "tpu:0"}, 'device is "tpu:0": give "cpu" or "cuda:0"'),
        ({"device": "cuda:x"}, 'device is "cuda:x"'),
    ],
)
def test_bad_raw_tensors(words, said):
    with pytest.raises(kvortex.InvalidArgumentError, match=said):
        kvortex.RawTensor(**{"ptr": 4096, "shape": (4,), **words})


def test_raw_tensors_that_cannot_be_there(engine):
    for raw, said in [
        (kvortex.RawTensor(0, (1, 4)), "no memory"),
        (kvortex.RawTensor(4096, (1, 2**62), itemsize=8), "beyond any address"),
        (kvortex.RawTensor(4096, (1, 2), (1, 2**62), 8), "beyond any address"),
    ]:
        with pytest.raises(kvortex.InvalidArgumentError, match=said):
            engine.save_blocks(keys_of(1), raw)


def test_thousands_of_blocks_are_one_quick_call(make_engine):
    engine = make_engine("64MiB")
    memory = np.zeros((2, 8, 9000, 64), np.uint8)
    memory[:] = np.arange(9000).astype(np.uint8)[:, None]
    cache, ids = kvortex.PagedCache(list(memory.reshape(16, 9000, 64)), block_dim=0), np.arange(8999, 999, -1)
    times = []
    for _ in range(5):  # the quickest counts, since other work may take the processor meanwhile
        start = time.perf_counter()
        picked = cache.blocks(ids)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.1
    engine.save_blocks(keys_of(8000), picked)
    back = np.zeros((8000, 1024), np.uint8)
    assert engine.load_blocks(keys_of(8000), back).mask.all()
    assert (back == ids.astype(np.uint8)[:, None]).all()
