"""A device in virtual time: streams whose operations run late, in an order that a seed decides, and a mover that puts
its copies on such streams.

The host only enqueues, as with a GPU, so what comes before what is decided by nothing but the waits that somebody asked
for: one that is missing becomes wrong bytes.
"""

from __future__ import annotations

import contextlib
from array import array
from collections import deque
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
from rote import LAYER_BYTES, Wrong

from kvortex import InvalidArgumentError, TransferError

COMPUTE, STORE, LOAD, LATER = "compute", "store", "load", "later"
SPEEDS = (0.02, 0.1, 0.5, 1.0)
"""How likely a stream runs an operation when it may."""
SECONDS = 0.004
"""The most that passes between two things that the host does."""


class Mark:
    """A point in a stream, as an event is."""

    __slots__ = ("passed",)

    def __init__(self, *, passed=False):
        self.passed = passed


class Stream:
    """Operations that run one after the other, each once what it comes after has passed."""

    def __init__(self):
        self._queue = deque()
        self._last = Mark(passed=True)

    def put(self, run=None, after=()):
        """Enqueues ``run``, or only a wait; returns the mark behind it."""
        self._last = Mark()
        self._queue.append((run, [mark for mark in after if not mark.passed], self._last))
        return self._last

    def mark(self):
        """The point up to which the stream is filled now."""
        return self._last

    def is_ready(self):
        """Whether an operation could run now."""
        return bool(self._queue) and all(mark.passed for mark in self._queue[0][1])

    def advance(self):
        """Runs one operation, which must be ready."""
        run, _, mark = self._queue.popleft()
        if run is not None:
            run()
        mark.passed = True

    def __len__(self):
        return len(self._queue)


class Device:
    """The streams of the engine and of the copies, and the time."""

    def __init__(self, rng):
        self.rng = rng
        self.now = 0.0
        self.streams = {name: Stream() for name in (COMPUTE, STORE, LOAD, LATER)}
        self._speeds = dict.fromkeys(self.streams, 1.0)

    def pass_time(self):
        """The host did something, and meanwhile some streams came further."""
        rng = self.rng
        self.now += rng.random() * SECONDS
        if rng.random() < 0.1:
            self._speeds[rng.choice((COMPUTE, STORE, LOAD, LATER))] = rng.choice(SPEEDS)
        for _ in range(rng.choice((0, 0, 1, 2, 4, 8))):
            ready = self._ready()
            if not ready:
                return
            name = rng.choice(ready)
            if rng.random() < self._speeds[name]:
                self.streams[name].advance()

    def wait(self, mark):
        """The host waits for ``mark``; the streams go on by their speeds."""
        while not mark.passed:
            ready = self._ready()
            (name,) = self.rng.choices(ready, [self._speeds[name] for name in ready])
            self.streams[name].advance()
            self.now += SECONDS / 10

    def wait_for_all(self):
        """The host waits for all that was enqueued so far."""
        for stream in self.streams.values():
            self.wait(stream.mark())

    def _ready(self):
        return [name for name, stream in self.streams.items() if stream.is_ready()]


@dataclass
class Copy:
    """One that has been submitted."""

    lane: str
    blocks: frozenset[int]
    end: Mark


@dataclass
class Faults:
    """How often copies fail, at once or later."""

    stores: float = 0.0
    loads: float = 0.0


class StreamMover:
    """Keeps the contract of a mover for pages on a GPU; the real mover makes each copy when its turn comes.

    A copy waits for what the engine's stream was given so far, and for unfinished copies that use its pages otherwise.
    The engine's stream waits for whole loads inside the step, for parts that are held, and in a fence.
    """

    device, pinned, stores = "cuda:0", True, True

    def __init__(self, real, device, views, scratch, faults, counts):
        self.real, self.device, self.views = real, device, views
        self._scratch, self._faults, self._counts = scratch, faults, counts
        self.compute = device.streams[COMPUTE]
        self._copies: list[Copy] = []
        self._slots: dict[int, list[np.ndarray]] = {}
        """What was stored in each, by place. Only loads in parts are given it before they end."""

    def store(self, ticket, slots, blocks):
        """As ``RankMover.store``."""
        fails = self.device.rng.random() < self._faults.stores
        self._counts.stored += len(blocks)
        self._submit(STORE, blocks, [partial(self._store, ticket, slots, blocks, fails)])
        self._fail_at_once(fails)

    def load_later(self, ticket, slots, blocks):
        """As ``RankMover.load_later``."""
        fails = self.device.rng.random() < self._faults.loads
        self._counts.failed_loads += fails
        self._counts.background += 1
        self._submit(LATER, blocks, [partial(self._load_later, ticket, slots, blocks, fails)])
        self._fail_at_once(fails)

    def load(self, ticket, slots, blocks, *, parts=None):
        """As ``RankMover.load``."""
        self._counts.in_step += 1
        if parts is None:
            (end,) = self._submit(LOAD, blocks, [partial(self.real.load, ticket, slots, blocks)])
            self.compute.put(after=(end,))
            return
        self._counts.layerwise += 1
        given = {}
        places = parts.places()
        first = [partial(self._load_part, slots, blocks, part, given) for part in places[:-1]]
        last = partial(self._load_last_part, ticket, slots, blocks, places[-1], given)
        parts.marks = self._submit(LOAD, blocks, [*first, last])

    def fail_later(self, ticket, slots, blocks, *, parts=None):
        """As ``load``, of which nothing comes."""
        (end,) = self._submit(LOAD, blocks, [partial(self._refuse, self.real.load, ticket, slots, blocks)])
        if parts is None:
            self.compute.put(after=(end,))
        else:
            parts.marks = [end] * len(parts)

    def fence(self, blocks):
        """As ``RankMover.fence``."""
        self.compute.put(after=self._ends(frozenset(blocks.block_ids), reads=False))

    def ended_loads(self):
        """As ``RankMover.ended_loads``."""
        return self.real.ended_loads()

    def ended_later(self):
        """As ``RankMover.ended_later``."""
        return self.real.ended_later()

    def ended_stores(self):
        """As ``RankMover.ended_stores``."""
        return self.real.ended_stores()

    def shutdown(self, timeout_ms=5000):
        """As ``RankMover.shutdown``."""
        self.device.wait_for_all()
        return self.real.shutdown(timeout_ms)

    def _submit(self, lane, blocks, runs):
        """Enqueues ``runs`` and returns the mark behind each."""
        ids, stream = frozenset(blocks.block_ids), self.device.streams[lane]
        waits = self._waits(lane, ids)
        self._counts.waited += any(not mark.passed for mark in waits)
        stream.put(after=waits)
        marks = [stream.put(run) for run in runs]
        self._copies.append(Copy(lane, ids, marks[-1]))
        return marks

    def _waits(self, lane, ids):
        return [self.compute.mark(), *self._ends(ids, reads=lane == STORE)]

    def _ends(self, ids, *, reads):
        """Of unfinished copies that another one, which reads or writes ``ids``, must come after."""
        self._copies = [copy for copy in self._copies if not copy.end.passed]
        return [copy.end for copy in self._copies if copy.blocks & ids and not (reads and copy.lane == STORE)]

    def _fail_at_once(self, fails):
        """Half of the failures are known when the copy is submitted."""
        if fails and self.device.rng.random() < 0.5:
            raise TransferError("this copy does not start")

    # When their turn comes.

    def _store(self, ticket, slots, blocks, fails):
        if fails:
            self._refuse(self.real.store, ticket, slots, blocks)
            return
        self.real.store(ticket, slots, blocks)
        self.real.fence(blocks)
        for slot, block in zip(array("I", slots), blocks.block_ids, strict=True):
            self._slots[slot] = [view[block].copy() for view in self.views]

    def _load_later(self, ticket, slots, blocks, fails):
        if fails:
            # Some bytes may have come before it failed.
            for view in self.views:
                view[blocks.block_ids[0]] = -1
            self._refuse(self.real.load_later, ticket, slots, blocks)
            return
        self.real.load_later(ticket, slots, blocks)
        self.real.fence(blocks)

    @staticmethod
    def _refuse(method, ticket, slots, blocks):
        # A plan with a slot too few: the real mover refuses it and tells the planner.
        with contextlib.suppress(InvalidArgumentError):
            method(ticket, slots[4:], blocks)

    def _load_part(self, slots, blocks, places, given):
        for place in places:
            given[place] = [self._slots[slot][place] for slot in array("I", slots)]
            self.views[place][blocks.block_ids] = given[place]

    def _load_last_part(self, ticket, slots, blocks, places, given):
        """Now the real mover reads the slots: all bytes of the load must still be there."""
        scratch, views = self._scratch
        count = len(blocks)
        self.real.load(ticket, slots, scratch.blocks(array("I", range(count))))
        for place, before in given.items():
            if not np.array_equal(views[place][:count], np.stack(before)):
                raise Wrong(f"a slot of load {ticket} was written while the load read it, place {place}")
        for place in places:
            self.views[place][blocks.block_ids] = views[place][:count]


class Parts:
    """As ``kvortex.Parts``, for loads of a StreamMover."""

    def __init__(self, mover, ends_bytes):
        self._mover, self._ends = mover, list(ends_bytes)
        self.marks: list[Mark] = []

    def places(self):
        """The places of each part."""
        ends, whole = [0, *self._ends], LAYER_BYTES * len(self._mover.views)
        if ends != sorted(set(ends)) or ends[-1] != whole or any(at % LAYER_BYTES for at in ends):
            raise InvalidArgumentError(f"parts that end at {self._ends} bytes are not layers")
        return [range(first // LAYER_BYTES, end // LAYER_BYTES) for first, end in pairwise(ends)]

    def hold(self, index, *, stream=None):
        """As ``kvortex.Parts.hold``."""
        if not self.marks:
            raise InvalidArgumentError("the parts belong to no load yet")
        self._mover.compute.put(after=(self.marks[index],))

    def __len__(self):
        return len(self._ends)
