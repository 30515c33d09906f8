"""Blocks that are on the disk only: when a request waits for them, and when computing them is faster."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvortex import Promotion, RankPlanner

__all__ = ["PrefillSpeed", "Promotions"]

KEY = 32
"""Bytes of a key."""

KEEP = 0.8
"""What is left of an earlier measurement's weight after each further one."""

LEAST_TOKENS = 64
TOKENS_EACH = 8
"""A step computes prompts, rather than answers, if it has so many tokens in all, and for each of its requests."""

GRACE_S = 1.0
"""How long blocks that have come are held for a request that the engine does not ask about again."""


class PrefillSpeed:
    """How fast the engine computes prompts, seen from when it asks for the next step."""

    def __init__(self, ahead: int) -> None:
        """``ahead`` is how many steps the engine schedules before it knows what came of one."""
        self._ahead = ahead
        self._under_way: deque[int] = deque(maxlen=ahead + 1)
        self._last = 0.0
        self._tokens = self._seconds = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """None as long as no step was measured."""
        return self._tokens / self._seconds if self._seconds else None

    def step(self, tokens: int, requests: int, *, goes_on: bool, now: float) -> None:
        """A step of ``tokens`` was scheduled; ``goes_on`` if something in it ran in the one before.

        Otherwise the engine may have had nothing to do between them, and the time says nothing.
        """
        if not goes_on:
            self._under_way.clear()
        elif len(self._under_way) > self._ahead and self._under_way[0]:
            self._tokens = KEEP * self._tokens + self._under_way[0]
            self._seconds = KEEP * self._seconds + max(1e-6, now - self._last)
        computes = tokens >= max(LEAST_TOKENS, TOKENS_EACH * requests)
        self._under_way.append(tokens if computes else 0)
        self._last = now


class Promotions:
    """Has blocks brought up for requests that wait, once for each, and only if that is faster than to compute them."""

    def __init__(self, planner: RankPlanner, deadline_s: float, ahead: int) -> None:
        """``deadline_s`` is how long the planner lets blocks come, ``ahead`` as for PrefillSpeed."""
        self._planner = planner
        self._held_s = deadline_s + GRACE_S
        self._speed = PrefillSpeed(ahead)
        self._asked: dict[str, Promotion | None] = {}
        """What was decided for each request since it last ran; None if its blocks are computed."""
        self._held: dict[str, float] = {}
        """Those whose blocks are held, and until when."""
        self._waiting: set[str] = set()
        """Those whose blocks may still come."""
        self._started = self._declined = self._late = 0

    def waits(self, name: str, reach: Callable[[], tuple[bytes, int]]) -> bool:
        """Whether the request waits for blocks. ``reach`` tells which it could use, and the tokens that they give.

        It is asked once, for it is a search.
        """
        if name not in self._asked:
            return self._start(name, *reach())
        promotion = self._asked[name]
        if promotion is None or name not in self._waiting:
            return False
        if promotion.pending:
            return True
        self._waiting.remove(name)
        self._late += promotion.late
        return False

    def has_taken(self, name: str, blocks: int) -> int:
        """The request was given its first ``blocks`` blocks; how many of them came from the disk for it."""
        promotion = self._asked.get(name)
        return promotion.among(blocks) if promotion is not None else 0

    def end(self, name: str) -> None:
        """The request runs, or has ended: nothing is held for it any more."""
        promotion = self._asked.pop(name, None)
        self._held.pop(name, None)
        self._waiting.discard(name)
        if promotion is not None:
            promotion.release()

    def step(self, output: Any) -> None:
        """The engine scheduled a step."""
        now = time.monotonic()
        ran_before = bool(output.scheduled_cached_reqs.req_ids)
        requests = len(output.num_scheduled_tokens)
        self._speed.step(output.total_num_scheduled_tokens, requests, goes_on=ran_before, now=now)
        for name in [name for name, until in self._held.items() if now > until]:
            self._release(name)

    def clear(self) -> None:
        """Lets go of everything."""
        for name in list(self._asked):
            self.end(name)

    def stats(self) -> dict[str, Any]:
        """How many promotions were started, declined and late, and the speed that they are compared with."""
        return {
            "started": self._started,
            "declined": self._declined,
            "late": self._late,
            "waiting": len(self._waiting),
            "prefill_tokens_per_second": self._speed.tokens_per_second,
        }

    def _start(self, name: str, keys: bytes, tokens: int) -> bool:
        found = self._planner.find_below(keys)
        if found is None:
            return False
        if not self._is_faster(found, tokens * KEY // len(keys)):
            self._declined += 1
            self._asked[name] = None
            found.release()
            return False
        self._started += 1
        self._asked[name] = found
        self._planner.promote(found)
        self._held[name] = time.monotonic() + self._held_s
        self._waiting.add(name)
        return True

    def _is_faster(self, found: Promotion, block_tokens: int) -> bool:
        """Whether to bring up blocks, each worth so many tokens, is faster than to compute, as far as was measured."""
        seconds, speed = found.seconds, self._speed.tokens_per_second
        return seconds is None or speed is None or seconds < len(found) * block_tokens / speed

    def _release(self, name: str) -> None:
        del self._held[name]
        self._waiting.discard(name)
        promotion = self._asked[name]
        if promotion is not None:
            promotion.release()
