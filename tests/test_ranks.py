"""Ranks in processes of their own, from Python: whose bytes each of them loads."""

import multiprocessing
import time
import uuid

import numpy as np
import pytest

import kvortex
from blocks import keys_of

BLOCKS, SHAPE = 6, (16, 576)  # a latent of MLA
BLOCK_BYTES = 16 * 576 * 4
POOL = 8 * 36864
NAMESPACE = b"n" * 32


def cache_of(value):
    """Blocks of one layer, all of them `value`."""
    array = np.full((BLOCKS, *SHAPE), value, np.float32)
    return array, kvortex.PagedCache([array])


def mover_of(engine, rank, rows, ranks=2):
    config = kvortex.KVortexConfig(cpu_pool_size_bytes=POOL, device="none")
    return kvortex.RankMover(config, engine, ranks, rank, block_size_bytes=BLOCK_BYTES, namespace=NAMESPACE, rows=rows)


def planner_of(engine, rows, ranks=2):
    return kvortex.RankPlanner(
        engine,
        ranks,
        cpu_pool_size_bytes=POOL,
        block_size_bytes=BLOCK_BYTES,
        namespace=NAMESPACE,
        rows=rows,
        eviction_watermark=1.0,
    )


def rank_of_its_own(pipe, engine, rank, rows):
    """Does what it is told, with a cache full of its number and 1, and says what its cache holds then."""
    mover, (array, cache) = mover_of(engine, rank, rows), cache_of(rank + 1)
    pipe.send("here")
    while (told := pipe.recv()) is not None:
        what, ticket, slots, blocks = told
        getattr(mover, what)(ticket, slots, cache.blocks(blocks))
        pipe.send(array.reshape(BLOCKS, -1).max(axis=1).tolist())
    mover.shutdown()


@pytest.fixture
def ranks():
    """Starts ranks of an engine, each in a process; told to end afterwards."""
    spawn, started = multiprocessing.get_context("spawn"), []

    def start(engine, rank, rows):
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=rank_of_its_own, args=(theirs, engine, rank, rows), daemon=True)
        process.start()
        started.append((ours, process))
        assert ours.recv() == "here"
        return ours

    yield start
    for pipe, process in started:
        pipe.send(None)
        process.join(10)


def ask(pipe, *told):
    pipe.send(told)
    assert pipe.poll(30)
    return pipe.recv()


def kept(planner, keys):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        planner.poll()
        lease = planner.lease_prefix(b"".join(keys))
        if len(lease) == len(keys):
            return lease
        time.sleep(0.001)
    raise AssertionError("the store never ended")


@pytest.mark.parametrize(("rows", "loaded"), [("one", [1, 1]), ("open", [1, 2]), ("private", [1, 2])])
def test_each_rank_loads_from_its_row_or_from_the_one(ranks, rows, loaded):
    engine, keys = str(uuid.uuid4()), keys_of(3, rows)
    pipes = [ranks(engine, rank, rows) for rank in (0, 1)]
    planner = planner_of(engine, rows)
    assert planner.ready()
    assert planner.get_stats()["capacity_blocks"] == 8
    ticket, _, slots = planner.plan_store(b"".join(keys))
    for pipe in pipes:
        ask(pipe, "store", ticket, slots, [0, 1, 2])
    load = planner.plan_load(kept(planner, keys))
    found = [ask(pipe, "load", *load, [3, 4, 5])[3:] for pipe in pipes]
    assert found == [[value] * 3 for value in loaded]
    assert planner.poll() == [(load[0], True)]


def test_groups_of_one_rank_load_what_each_still_reads():
    engine, hashes = str(uuid.uuid4()), keys_of(3, "groups")
    planner, mover = planner_of(engine, "private", 1), mover_of(engine, 0, "private", 1)
    groups = kvortex.BlockGroups(16, [0, 17])
    assert (len(groups), groups.first_read(0, 3), groups.first_read(1, 3)) == (2, 0, 2)
    assert groups.keys(0, hashes) == b"".join(hashes)
    assert groups.keys(1, hashes) != groups.keys(0, hashes)
    array, cache = cache_of(0)
    array[:] = np.arange(BLOCKS)[:, None, None]
    assert planner.ready()
    # Of the second group the first block is none.
    blocks = np.array([1, 0, 2, 3, 4, 5], np.uint32)
    ticket, stored, slots = planner.plan_store_groups(groups, b"".join(hashes), blocks.tobytes())
    assert np.frombuffer(stored, np.uint32).tolist() == [1, 2, 3, 4, 5]
    mover.store(ticket, slots, cache.blocks(np.frombuffer(stored, np.uint32).tolist()))
    kept(planner, hashes).release()
    hit, lease = planner.lease_groups(groups, b"".join(hashes[1:]), 1, 3)
    assert (hit, len(lease)) == (3, 3), "the second and third block of the first group, the third of the second"
    load, slots = planner.plan_load(lease)
    array[:] = 0
    mover.load(load, slots, cache.blocks([0, 1, 2]))
    assert array[:, 0, 0].tolist() == [2, 4, 5, 0, 0, 0]
    mover.shutdown()


def test_what_is_wrong_with_groups_is_said():
    groups, planner = kvortex.BlockGroups(16, [0, 17]), planner_of(str(uuid.uuid4()), "private", 1)
    for wrong, message in {
        lambda: kvortex.BlockGroups(16, []): "give at least one of each",
        lambda: kvortex.BlockGroups(0, [0]): "give at least one of each",
        lambda: kvortex.BlockGroups(16, [0], [1]): "look_ahead names group 1 of 1",
        lambda: groups.keys(2, b""): "group is 2 of 2",
        lambda: groups.first_read(-1, 0): "group is -1",
        lambda: planner.plan_store_groups(groups, b"k" * 32, b"1234"): "1 blocks for 1 keys of 2 groups",
        lambda: planner.plan_store_groups(groups, b"k" * 32, b"123"): "blocks has 3 bytes",
        lambda: planner.lease_groups(groups, b"k", 0, 1): "packed keys must be a multiple of 32 bytes",
    }.items():
        with pytest.raises(kvortex.InvalidArgumentError, match=message):
            wrong()


def test_rows_have_three_names():
    with pytest.raises(kvortex.InvalidArgumentError, match="give one of"):
        planner_of(str(uuid.uuid4()), "two")


def test_ranks_must_mean_the_same_rows():
    engine = str(uuid.uuid4())
    planner, movers = planner_of(engine, "one"), [mover_of(engine, 0, "one"), mover_of(engine, 1, "private")]
    with pytest.raises(kvortex.InvalidArgumentError, match="namespaces or rows differ"):
        planner.ready()
    del movers


def kept_on_disk(folder, engine, layout=b"l" * 32):
    """An engine of two ranks in this process with a disk, and its caches."""
    config = kvortex.KVortexConfig(cpu_pool_size_bytes=POOL, device="none", disk_paths=[folder], disk_size_bytes="8MiB")
    sizes = {"block_size_bytes": BLOCK_BYTES, "namespace": NAMESPACE, "rows": "open"}
    planner = kvortex.RankPlanner(engine, 2, cpu_pool_size_bytes=POOL, disk=config, **sizes)
    movers = [kvortex.RankMover(config, engine, 2, rank, layout=layout, **sizes) for rank in range(2)]
    assert planner.ready()
    assert planner.flush(20_000)
    return planner, movers, [cache_of(rank + 1) for rank in range(2)]


def test_a_prefix_comes_back_from_the_disk_on_every_rank(tmp_path):
    keys = keys_of(4)
    planner, movers, caches = kept_on_disk(tmp_path, uuid.uuid4().hex)
    ticket, _, slots = planner.plan_store(keys)
    for mover, (_, cache) in zip(movers, caches, strict=True):
        mover.store(ticket, slots, cache.blocks([0, 1, 2, 3]))
        assert mover.shutdown()
    planner.poll()
    assert planner.flush(20_000)
    assert planner.get_stats()["disk"]["written_blocks"] == 4
    assert planner.leave_disk()
    assert planner.get_stats()["disk"] is None
    del planner, movers

    planner, movers, caches = kept_on_disk(tmp_path, uuid.uuid4().hex)
    assert len(planner.lease_prefix(keys)) == 0
    promotion = planner.find_below(keys)
    assert (len(promotion), promotion.among(3), promotion.seconds) == (4, 3, None)
    assert not promotion.pending, "nobody has asked for it"
    planner.promote(promotion)
    while promotion.pending:
        time.sleep(0.001)
    assert not promotion.late
    lease = planner.lease_prefix(keys)
    assert len(lease) == 4
    promotion.release()
    ticket, slots = planner.plan_load(lease)
    for rank, (mover, (array, cache)) in enumerate(zip(movers, caches, strict=True)):
        array[:] = 0
        mover.load(ticket, slots, cache.blocks([2, 3, 4, 5]))
        assert array.reshape(BLOCKS, -1).max(axis=1).tolist() == [0, 0] + [rank + 1] * 4
    disk = planner.get_stats()["disk"]
    assert (disk["promoted_blocks"], disk["promoted_bytes"], disk["lost_blocks"]) == (4, 8 * BLOCK_BYTES, 0)
    assert disk["promotion_bytes_per_second"] > 0
    assert planner.find_below(keys) is None
    assert planner.reset() == 4
    assert planner.find_below(keys) is None


def test_another_layout_finds_nothing_on_the_disk(tmp_path):
    keys = keys_of(2)
    planner, movers, caches = kept_on_disk(tmp_path, uuid.uuid4().hex)
    ticket, _, slots = planner.plan_store(keys)
    for mover, (_, cache) in zip(movers, caches, strict=True):
        mover.store(ticket, slots, cache.blocks([0, 1]))
        mover.shutdown()
    planner.poll()
    assert planner.flush(20_000)
    planner.leave_disk()
    planner, *_ = kept_on_disk(tmp_path, uuid.uuid4().hex, layout=b"m" * 32)
    assert planner.find_below(keys) is None
    with pytest.raises(kvortex.InvalidArgumentError, match="make them open, or one"):
        kvortex.RankPlanner(
            uuid.uuid4().hex, 1, cpu_pool_size_bytes=POOL, block_size_bytes=BLOCK_BYTES, namespace=NAMESPACE,
            disk=kvortex.KVortexConfig(disk_paths=[tmp_path]),
        )  # fmt: skip
