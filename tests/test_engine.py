"""The engine from Python: what is saved comes back, under its own key only, in every form of argument."""

import array
import gc
import mmap

import numpy as np
import pytest

import kvortex
from blocks import BLOCK, block_of, blocks_of, key_of, keys_of

STATS = {
    "blocks", "capacity_blocks", "block_size_bytes", "bytes_used", "cpu_pool_size_bytes", "hits", "misses",
    "cache_hit_rate", "saved_blocks", "loaded_blocks", "duplicate_blocks", "evictions", "refused", "failed",
    "in_flight", "leased_blocks", "save_latency_us", "load_latency_us", "save_bandwidth_bytes_per_s",
    "load_bandwidth_bytes_per_s", "bytes_saved", "bytes_loaded", "pool_fragmentation", "index_bytes",
    "huge_page_bytes", "pinned", "num_transfer_streams", "eviction_watermark", "eviction_ratio",
    "disk",
}  # fmt: skip


def saved(engine, count, *name):
    keys = keys_of(count, *name)
    report = engine.save_blocks(keys, blocks_of(keys))
    assert report.mask.all()
    return keys


def loaded(engine, keys):
    """What a load gives: one row per key, None where it is missing; rows of missing keys must stay untouched."""
    out = np.full((len(keys), BLOCK), 0xA5, np.uint8)
    mask = engine.load_blocks(keys, out).mask
    assert all((row == 0xA5).all() for row, found in zip(out, mask, strict=True) if not found)
    return [row if found else None for row, found in zip(out, mask, strict=True)]


def is_own(row, key):
    return row is not None and bytes(row) == bytes(block_of(key))


def test_saved_blocks_come_back(engine):
    keys = saved(engine, 10)
    assert all(is_own(row, key) for row, key in zip(loaded(engine, keys), keys, strict=True))


def test_a_load_says_what_it_found_and_leaves_the_rest_alone(engine):
    keys = saved(engine, 6)
    mixed = [keys[4], key_of("unknown"), keys[0]]
    rows = loaded(engine, mixed)
    assert rows[1] is None
    assert is_own(rows[0], keys[4])
    assert is_own(rows[2], keys[0])


def test_the_report_of_a_save(engine):
    keys = keys_of(5)
    engine.save_blocks(keys[:2], blocks_of(keys[:2]))
    report = engine.save_blocks(keys, blocks_of(keys))
    assert (report.kind, report.blocks, report.present, report.refused, report.missing) == ("save", 3, 2, 0, 0)
    assert report.bytes == 3 * BLOCK
    assert report.mask.count() == len(report.mask) == 5
    assert report.elapsed_us > 0


def test_the_report_of_a_load(engine):
    keys = saved(engine, 3)
    report = engine.load_blocks([*keys, key_of("x")], np.empty((4, BLOCK), np.uint8))
    assert (report.kind, report.blocks, report.present, report.refused, report.missing) == ("load", 3, 0, 0, 1)
    assert list(report.mask) == [True, True, True, False]
    assert report.bytes == 3 * BLOCK


def test_a_key_keeps_its_first_bytes(engine):
    (key,) = saved(engine, 1)
    engine.save_blocks([key], np.zeros((1, BLOCK), np.uint8))
    assert is_own(loaded(engine, [key])[0], key)


@pytest.mark.parametrize("form", [b"".join, list, tuple, lambda k: bytearray(b"".join(k)),
                                  lambda k: memoryview(b"".join(k)), lambda k: np.frombuffer(b"".join(k), np.uint8),
                                  lambda k: np.frombuffer(b"".join(k), np.uint8).reshape(-1, 32)])  # fmt: skip
def test_every_form_of_keys(engine, form):
    keys = saved(engine, 4)
    assert engine.check_blocks(form([*keys, key_of("x")])).count() == 4
    assert engine.match_prefix(form(keys)) == 4


def test_no_keys_at_all(engine):
    empty = np.empty((0, BLOCK), np.uint8)
    for keys in (b"", [], ()):
        assert len(engine.save_blocks(keys, empty).mask) == 0
        assert len(engine.load_blocks(keys, empty).mask) == 0
        assert engine.save_blocks(keys, []).blocks == 0
        assert engine.load_blocks(keys) == []
        assert engine.match_prefix(keys) == len(engine.lease_prefix(keys)) == 0
    assert engine.block_size_bytes is None


def strided_forms():
    """Ways to hold 3 blocks of 2 x 7 items, each with room to write."""
    base = np.zeros((40, 30, 20), np.int16)
    return {
        "contiguous": base[:3, :2, :7].copy(),
        "rows": base[:3, :2, :7],
        "every other": base[1:7:2, ::15, 3:17:2],
        "backwards": base[6:0:-2, 20:0:-10, 14:0:-2],
        "transposed": base[:7, :2, :3].transpose(2, 1, 0),
        "blocks inside": base[:2, :3, :7].transpose(1, 0, 2),
    }


@pytest.mark.parametrize("source", strided_forms())
@pytest.mark.parametrize("target", strided_forms())
def test_strides_on_both_sides(engine, source, target):
    keys = keys_of(3, "strides")
    data, out = strided_forms()[source], strided_forms()[target]
    data[...] = blocks_of(keys, 28).view(np.int16).reshape(3, 2, 7)
    engine.save_blocks(keys, data)
    whole = out.base if out.base is not None else out
    assert engine.load_blocks(keys, out).mask.all()
    assert (out == data).all()
    assert np.count_nonzero(whole) == np.count_nonzero(data)  # nothing beside the target was written


def test_one_tensor_for_each_block(engine):
    keys = keys_of(3)
    engine.save_blocks(keys, [block_of(key) for key in keys])
    out = [np.empty((50, 100), np.uint8), np.empty(BLOCK // 2, np.uint16), np.empty((100, 50), np.uint8).T]
    assert engine.load_blocks(keys, tuple(out)).mask.all()
    assert all(is_own(row.tobytes(), key) for row, key in zip(out, keys, strict=True))


def test_tensors_of_one_shape_and_different_strides(engine):
    keys = keys_of(4)
    forms = [np.zeros((50, 100), np.uint8), np.zeros((100, 50), np.uint8).T, np.zeros((50, 200), np.uint8)[:, ::2],
             np.zeros((50, 100), np.uint8)[::-1]]  # fmt: skip
    engine.save_blocks(keys, blocks_of(keys))
    assert engine.load_blocks(keys, forms).mask.all()
    assert all(is_own(row.tobytes(), key) for row, key in zip(forms, keys, strict=True))
    engine.reset()
    engine.save_blocks(keys, forms)
    assert all(is_own(row, key) for row, key in zip(loaded(engine, keys), keys, strict=True))


def test_a_block_of_one_item(engine):
    engine.save_blocks([key_of(0)], [np.float64(1.5).reshape(())])
    out = np.zeros(1)
    assert engine.load_blocks([key_of(0)], out).mask.all()
    assert out[0] == 1.5


def test_bytes_of_every_kind(engine):
    keys = keys_of(5)
    with mmap.mmap(-1, BLOCK) as page:
        page[:] = bytes(block_of(keys[3]))
        given = [bytes(block_of(keys[0])), bytearray(block_of(keys[1])), memoryview(bytes(block_of(keys[2]))), page,
                 array.array("H", bytes(block_of(keys[4])))]  # fmt: skip
        assert engine.save_blocks(keys, given).blocks == 5
        given.clear()
        gc.collect()
        page.close()  # would raise if an export were left behind
    assert all(is_own(row, key) for row, key in zip(loaded(engine, keys), keys, strict=True))


def test_segments_are_put_together_in_order(engine):
    keys = keys_of(4)
    rows = blocks_of(keys)
    engine.save_blocks(keys, kvortex.Segments([rows[:, :1000], rows[:, 1000:1001], list(rows[:, 1001:])]))
    assert all(is_own(row, key) for row, key in zip(loaded(engine, keys), keys, strict=True))
    layers = [np.zeros((4, 2500), np.uint8) for _ in range(2)]
    assert engine.load_blocks(keys, kvortex.Segments(layers)).mask.all()
    assert (np.concatenate(layers, 1) == rows).all()


def test_check_and_match(engine):
    keys = saved(engine, 20)
    gap = [*keys[:11], key_of("x"), *keys[11:]]
    mask = engine.check_blocks(gap)
    assert list(mask) == [i != 11 for i in range(21)]
    assert (mask.prefix(), mask.count(), mask.all(), mask.any()) == (11, 20, False, True)
    assert engine.match_prefix(gap) == 11
    before = engine.get_stats()
    assert not engine.check_blocks(keys_of(3, "unknown")).any()
    assert engine.get_stats() == before


def test_the_oldest_goes_when_room_is_needed(make_engine):
    engine = make_engine("1MiB", block_size_bytes=BLOCK)
    first = saved(engine, 10, "first")
    room = engine.capacity_blocks
    for batch in range(6):
        keys = keys_of(room // 4, "batch", batch)
        assert engine.save_blocks(keys, blocks_of(keys)).refused == 0
    assert not engine.check_blocks(first).any()
    stats = engine.get_stats()
    assert stats["evictions"] > 0
    assert stats["blocks"] <= room
    assert all(is_own(row, key) for row, key in zip(loaded(engine, keys), keys, strict=True))


def test_leased_blocks_stay_and_a_full_engine_refuses(make_engine):
    engine = make_engine("1MiB", block_size_bytes=BLOCK, eviction_watermark=1.0)
    keys = saved(engine, engine.capacity_blocks // 2)
    rest = saved(engine, engine.capacity_blocks - len(keys), "rest")
    with engine.lease_prefix([*keys, *rest]) as lease:
        assert len(lease) == engine.capacity_blocks
        assert engine.get_stats()["leased_blocks"] == len(lease)
        report = engine.save_blocks([key_of("late")], [block_of(key_of("late"))])
        assert (report.refused, report.mask.any()) == (1, False)
        assert engine.check_blocks(keys).all()
    lease.release()
    assert engine.get_stats()["leased_blocks"] == 0
    assert engine.save_blocks([key_of("late")], [block_of(key_of("late"))]).mask.all()


def test_a_dropped_lease_is_released(engine):
    keys = saved(engine, 3)
    lease = engine.lease_prefix(keys)
    assert engine.get_stats()["leased_blocks"] == 3
    del lease
    assert engine.get_stats()["leased_blocks"] == 0


def test_blocks_in_place(engine):
    keys = saved(engine, 3)
    first, missing, second = engine.load_blocks([keys[0], key_of("x"), keys[1]])
    assert missing is None
    assert isinstance(first, kvortex.Block)
    assert first.nbytes == len(first) == BLOCK
    assert is_own(bytes(first), keys[0])
    assert is_own(np.frombuffer(second, np.uint8), keys[1])
    assert np.from_dlpack(first).ctypes.data == first.address


def test_blocks_outlive_reset_eviction_shutdown_and_the_engine():
    engine = kvortex.KVortexEngine.create({}, cpu_pool_size_bytes="1MiB", block_size_bytes=BLOCK)
    keys = saved(engine, 4)
    views = [np.from_dlpack(block) for block in engine.load_blocks(keys)]
    assert engine.reset() == 4
    assert not engine.check_blocks(keys).any()
    for batch in range(8):
        more = keys_of(engine.capacity_blocks // 3, batch)
        engine.save_blocks(more, blocks_of(more))
    assert engine.shutdown()
    del engine
    gc.collect()
    assert all(is_own(view, key) for view, key in zip(views, keys, strict=True))


def test_asynchronous_save_and_load(engine):
    keys = keys_of(50)
    ticket = engine.save_blocks_async(keys, blocks_of(keys))
    report = engine.wait(ticket)
    assert ticket.done
    assert (report.kind, report.blocks) == ("save", 50)
    out = np.zeros((50, BLOCK), np.uint8)
    ticket = engine.load_blocks_async(keys, out)
    assert engine.wait(ticket, timeout_ms=10_000).mask.all()
    assert engine.wait(ticket).blocks == 50  # any number of times
    assert (out == blocks_of(keys)).all()


def test_tickets_have_numbers_of_their_own(engine):
    keys = keys_of(3)
    tickets = [engine.save_blocks_async([key], [block_of(key)]) for key in keys]
    assert len({ticket.id for ticket in tickets}) == 3
    assert all(engine.wait(ticket).mask.all() for ticket in reversed(tickets))


def slow_blocks(count):
    """Blocks of single bytes far apart: a copy of them takes long for its size."""
    return np.zeros((count, 1 << 20, 3), np.uint8)[:, :, 1]


def test_a_wait_can_end_before_the_copy(make_engine):
    engine = make_engine("64MiB", num_transfer_streams=2)
    keys = keys_of(32)
    ticket = engine.save_blocks_async(keys, slow_blocks(32))
    with pytest.raises(kvortex.KVortexTimeoutError, match=r"not done after \d+ ms: wait again"):
        engine.wait(ticket, timeout_ms=1)
    assert engine.wait(ticket, timeout_ms=60_000).mask.all()


def test_reset_forgets_everything(engine):
    keys = saved(engine, 7)
    assert engine.reset() == 7
    assert engine.reset() == 0
    assert not engine.check_blocks(keys).any()
    assert engine.get_stats()["blocks"] == 0
    assert saved(engine, 7) == keys


def test_bind_fixes_size_and_namespace(make_engine):
    engine = make_engine()
    assert engine.block_size_bytes is engine.capacity_blocks is None
    namespace = kvortex.Namespace(model="m")
    engine.bind(BLOCK, namespace)
    engine.bind(BLOCK, namespace.digest)
    assert engine.block_size_bytes == BLOCK
    assert engine.capacity_blocks > 0
    with pytest.raises(kvortex.LayoutError, match="5000 bytes, not 4096"):
        engine.bind(4096, namespace)
    with pytest.raises(kvortex.LayoutError, match="namespace"):
        engine.bind(BLOCK, kvortex.Namespace(model="other"))
    saved(engine, 2)


def test_the_configured_text_is_part_of_the_namespace(make_engine):
    engine = make_engine(namespace="revision 2", block_size_bytes=BLOCK)
    engine.bind(BLOCK)
    plain = make_engine(block_size_bytes=BLOCK)
    plain.bind(BLOCK)
    for other in (kvortex.Namespace(), kvortex.Namespace(namespace="revision 2")):
        with pytest.raises(kvortex.LayoutError):
            engine.bind(BLOCK, other)


def test_the_first_save_binds(engine):
    saved(engine, 1)
    engine.bind(BLOCK)
    with pytest.raises(kvortex.LayoutError, match="5000 bytes, not 10"):
        engine.save_blocks([key_of(1)], np.zeros((1, 10), np.uint8))


def test_stats_say_what_happened(engine):
    assert engine.get_stats().keys() == STATS
    keys = saved(engine, 4)
    engine.save_blocks(keys, blocks_of(keys))
    loaded(engine, [*keys, key_of("x")])
    stats = engine.get_stats()
    expected = {
        "blocks": 4, "block_size_bytes": BLOCK, "bytes_used": 4 * BLOCK, "cpu_pool_size_bytes": 8 << 20, "hits": 4,
        "misses": 1, "cache_hit_rate": 0.8, "saved_blocks": 4, "loaded_blocks": 4, "duplicate_blocks": 4,
        "evictions": 0, "refused": 0, "failed": 0, "in_flight": 0, "leased_blocks": 0, "bytes_saved": 4 * BLOCK,
        "bytes_loaded": 4 * BLOCK, "pinned": False, "eviction_watermark": 0.8, "eviction_ratio": 0.2,
    }  # fmt: skip
    assert {name: stats[name] for name in expected} == expected
    assert stats["capacity_blocks"] == engine.capacity_blocks
    assert stats["load_latency_us"].keys() == {"p50", "p90", "p99", "max", "count"}
    assert 0 < stats["load_latency_us"]["p50"] <= stats["load_latency_us"]["max"]
    assert stats["save_bandwidth_bytes_per_s"] > 0


def test_settings_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("KVORTEX_CPU_POOL_SIZE_BYTES", "3MiB")
    monkeypatch.setenv("KVORTEX_EVICTION_WATERMARK", "0.5")
    with kvortex.KVortexEngine.create() as engine:
        stats = engine.get_stats()
    assert (stats["cpu_pool_size_bytes"], stats["eviction_watermark"]) == (3 << 20, 0.5)
    with kvortex.KVortexEngine.create(eviction_watermark=0.7) as engine:
        assert engine.get_stats()["eviction_watermark"] == 0.7


def test_what_a_closed_engine_still_says():
    with kvortex.KVortexEngine.create({}, cpu_pool_size_bytes="1MiB") as engine:
        keys = saved(engine, 3)
        ticket = engine.load_blocks_async(keys, np.zeros((3, BLOCK), np.uint8))
        assert not engine.closed
    assert engine.closed
    assert engine.shutdown()
    assert engine.shutdown(timeout_ms=2**64 - 1)
    assert engine.get_stats()["saved_blocks"] == 3
    assert engine.wait(ticket, timeout_ms=2**64 - 1).mask.all()
    assert "shut down" in repr(engine)


def test_everything_shows_itself(engine):
    keys = saved(engine, 2)
    shown = [engine, engine.check_blocks(keys), engine.load_blocks(keys)[0], engine.lease_prefix(keys),
             engine.save_blocks(keys, blocks_of(keys)), engine.save_blocks_async(keys, blocks_of(keys))]  # fmt: skip
    assert all(repr(one).startswith("<kvortex.") for one in shown)
    assert "2 of 2" in repr(shown[1])


def test_nobody_makes_results_by_hand():
    for name in ("KVortexEngine", "Report", "BlockMask", "Ticket", "Lease", "Block", "PinnedBuffer"):
        with pytest.raises(TypeError):
            getattr(kvortex, name)()


def test_an_engine_says_which_device_it_reaches(make_engine):
    assert make_engine(device="none").device == "none"
