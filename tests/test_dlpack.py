"""Memory across the border: who keeps what alive, who may write what, and producers that say what is not so."""

import ctypes
import gc
import sys
import threading
import weakref

import numpy as np
import pytest

import kvortex
from blocks import BLOCK, block_of, blocks_of, key_of, keys_of

CPU, CUDA, CUDA_HOST = 1, 2, 3


class Producer:
    """Passes on the memory of an array, and counts the references that others hold on it."""

    def __init__(self, inner, device=(CPU, 0), versioned=True):
        self.inner, self.device, self.versioned, self.asked = inner, device, versioned, []

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **wishes):
        self.asked.append(wishes)
        if wishes and not self.versioned:
            raise TypeError("unexpected keyword argument")
        return self.inner.__dlpack__(**wishes)


def watched(count=1):
    """An array and a way to see whether it is still alive."""

    class Watched(np.ndarray):
        pass

    memory = np.zeros((count, BLOCK), np.uint8).view(Watched)
    return memory, weakref.ref(memory)


@pytest.mark.parametrize("versioned", [True, False])
def test_both_forms_of_capsules(engine, versioned):
    key = key_of(1)
    source, target = Producer(block_of(key).copy(), versioned=versioned), Producer(np.zeros(BLOCK, np.uint8))
    engine.save_blocks([key], [source])
    engine.load_blocks([key], [target])
    assert (target.inner == block_of(key)).all()
    assert source.asked == ([{"max_version": (1, 0)}] if versioned else [{"max_version": (1, 0)}, {}])


def test_an_old_capsule_is_no_target(engine):
    """It cannot say that its memory must not change; arrays of JAX 0.10 come so, and are constants to their owner."""
    engine.save_blocks([key_of(1)], [block_of(key_of(1))])
    target = Producer(np.zeros(BLOCK, np.uint8), versioned=False)
    with pytest.raises(
        kvortex.InvalidArgumentError, match=r"out\[0\] is Producer whose DLPack, older than 1.0, cannot say"
    ):
        engine.load_blocks([key_of(1)], [target])
    assert not target.inner.any()


@pytest.mark.parametrize("writable", [True, False])
def test_the_buffer_protocol_speaks_for_an_old_capsule(engine, writable):
    class Old(np.ndarray):
        def __dlpack__(self, **_):
            return self.view(np.ndarray).copy().__dlpack__() if not writable else super().__dlpack__()

    engine.save_blocks([key_of(1)], [block_of(key_of(1))])
    target = np.zeros(BLOCK, np.uint8).view(Old)
    target.setflags(write=writable)
    if writable:
        assert engine.load_blocks([key_of(1)], [target]).mask.all()
    else:
        with pytest.raises(kvortex.InvalidArgumentError, match="read-only"):
            engine.load_blocks([key_of(1)], [target])
    assert target.any() == writable


def test_pinned_memory_of_others_is_host_memory(engine):
    array_ = np.zeros(BLOCK, np.uint8)
    engine.save_blocks([key_of(1)], [Producer(array_, device=(CUDA_HOST, 0))])


@pytest.mark.parametrize(("device", "name"), [((8, 0), "metal:0"), ((10, 2), "rocm:2"),
                                              ((13, 0), "cuda managed:0"), ((99, 0), "DLPack type:99")])  # fmt: skip
def test_memory_of_a_device_is_refused_before_it_is_asked_for(engine, device, name):
    producer = Producer(np.zeros(BLOCK, np.uint8), device=device)
    with pytest.raises(kvortex.UnsupportedError, match=rf"data\[0\] is on device {name}.*pass it with .cpu\(\)"):
        engine.save_blocks([key_of(1)], [producer])
    assert producer.asked == []


def test_a_source_is_let_go_when_the_call_returns(engine):
    memory, alive = watched()
    engine.save_blocks([key_of(1)], memory)
    before = sys.getrefcount(memory)
    engine.save_blocks([key_of(2)], memory)
    assert sys.getrefcount(memory) == before
    del memory
    assert alive() is None


@pytest.mark.parametrize("direction", ["save", "load"])
def test_memory_of_a_ticket_lives_until_it_is_done_and_no_longer(make_engine, direction):
    engine = make_engine("64MiB")
    keys = keys_of(400)
    engine.save_blocks(keys, blocks_of(keys))
    memory, alive = watched(400)
    call = engine.load_blocks_async if direction == "load" else engine.save_blocks_async
    ticket = call(keys if direction == "load" else keys_of(400, "other"), memory)
    del memory
    assert engine.wait(ticket).mask.all()
    # The copy thread let go of it without the GIL; that is made good on the way back from the wait.
    assert alive() is None


def test_memory_is_kept_while_it_is_copied(make_engine):
    """Single bytes far apart take long enough to look in between."""
    engine = make_engine("64MiB")
    memory, _ = watched()
    slow = np.zeros((32, 1 << 20, 3), np.uint8).view(type(memory))[:, :, 1]
    alive = weakref.ref(slow)
    ticket = engine.save_blocks_async(keys_of(32), slow)
    del slow
    kept = alive() is not None
    assert kept or ticket.done
    engine.wait(ticket)
    assert alive() is None


def test_memory_is_let_go_without_a_wait(engine):
    memory, alive = watched()
    ticket = engine.save_blocks_async([key_of(1)], memory)
    del memory
    while not ticket.done:
        pass
    engine.get_stats()  # any call will do
    assert alive() is None


def test_refused_arguments_are_let_go(engine):
    memory, alive = watched()
    for bad in ([memory, 3], [memory, memory], kvortex.Segments([memory, "x"])):
        with pytest.raises(kvortex.InvalidArgumentError):
            engine.save_blocks([key_of(1)], bad)
    del memory, bad
    gc.collect()
    assert alive() is None


def test_a_used_capsule_is_refused(engine):
    class Used:
        def __dlpack__(self, **_):
            capsule = np.zeros(BLOCK, np.uint8).__dlpack__()
            ctypes.pythonapi.PyCapsule_SetName(ctypes.py_object(capsule), b"used_dltensor")
            return capsule

    with pytest.raises(kvortex.InvalidArgumentError, match="no fresh DLPack tensor"):
        engine.save_blocks([key_of(1)], [Used()])


class DlTensor(ctypes.Structure):
    """The struct of DLPack, to be filled wrongly."""

    _fields_ = [
        ("data", ctypes.c_void_p), ("device", ctypes.c_int32), ("device_id", ctypes.c_int32), ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]  # fmt: skip


class DlVersioned(ctypes.Structure):
    """A capsule's contents from DLPack 1.0 on."""

    _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("manager", ctypes.c_void_p),
                ("deleter", ctypes.c_void_p), ("flags", ctypes.c_uint64), ("tensor", DlTensor)]  # fmt: skip


class Forged:
    """Gives out a capsule with the given fields over 64 bytes of memory."""

    def __init__(self, shape=(64,), strides=None, major=1, **fields):
        self.memory = np.arange(64, dtype=np.uint8)
        self.shape = (ctypes.c_int64 * len(shape))(*shape)
        self.strides = (ctypes.c_int64 * len(strides))(*strides) if strides else None
        given = {"data": self.memory.ctypes.data, "device": CPU, "ndim": len(shape), "code": 1, "bits": 8, "lanes": 1}
        self.managed = DlVersioned(major=major, tensor=DlTensor(**{**given, **fields}))
        self.managed.tensor.shape = self.shape
        if strides:
            self.managed.tensor.strides = self.strides

    def __dlpack__(self, **_):
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return make(ctypes.addressof(self.managed), b"dltensor_versioned", None)


def test_a_forged_capsule_that_is_right_works(engine):
    engine.save_blocks([key_of(1)], [Forged(shape=(2, 32))])
    engine.save_blocks([key_of(2)], [Forged(shape=(4, 16), strides=(-16, 1), byte_offset=48)])
    out = np.zeros((2, 64), np.uint8)
    assert engine.load_blocks([key_of(1), key_of(2)], out).mask.all()
    assert (out[0] == np.arange(64)).all()
    assert (out[1].reshape(4, 16) == np.arange(64).reshape(4, 16)[::-1]).all()


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"major": 2}, kvortex.UnsupportedError, "DLPack 2, and KVortex reads DLPack 1"),
        ({"device": CUDA, "device_id": -1}, kvortex.UnsupportedError, "cuda:-1"),
        ({"bits": 4}, kvortex.UnsupportedError, "items of 4 bits"),
        ({"bits": 0}, kvortex.UnsupportedError, "items of 0 bits"),
        ({"code": 3, "bits": 64}, kvortex.UnsupportedError, "whole bytes"),
        ({"data": None}, kvortex.InvalidArgumentError, "null pointer"),
        ({"ndim": -1}, kvortex.InvalidArgumentError, "-1 dimensions"),
        ({"ndim": 65}, kvortex.InvalidArgumentError, "65 dimensions"),
        ({"shape": (-4,)}, kvortex.InvalidArgumentError, "a negative one"),
        ({"shape": (2**62, 2**62)}, kvortex.InvalidArgumentError, "beyond any address|more bytes than an address"),
        ({"shape": (2, 2), "strides": (2**63 - 1, 1), "bits": 64}, kvortex.InvalidArgumentError, "beyond any address"),
        ({"shape": (2**40, 2**40), "strides": (1, 1)}, kvortex.InvalidArgumentError, "too large|too many|beyond"),
        ({"shape": (0,)}, kvortex.InvalidArgumentError, "at least one byte"),
    ],
)
def test_forged_capsules_are_refused(engine, fields, error, said):
    before = engine.get_stats()
    with pytest.raises(error, match=said):
        engine.save_blocks([key_of(1)], [Forged(**fields)])
    assert engine.get_stats() == before


@pytest.mark.parametrize("flags", [0, 1])
def test_the_read_only_flag_is_obeyed(engine, flags):
    engine.save_blocks([key_of(1)], [np.zeros(64, np.uint8)])
    target = Forged()
    target.managed.flags = flags
    if flags:
        with pytest.raises(kvortex.InvalidArgumentError, match="read-only"):
            engine.load_blocks([key_of(1)], [target])
    else:
        engine.load_blocks([key_of(1)], [target])
    assert target.memory.any() == bool(flags)


def read_only(array_):
    array_.setflags(write=False)
    return array_


@pytest.mark.parametrize("target", [bytes(BLOCK), memoryview(bytes(BLOCK)), read_only(np.zeros(BLOCK, np.uint8)),
    memoryview(bytearray(BLOCK)).toreadonly(), Producer(read_only(np.zeros(BLOCK, np.uint8)))],
    ids=["bytes", "memoryview of bytes", "numpy", "memoryview", "DLPack"])  # fmt: skip
def test_read_only_targets_are_refused(engine, target):
    engine.save_blocks([key_of(1)], [block_of(key_of(1))])
    before = engine.get_stats()
    with pytest.raises(kvortex.InvalidArgumentError, match=r"out\[0\] is read-only: pass memory that can be written"):
        engine.load_blocks([key_of(1)], [target])
    assert engine.get_stats() == before


def test_a_block_is_no_target(engine):
    keys = keys_of(2)
    engine.save_blocks(keys, blocks_of(keys))
    with pytest.raises(kvortex.InvalidArgumentError, match="read-only"):
        engine.load_blocks(keys[:1], [engine.load_blocks(keys)[1]])
    assert bytes(engine.load_blocks(keys)[1]) == bytes(block_of(keys[1]))


def test_arrays_of_pointers_are_refused(engine):
    """Bytes from a cache, taken for pointers, would be followed."""
    for pointers in (np.zeros(4, object), np.zeros(4, [("a", "i4"), ("O", object)]), (ctypes.c_void_p * 4)(),
                     (ctypes.POINTER(ctypes.c_int) * 4)(), (ctypes.c_char_p * 4)()):  # fmt: skip
        with pytest.raises(kvortex.UnsupportedError, match="Python objects or pointers"):
            engine.save_blocks([key_of(1)], [pointers])
    fields = np.zeros(4, [("O", "i4"), ("P", "f8")])
    assert engine.save_blocks([key_of(1)], [fields]).bytes == 48


@pytest.mark.parametrize("kind", ["i1", "u2", "i4", "u8", "f2", "f4", "f8", "c8", "c16", "?", ">i4", "S3", "U2", "V5"])
def test_every_type_of_numpy(engine, kind):
    size = 12 * np.dtype(kind).itemsize
    engine.save_blocks([key_of(kind)], [np.frombuffer(bytes(block_of(key_of(kind), size)), kind).reshape(3, 4)])
    out = np.zeros((4, 3), kind).T
    assert engine.load_blocks([key_of(kind)], [out]).mask.all()
    assert out.tobytes() == bytes(block_of(key_of(kind), size))


def test_every_type_of_torch(engine, torch):
    names = ("uint8", "int64", "float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2", "complex64", "bool")
    for name in names:
        # A bool of torch is 0 or 1.
        data = bytes(block_of(key_of(name), 960) & (1 if name == "bool" else 255))
        typed = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(getattr(torch, name)).reshape(5, -1)
        engine.reset()
        report = engine.save_blocks([key_of(name)], [typed])
        assert (report.blocks, report.bytes) == (1, 960)
        out = torch.zeros(typed.shape[::-1], dtype=typed.dtype).T
        assert engine.load_blocks([key_of(name)], [out]).mask.all()
        assert bytes(out.contiguous().view(torch.uint8).flatten().numpy()) == data


def test_what_torch_does_not_share(engine, torch):
    for tensor, error, said in [
        (torch.zeros(8, requires_grad=True), kvortex.InvalidArgumentError, r"pass it with .detach\(\)"),
        (torch.zeros(8, device="meta"), kvortex.KVortexError, "data"),
        (torch.zeros(8).to_sparse(), kvortex.InvalidArgumentError, "cannot be shared"),
        (torch.zeros(8, dtype=torch.complex64).conj(), kvortex.InvalidArgumentError, "cannot be shared"),
    ]:
        with pytest.raises(error, match=said) as raised:
            engine.save_blocks([key_of(1)], [tensor])
        assert raised.value.__cause__ is None or isinstance(raised.value.__cause__, Exception)


def test_torch_reads_blocks_in_place(engine, torch):
    keys = keys_of(2)
    engine.save_blocks(keys, blocks_of(keys))
    block = engine.load_blocks(keys)[1]
    tensor = torch.from_dlpack(block)
    assert tensor.data_ptr() == block.address
    assert bytes(tensor.numpy()) == bytes(block_of(keys[1]))
    own = torch.from_dlpack(block, copy=True)
    own.zero_()
    assert bytes(block) == bytes(block_of(keys[1]))


def test_torch_ignores_that_a_block_is_read_only(engine, torch):
    """The reason for the warning at `Block`. Should this fail, torch has learned it: take the warning away."""
    engine.save_blocks([key_of(1)], [block_of(key_of(1))])
    tensor = torch.from_dlpack(engine.load_blocks([key_of(1)])[0])
    tensor[0] = tensor[0]  # writes what is there
    # What torch thinks writable is refused as a target all the same, by its address.
    with pytest.raises(kvortex.InvalidArgumentError, match="the cache's own arena"):
        engine.load_blocks([key_of(1)], [tensor])
    assert engine.get_stats()["failed"] == 0


def leased(engine):
    return engine.get_stats()["leased_blocks"]


def test_a_block_is_leased_while_a_view_of_it_lives(engine):
    engine.save_blocks([key_of(1)], [block_of(key_of(1))])
    for view in (np.from_dlpack, memoryview, lambda block: np.frombuffer(block, np.uint16)[3:9]):
        seen = view(engine.load_blocks([key_of(1)])[0])
        assert leased(engine) == 1
        del seen
        assert leased(engine) == 0


def test_the_blocks_of_one_call_are_leased_together(engine):
    keys = keys_of(3)
    engine.save_blocks(keys, blocks_of(keys))
    blocks = engine.load_blocks(keys)
    last = blocks.pop()
    del blocks
    assert leased(engine) == 3
    del last
    assert leased(engine) == 0


def test_capsules_unused_used_and_copied(engine):
    engine.save_blocks([key_of(1)], [block_of(key_of(1))])
    block = engine.load_blocks([key_of(1)])[0]
    unused = block.__dlpack__(max_version=(1, 0))
    assert "dltensor_versioned" in repr(unused)
    copied = np.from_dlpack(block, copy=True)
    used = np.from_dlpack(block)
    assert copied.flags.writeable
    assert not used.flags.writeable
    copied[:] = 0
    assert bytes(used) == bytes(block_of(key_of(1)))
    del block, used
    assert leased(engine) == 1
    del unused
    assert leased(engine) == 0


def test_views_end_on_another_thread(engine):
    engine.save_blocks([key_of(1)], [block_of(key_of(1))])
    views = [np.from_dlpack(engine.load_blocks([key_of(1)])[0]) for _ in range(10)]
    assert leased(engine) == 1
    thread = threading.Thread(target=views.clear)
    thread.start()
    thread.join()
    assert leased(engine) == 0


def test_the_deleter_needs_no_gil(engine):
    """A consumer in C++ calls it from any of its threads: ctypes gives the GIL up around the call."""
    engine.save_blocks([key_of(1)], [block_of(key_of(1))])
    capsule = engine.load_blocks([key_of(1)])[0].__dlpack__(max_version=(1, 0))
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    pointer = get(capsule, b"dltensor_versioned")
    ctypes.pythonapi.PyCapsule_SetName(ctypes.py_object(capsule), b"used_dltensor_versioned")
    managed = DlVersioned.from_address(pointer)
    assert (managed.major, managed.flags, managed.tensor.shape[0]) == (1, 1, BLOCK)
    delete = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(managed.deleter)
    del capsule
    assert leased(engine) == 1
    thread = threading.Thread(target=delete, args=(pointer,))
    thread.start()
    thread.join()
    assert leased(engine) == 0


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        ({}, r"pass max_version=\(1, 0\)"),
        ({"max_version": (0, 8)}, r"pass max_version=\(1, 0\)"),
        ({"max_version": (1, 0), "stream": 1}, "stream=None"),
        ({"max_version": (1, 0), "dl_device": (CUDA, 0)}, "on the host"),
    ],
)
def test_what_a_block_cannot_promise_it_refuses(engine, wishes, said):
    engine.save_blocks([key_of(1)], [block_of(key_of(1))])
    block = engine.load_blocks([key_of(1)])[0]
    with pytest.raises(BufferError, match=said):
        block.__dlpack__(**wishes)
    assert block.__dlpack_device__() == (CPU, 0)
    block.__dlpack__(max_version=(2, 0), dl_device=(CPU, 0), copy=False)


def test_nobody_gets_a_writable_buffer_of_a_block(engine):
    engine.save_blocks([key_of(1)], [block_of(key_of(1))])
    block = engine.load_blocks([key_of(1)])[0]
    assert memoryview(block).readonly
    assert not np.frombuffer(block, np.uint8).flags.writeable
    with pytest.raises(TypeError, match="not writable"):
        (ctypes.c_char * BLOCK).from_buffer(block)
    with pytest.raises(TypeError, match="read-only"):
        memoryview(block)[0] = 1


def test_overlapping_targets_are_refused(engine):
    keys = keys_of(2)
    engine.save_blocks(keys, blocks_of(keys, 64))
    memory = np.zeros(256, np.uint8)
    windows = np.lib.stride_tricks.as_strided
    for target in ([memory[:64], memory[63:127]], windows(memory, (2, 64), (32, 1)), windows(memory, (2, 64), (64, 0)),
                   kvortex.Segments([memory[:64].reshape(2, 32), memory[32:96].reshape(2, 32)])):  # fmt: skip
        before = engine.get_stats()
        with pytest.raises(kvortex.InvalidArgumentError, match=r"target pages . and . share bytes"):
            engine.load_blocks(keys, target)
        assert engine.get_stats() == before
    assert not memory.any()
    interleaved = memory[:128].reshape(64, 2).T
    assert engine.load_blocks(keys, interleaved).mask.all()
    assert (interleaved == blocks_of(keys, 64)).all()


def test_a_source_may_overlap_itself(engine):
    row = np.broadcast_to(np.arange(4, dtype=np.uint8), (3, 50, 4))
    engine.save_blocks(keys_of(3), row)
    out = np.zeros((3, 50, 4), np.uint8)
    engine.load_blocks(keys_of(3), out)
    assert (out == row).all()


def test_an_error_of_the_producer_is_the_cause(engine):
    class Broken:
        def __dlpack__(self, **_):
            raise RuntimeError("out of luck")

    with pytest.raises(kvortex.InvalidArgumentError, match=r"data\[0\] cannot be shared: out of luck") as raised:
        engine.save_blocks([key_of(1)], [Broken()])
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_ctrl_c_in_a_producer_goes_through(engine):
    class Interrupted:
        def __dlpack__(self, **_):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.save_blocks([key_of(1)], [Interrupted()])


def test_a_producer_may_fall_back_to_the_buffer_protocol(engine):
    """numpy cannot say in DLPack what a field or a byte order is."""
    engine.save_blocks([key_of(1)], [np.arange(4, dtype=">i4")])
    assert bytes(engine.load_blocks([key_of(1)])[0]) == np.arange(4, dtype=">i4").tobytes()


# PinnedHostPool


def test_pool_memory_is_written_by_everybody(torch):
    pool = kvortex.PinnedHostPool(1 << 20)
    buffer = pool.allocate(BLOCK)
    assert (buffer.nbytes, len(buffer), buffer.address % 128) == (BLOCK, BLOCK, 0)
    np.from_dlpack(buffer)[:] = 1
    torch.from_dlpack(buffer)[1] = 2
    memoryview(buffer)[2] = 3
    assert bytes(buffer)[:4] == b"\1\2\3\1"
    assert pool.stats()["used"] >= BLOCK
    assert pool.pinned is False


def test_pool_memory_goes_to_the_engine_and_back(engine):
    pool = kvortex.PinnedHostPool(1 << 20)
    buffer = pool.allocate(BLOCK)
    memoryview(buffer)[:] = bytes(block_of(key_of(1)))
    ticket = engine.save_blocks_async([key_of(1)], [buffer])
    engine.wait(ticket)
    buffer.free()
    other = pool.allocate(BLOCK)
    engine.load_blocks([key_of(1)], [other])
    assert bytes(other) == bytes(block_of(key_of(1)))


def test_pool_memory_is_not_given_back_under_a_view():
    pool = kvortex.PinnedHostPool(1 << 20)
    buffer = pool.allocate(100)
    view = np.from_dlpack(buffer)
    for free in (buffer.free, lambda: pool.free(buffer.address)):
        with pytest.raises(kvortex.InvalidArgumentError, match="still has 1 views"):
            free()
    view[:] = 7
    del view
    buffer.free()
    for free in (buffer.free, lambda: pool.free(buffer.address)):
        with pytest.raises(kvortex.DoubleFreeError, match="already given back"):
            free()
    with pytest.raises(BufferError, match="was given back"):
        memoryview(buffer)
    assert pool.stats()["live"] == 0


def test_pool_memory_lives_as_long_as_its_last_view():
    pool = kvortex.PinnedHostPool(1 << 20)
    buffer = pool.allocate(100)
    address, view = buffer.address, np.from_dlpack(buffer)
    del buffer
    with pytest.raises(kvortex.InvalidArgumentError, match="views of it live on"):
        pool.free(address)
    assert pool.stats()["live"] == 1
    del view
    assert pool.stats()["live"] == 0
    with pytest.raises(kvortex.DoubleFreeError):
        pool.free(address)


def test_pool_errors_are_distinct():
    pool = kvortex.PinnedHostPool(1 << 16, alignment=4096)
    buffer = pool.allocate(1)
    assert buffer.address % 4096 == 0
    for address in (0, buffer.address + 1, 1 << 40):
        with pytest.raises(kvortex.ForeignPointerError):
            pool.free(address)
    with pytest.raises(kvortex.PoolExhaustedError, match="131072 bytes asked for"):
        pool.allocate(1 << 17)
    for size in (0, -1, 1.5, "many"):
        with pytest.raises(kvortex.InvalidArgumentError):
            pool.allocate(size)
    for arguments in ((0,), (-1,), ("big",), (1 << 16, 3), (1 << 16, 0)):
        with pytest.raises(kvortex.KVortexError):
            kvortex.PinnedHostPool(*arguments)
    with pytest.raises(kvortex.CapacityError, match="available"):
        kvortex.PinnedHostPool(1 << 46)


def test_a_closed_pool_names_what_is_left_and_keeps_it_valid():
    pool = kvortex.PinnedHostPool(1 << 20)
    kept, other = pool.allocate(300), pool.allocate(200)
    other.free()
    assert pool.close() == [(kept.address, 300)]
    with pytest.raises(kvortex.ClosedError):
        pool.allocate(1)
    view = np.from_dlpack(kept)
    del pool, kept
    gc.collect()
    view[:] = 5
    assert view.sum() == 1500


def test_the_pool_under_threads():
    """No two live buffers share a byte, whoever frees them."""
    pool = kvortex.PinnedHostPool(1 << 20)

    def work(seed):
        chosen, held = np.random.default_rng(seed), []
        for _ in range(300):
            if held and chosen.random() < 0.5:
                buffer, mark = held.pop(int(chosen.integers(len(held))))
                wrong.extend(byte for byte in set(bytes(buffer)) if byte != mark)
                if chosen.random() < 0.5:
                    buffer.free()
            elif len(held) < 20:
                buffer, mark = pool.allocate(int(chosen.integers(1, 2000))), int(chosen.integers(256))
                np.frombuffer(buffer, np.uint8)[:] = mark
                held.append((buffer, mark))

    wrong = []
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert pool.stats()["used"] == pool.stats()["live"] == 0
    assert pool.stats()["largest_free"] == 1 << 20
