"""Memory of a GPU, where no GPU is: producers that say their memory is on one, and engines that refuse it."""

import ctypes
import gc
import sys
import types

import numpy as np
import pytest

import kvortex
from blocks import keys_of
from test_dlpack import CUDA, CUDA_HOST, DlTensor, DlVersioned

REFUSED = r"the memory is in memory of device 2, .*make the engine with device=\"cuda\", or pass memory of the CPU"


# What capsules point to: nobody asks them whether their producer still lives.
KEPT = []


class OnDevice:
    """Says that 3 blocks of 8 bytes in host memory are on device 2. Counts how often its capsules were deleted."""

    def __init__(self, kind=CUDA, ordinal=2, versioned=True, shape=(3, 8)):
        self.device, self.versioned, self.shape = (kind, ordinal), versioned, shape
        self.memory, self.asked, self.made, self.deleted = np.zeros(shape, np.uint8), [], [], 0

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **wishes):
        self.asked.append(wishes)
        if "max_version" in wishes and not self.versioned:
            raise TypeError("unexpected keyword argument")
        sizes = (ctypes.c_int64 * len(self.shape))(*self.shape)
        tensor = DlTensor(data=self.memory.ctypes.data, device=self.device[0], device_id=self.device[1],
                          ndim=len(self.shape), code=1, bits=8, lanes=1, shape=sizes)  # fmt: skip
        managed = DlVersioned(major=1, tensor=tensor) if self.versioned else tensor
        end = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _capsule: setattr(self, "deleted", self.deleted + 1))
        self.made.append((sizes, managed, end))
        KEPT.append(self.made)
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        name = b"dltensor_versioned" if self.versioned else b"dltensor"
        return make(ctypes.addressof(managed), name, ctypes.cast(end, ctypes.c_void_p))


def calls(engine, blocks, **words):
    return (
        lambda: engine.save_blocks(keys_of(3), blocks, **words),
        lambda: engine.load_blocks(keys_of(3), blocks, **words),
        lambda: engine.save_blocks_async(keys_of(3), blocks, **words),
        lambda: engine.load_blocks_async(keys_of(3), blocks, **words),
    )


def raw(shape=(3, 8), device="cuda:2"):
    return kvortex.RawTensor(1 << 40, shape, device=device)


def test_an_engine_without_a_device_refuses_its_memory_and_changes_nothing(engine):
    before = engine.get_stats()
    for made in (OnDevice, raw, lambda: kvortex.Segments([raw()]), lambda: kvortex.PagedCache(raw()).blocks([2, 0, 1]),
                 lambda: kvortex.PagedCache(OnDevice()).blocks([2, 0, 1])):  # fmt: skip
        for stream in (None, 0, 7, types.SimpleNamespace(cuda_stream=9)):
            for call in calls(engine, made(), stream=stream):
                with pytest.raises(kvortex.UnsupportedError, match=REFUSED):
                    call()
    assert engine.get_stats() == before
    assert engine.block_size_bytes is None


def test_a_producer_on_a_device_is_not_waited_for_and_let_go(engine):
    producer = OnDevice()
    with pytest.raises(kvortex.UnsupportedError):
        engine.save_blocks(keys_of(3), producer)
    assert producer.asked == [{"stream": -1, "max_version": (1, 0)}]
    gc.collect()
    assert producer.deleted == 1


def test_an_old_producer_on_a_device(engine):
    producer = OnDevice(versioned=False)
    with pytest.raises(kvortex.UnsupportedError, match=REFUSED):
        engine.save_blocks(keys_of(3), producer)
    assert producer.asked == [{"stream": -1, "max_version": (1, 0)}, {"stream": -1}]
    with pytest.raises(kvortex.InvalidArgumentError, match=r"out is OnDevice whose DLPack, older than 1.0, cannot say"):
        engine.load_blocks(keys_of(3), producer)
    gc.collect()
    assert producer.deleted == len(producer.made) == 2


def test_a_cache_on_a_device_keeps_its_capsules():
    producer = OnDevice()
    cache = kvortex.PagedCache([producer])
    assert (cache.num_blocks, cache.block_size_bytes, producer.deleted) == (3, 8, 0)
    picked = cache.blocks([1])
    del cache
    assert producer.deleted == 0
    del picked
    assert producer.deleted == 1


def test_pinned_memory_is_host_memory(engine):
    producer = OnDevice(kind=CUDA_HOST, ordinal=0)
    assert engine.save_blocks(keys_of(3), producer).blocks == 3
    assert producer.asked == [{"max_version": (1, 0)}]


def test_memory_in_two_places(engine):
    for parts in ([raw(), np.zeros((3, 8), np.uint8)], [raw(), raw(device="cuda:1")]):
        with pytest.raises(kvortex.UnsupportedError, match="pages that are all in one place"):
            kvortex.PagedCache(parts)
        with pytest.raises(kvortex.InvalidArgumentError, match="pages that are all in one place"):
            engine.save_blocks(keys_of(3), kvortex.Segments(parts))


def test_numbers_on_a_device_are_not_read():
    cache = kvortex.PagedCache(np.zeros((3, 8)))
    for read in (cache.blocks, cache.slots, lambda ids: kvortex.hash_tokens(b"", ids)):
        with pytest.raises(kvortex.UnsupportedError, match=r"is in memory of device 2.*pass it with .cpu\(\)"):
            read(OnDevice(shape=(16,)))


@pytest.mark.parametrize("stream", ["7", -1, 2**64, 1.5, types.SimpleNamespace(cuda_stream=None)])
def test_what_is_no_stream(engine, stream):
    for call in calls(engine, raw(), stream=stream):
        with pytest.raises(kvortex.InvalidArgumentError, match="pass the handle of a CUDA stream"):
            call()


def test_host_memory_has_no_stream(engine):
    for call in calls(engine, np.zeros((3, 8)), stream=0):
        with pytest.raises(kvortex.InvalidArgumentError, match="stream is 0, but the blocks are in host memory"):
            call()
    with pytest.raises(kvortex.InvalidArgumentError, match="stream is 7, but the blocks are in host memory"):
        engine.load_blocks(keys_of(3), stream=7)


@pytest.mark.parametrize("used", [True, False])
def test_the_current_stream_of_torch(engine, monkeypatch, used):
    """Asked for the device of the memory, and only where torch uses CUDA already."""
    asked = []

    def current(ordinal):
        asked.append(ordinal)
        return types.SimpleNamespace(cuda_stream=3)

    monkeypatch.setitem(
        sys.modules, "torch.cuda", types.SimpleNamespace(is_initialized=lambda: used, current_stream=current)
    )
    with pytest.raises(kvortex.UnsupportedError, match=REFUSED):
        engine.save_blocks(keys_of(3), raw())
    assert asked == [2] * used


def test_the_order_of_streams_and_parts_are_for_memory_of_a_gpu(engine):
    host = np.zeros((3, 8), np.uint8)
    with pytest.raises(kvortex.InvalidArgumentError, match="the blocks are in host memory: pass stream=None"):
        engine.fence(host, stream=0)
    for blocks in (
        raw(),
        OnDevice(),
        [OnDevice(shape=(8,))],
        kvortex.Segments([raw()]),
        kvortex.PagedCache(raw()).blocks([1]),
    ):
        with pytest.raises(kvortex.UnsupportedError, match=r"memory of device 2"):
            engine.fence(blocks, stream=0)
    with pytest.raises(kvortex.InvalidArgumentError, match="the blocks are in host memory: pass parts=None"):
        engine.load_blocks_async(keys_of(3), host, parts=kvortex.Parts([8]))


def test_parts_end_where_blocks_end_and_belong_to_one_load(engine):
    for ends in ([], [0], [4, 4], [8, 4]):
        with pytest.raises(kvortex.InvalidArgumentError, match="end"):
            kvortex.Parts(ends)
    with pytest.raises(kvortex.InvalidArgumentError, match="ends_bytes is no list"):
        kvortex.Parts("all")
    parts = kvortex.Parts([4, 8])
    assert (len(parts), repr(parts)) == (2, "<kvortex.Parts of 2>")
    with pytest.raises(kvortex.InvalidArgumentError, match="belong to no load yet"):
        parts.hold(0)
    with pytest.raises(kvortex.InvalidArgumentError, match="end of the last part: expected 8, got 4"):
        engine.load_blocks_async(keys_of(3), raw(), stream=0, parts=kvortex.Parts([4]))
    with pytest.raises(kvortex.UnsupportedError):
        engine.load_blocks_async(keys_of(3), raw(), stream=0, parts=parts)
    with pytest.raises(kvortex.InvalidArgumentError, match="make new ones for each"):
        engine.load_blocks_async(keys_of(3), raw(), stream=0, parts=parts)
    two = kvortex.PagedCache([np.zeros((4, 6), np.uint8), np.zeros((4, 2), np.uint16)]).parts()
    with pytest.raises(kvortex.InvalidArgumentError, match="expected 8, got 10"):
        engine.load_blocks_async(keys_of(3), raw(), stream=0, parts=two)


def test_a_save_rests_on_loads(engine):
    blocks = np.arange(24, dtype=np.uint8).reshape(3, 8)
    engine.save_blocks(keys_of(3), blocks)
    load = engine.load_blocks_async(keys_of(3), np.zeros_like(blocks))
    save = engine.save_blocks_async(keys_of(3, "more"), blocks, after=[load])
    assert engine.wait(save).mask.all()
    assert engine.check_blocks(keys_of(3, "more")).all()
    for after, said in [(load, "after is no list"), ([load, 7], "no Ticket"), ("load", "after is no list")]:
        with pytest.raises(kvortex.InvalidArgumentError, match=said):
            engine.save_blocks_async(keys_of(3, "less"), blocks, after=after)
    assert not engine.check_blocks(keys_of(3, "less")).any()


def test_pools_of_a_gpu_that_is_not_there():
    for device in ("cuda:99", "cuda:4096"):
        with pytest.raises(kvortex.CudaUnavailableError, match="no CUDA device"):
            kvortex.GpuAsyncPool(device)
        with pytest.raises(kvortex.CudaUnavailableError, match="no CUDA device"):
            kvortex.PinnedHostPool(1 << 16, device=device)
        with pytest.raises(kvortex.CudaUnavailableError, match="no CUDA device"):
            kvortex.gpu_link(int(device[5:]))
    with pytest.raises(kvortex.CudaUnavailableError, match="needs a GPU"):
        kvortex.GpuAsyncPool("none")
    for wrong in ("gpu", "cuda:", "cuda:x", "cuda0", ""):
        with pytest.raises(kvortex.ConfigError, match="device = "):
            kvortex.GpuAsyncPool(wrong)
        with pytest.raises(kvortex.ConfigError, match="device = "):
            kvortex.PinnedHostPool(1 << 16, device=wrong)
    assert kvortex.PinnedHostPool(1 << 16, device="none").pinned is False
