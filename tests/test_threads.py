"""Many Python threads on one engine: nothing is lost, and no byte is ever served under another key."""

import collections
import itertools
import threading
import time

import numpy as np
import pytest

import kvortex
from blocks import block_of, blocks_of, key_of, keys_of

THREADS = 8
SIZE = 4096 + 24
SECONDS = 4


def run_all(*tasks):
    """Runs each task on a thread of its own, and raises the first error of any."""
    errors = []

    def guarded(task):
        try:
            task()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class Worker:
    """Does one thing after the other with random keys of a small family, and counts what it saw."""

    def __init__(self, engine, seed, keys):
        self.engine, self.keys, self.chosen = engine, keys, np.random.default_rng(seed)
        self.seen = collections.Counter()

    def pick(self, most=40):
        """A run of the family, so that prefixes mean something."""
        start = int(self.chosen.integers(len(self.keys)))
        return self.keys[start : start + int(self.chosen.integers(1, most))]

    def check(self, rows, keys, mask):
        for row, key, found in zip(rows, keys, mask, strict=True):
            expected = block_of(key, SIZE) if found else 0xEE
            assert np.array_equal(row, np.broadcast_to(expected, SIZE)), "a byte of another key"
            self.seen["hit" if found else "miss"] += 1

    def save(self):
        keys = self.pick()
        report = self.engine.save_blocks(b"".join(keys), blocks_of(keys, SIZE))
        assert report.blocks + report.present + report.refused == len(keys)
        self.seen["saved"] += report.blocks

    def load(self):
        keys = self.pick()
        out = np.full((len(keys), SIZE), 0xEE, np.uint8)
        self.check(out, keys, self.engine.load_blocks(keys, out).mask)

    def read_in_place(self):
        keys = self.pick(10)
        blocks = self.engine.load_blocks(keys)
        views = [np.full(SIZE, 0xEE, np.uint8) if block is None else np.from_dlpack(block) for block in blocks]
        self.check(views, keys, [block is not None for block in blocks])

    def save_and_load_asynchronously(self):
        keys, other = self.pick(), self.pick()
        saving = self.engine.save_blocks_async(keys, blocks_of(keys, SIZE))
        out = np.full((len(other), SIZE), 0xEE, np.uint8)
        loading = self.engine.load_blocks_async(other, out)
        self.check(out, other, self.engine.wait(loading, 30_000).mask)
        self.engine.wait(saving, 30_000)

    def lease(self):
        keys = self.pick()
        with self.engine.lease_prefix(keys) as lease:
            out = np.full((len(lease), SIZE), 0xEE, np.uint8)
            mask = self.engine.load_blocks(keys[: len(lease)], out).mask
            # A reset may forget leased blocks, but their bytes stay.
            self.check(out, keys[: len(lease)], mask)
            self.seen["leased"] += len(lease)

    def look(self):
        keys = self.pick()
        assert len(self.engine.check_blocks(keys)) == len(keys)
        assert 0 <= self.engine.match_prefix(keys) <= len(keys)
        stats = self.engine.get_stats()
        assert stats["blocks"] <= stats["capacity_blocks"]

    def reset(self):
        if self.chosen.random() < 0.05:
            self.engine.reset()
            self.seen["resets"] += 1

    def run(self, deadline):
        doing = [self.save, self.load, self.read_in_place, self.save_and_load_asynchronously, self.lease, self.look,
                 self.reset]  # fmt: skip
        while time.monotonic() < deadline:
            doing[int(self.chosen.integers(len(doing)))]()


@pytest.mark.slow
def test_no_thread_ever_sees_a_byte_of_another_key(make_engine):
    """Twice as many keys as fit, so that slots are reused all the time."""
    keys = keys_of(512, "threads")
    blocks_of(keys, SIZE)
    engine = make_engine("2MiB", block_size_bytes=SIZE)
    assert engine.capacity_blocks <= len(keys) / 2
    workers = [Worker(engine, seed, keys) for seed in range(THREADS)]
    deadline = time.monotonic() + SECONDS
    run_all(*(lambda worker=worker: worker.run(deadline) for worker in workers))

    seen = sum((worker.seen for worker in workers), collections.Counter())
    assert all(seen[what] > 0 for what in ("hit", "miss", "saved", "leased", "resets")), seen
    stats = engine.get_stats()
    assert (stats["in_flight"], stats["leased_blocks"], stats["failed"]) == (0, 0, 0)
    assert stats["saved_blocks"] >= seen["saved"]
    assert stats["evictions"] > 0
    # Nothing leaked: after a reset every slot can be taken again.
    engine.reset()
    assert engine.get_stats()["bytes_used"] == 0
    full = keys_of(engine.capacity_blocks, "afterwards")
    refused = engine.save_blocks(full, blocks_of(full, SIZE)).refused
    assert refused == 0


def test_one_key_saved_by_everybody_is_written_once(make_engine):
    engine = make_engine(block_size_bytes=SIZE)
    start = threading.Barrier(THREADS)
    reports = []

    def save(key):
        start.wait()
        reports.append(engine.save_blocks([key], [block_of(key, SIZE)]))

    for turn in range(50):
        key = key_of("everybody", turn)
        run_all(*[lambda key=key: save(key)] * THREADS)
    assert engine.get_stats()["saved_blocks"] == sum(report.blocks for report in reports) == 50
    assert sum(report.present for report in reports) == 50 * (THREADS - 1)


def test_others_run_while_bytes_are_copied(make_engine):
    """Items of one byte each, far apart: a copy that takes long enough to see who else runs meanwhile."""
    engine = make_engine("64MiB", num_transfer_streams=1)
    data = np.zeros((24, 1 << 20, 3), np.uint8)[:, :, 1]
    keys = keys_of(24)
    ticks, saving = itertools.count(), threading.Event()

    def count():
        saving.wait()
        while saving.is_set():
            next(ticks)

    def save():
        saving.set()
        engine.save_blocks(keys, data)
        saving.clear()

    run_all(count, save)
    assert next(ticks) > 10_000


def test_a_chain_may_be_shared():
    """Whole blocks from several threads: each is hashed once, after some other."""
    chain = kvortex.KeyChain(bytes(32), 16)
    parts = []
    run_all(*[lambda: parts.extend(chain.extend(np.arange(16)) for _ in range(200))] * THREADS)
    assert sorted(parts) == sorted(chain.keys[i : i + 32] for i in range(0, len(chain.keys), 32))
    assert chain.keys == kvortex.hash_tokens(bytes(32), list(range(16)) * 200 * THREADS)


def test_shutdown_in_the_middle(make_engine):
    """Every call either works or says that the engine is closed, and shutdown waits for what was accepted."""
    for _ in range(5):
        engine = make_engine("4MiB", block_size_bytes=SIZE)
        ended = collections.Counter()
        keys = keys_of(64, "shutdown")

        def work(engine=engine, ended=ended, keys=keys):
            out = np.zeros((64, SIZE), np.uint8)
            try:
                while True:
                    engine.save_blocks(keys, blocks_of(keys, SIZE))
                    # What another thread is still writing is not there yet.
                    here = list(engine.wait(engine.load_blocks_async(keys, out)).mask)
                    assert (out[here] == blocks_of(keys, SIZE)[here]).all()
            except kvortex.ClosedError:
                ended["closed"] += 1

        def stop(engine=engine, ended=ended):
            time.sleep(0.1)
            ended["stopped"] += engine.shutdown()

        run_all(*[work] * 3, stop)
        assert ended == {"closed": 3, "stopped": 1}
