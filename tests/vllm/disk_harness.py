"""The random schedules of ``harness`` with a disk below, one life of an engine after the other on the same folder.

What the disk does is done when the schedule asks for it, so that a run is replayed from its seed, but for the order in
which blocks that came up together are evicted.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

from harness import Options, Run

from kvortex.vllm import disk as disks
from kvortex.vllm import promotion as promotions


@dataclass
class DiskOptions(Options):
    """One life."""

    life: int = 0
    """Documents are those of every life with the same seed; the schedule is another one."""
    keeps_disk: bool = True
    """Whether the disk is used on after a reset, which a real engine does not: so its emptying is seen."""
    is_late: bool = False
    """Whether the disk answers when it likes: in time, when nobody waits any more, or never."""


DEADLINE_S = 0.1
"""How long a request waits for a disk that may be late: some steps."""
GRACE_S = 0.1
LATEST = (0.2, 0.9, 3.0, 10.0)
"""Its answers, in deadlines."""


class SlowPromotion:
    """A promotion that is under way for some questions, and has ended after that."""

    def __init__(self, real, rng):
        self.real, self._rng = real, rng
        self._questions = rng.choice((0, 0, 1, 3))
        self.seconds = rng.choice((None, 0.0, 0.0, 1e9))

    @property
    def pending(self):
        if self._questions:
            self._questions -= 1
            return True
        while self.real.pending:
            pass
        return False

    def __len__(self):
        return len(self.real)

    def __getattr__(self, name):
        return getattr(self.real, name)


class LatePromotion:
    """A promotion whose blocks all come at once, some time after they were asked for, whoever waits for them then."""

    def __init__(self, real, keys, device):
        self.real, self.keys, self._device = real, keys, device
        self.seconds = device.rng.choice((None, 0.0, 0.0, 1e9))
        self.until = self.lands = 0.0
        self.has_landed = self.is_released = False

    def start(self):
        rng, now = self._device.rng, self._device.now
        self.until = now + DEADLINE_S
        self.lands = now + rng.random() * rng.choice(LATEST) * DEADLINE_S if rng.random() < 0.9 else float("inf")

    @property
    def pending(self):
        return self._device.now < self.until and not self.has_landed

    @property
    def late(self):
        return self._device.now >= self.until and not self.has_landed

    def release(self):
        self.is_released = True
        self.real.release()

    def __len__(self):
        return len(self.real)

    def __getattr__(self, name):
        return getattr(self.real, name)


class DiskPlanner:
    """The real planner, whose disk has done what it was given when a method returns."""

    def __init__(self, real, rng):
        self.real, self._rng = real, rng

    def poll(self):
        ended = self.real.poll()
        assert self.real.flush(60_000)
        return ended

    def plan_store(self, keys, rests_on=(), **terms):
        planned = self.real.plan_store(keys, rests_on, **terms)
        assert self.real.flush(60_000)
        return planned

    def plan_store_groups(self, *args, **more):
        planned = self.real.plan_store_groups(*args, **more)
        assert self.real.flush(60_000)
        return planned

    def find_below(self, keys):
        found = self.real.find_below(keys)
        return None if found is None else SlowPromotion(found, self._rng)

    def promote(self, promotion):
        self.real.promote(promotion.real)

    def __getattr__(self, name):
        return getattr(self.real, name)


class LatePlanner(DiskPlanner):
    """Its disk answers late, between any two questions of the scheduler's side."""

    def __init__(self, real, device):
        super().__init__(real, device.rng)
        self._device = device
        self._coming = []
        self.landed = {"landed": 0, "landed late": 0, "landed for nobody": 0}

    def poll(self):
        self._land()
        return super().poll()

    def find_below(self, keys):
        found = self.real.find_below(keys)
        return None if found is None else LatePromotion(found, keys, self._device)

    def promote(self, promotion):
        promotion.start()
        self._coming.append(promotion)

    def _land(self):
        now = self._device.now
        for promotion in [one for one in self._coming if one.lands <= now]:
            self._coming.remove(promotion)
            self.real.promote(promotion.real)
            while promotion.real.pending:
                pass
            promotion.has_landed = True
            self.landed["landed"] += 1
            self.landed["landed late"] += promotion.lands >= promotion.until
            self.landed["landed for nobody"] += promotion.is_released


class DiskRun(Run):
    """One life of an engine with a disk in ``folder``."""

    def __init__(self, model, options, config, folder):
        self.folder = folder
        self.disk = {}
        with mock.patch.object(disks, "why_off", return_value=None):
            super().__init__(model, options, config)

    def _configure(self, config):
        # So few that much comes from the disk.
        self.slots = self.rng.choice((20, 30, 60))
        super()._configure(config)
        extra = config.kv_transfer_config.kv_connector_extra_config
        extra.update(disk_paths=[str(self.folder)], disk_size_bytes=4 << 20, disk_read_deadline_ms=60_000)

    def _make_worker(self, caches):
        super()._make_worker(caches)
        # Loads by layers are given what was stored, and some of these slots were filled from the disk.
        self.side._hooks = None
        side = self.scheduler.connector._scheduler
        if self.options.is_late:
            self.planner = LatePlanner(side._planner, self.device)
            side._disk.promotions._held_s = DEADLINE_S + GRACE_S
        else:
            self.planner = DiskPlanner(side._planner, self.rng)
        side._planner = side._disk._planner = side._disk.promotions._planner = self.planner
        if self.options.keeps_disk:
            side._disk.leave = lambda _: side._disk.promotions.clear()

    @contextlib.contextmanager
    def virtual(self):
        clock = SimpleNamespace(monotonic=lambda: self.device.now)
        # The connector looks whether the root of the names is fixed when it sees the first of them.
        seed = mock.patch.dict(os.environ, PYTHONHASHSEED="0")
        with super().virtual(), seed, mock.patch.object(promotions, "time", clock):
            yield

    def _drain(self):
        super()._drain()
        self.disk = self.scheduler.connector._scheduler.stats()
        assert self.disk["promotions"]["waiting"] == 0
        if self.options.is_late:
            self.disk["landed"] = self.planner.landed

    def end(self):
        """The engine ends, and another one may open the folder."""
        self.planner.leave_disk()
        self.scheduler.shutdown()
