"""What the scheduler's side remembers of one request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvortex.vllm.identity import RequestKeys

if TYPE_CHECKING:
    from kvortex import Lease
    from kvortex.vllm.params import Wishes

__all__ = ["Given", "Tracked"]


class Tracked:
    """One request, from its first lookup to its end."""

    __slots__ = (
        "background",
        "blocks",
        "hit",
        "keeps",
        "keys",
        "lease",
        "loaded",
        "loading",
        "loads",
        "local",
        "looked_up",
        "offered",
        "promoted",
        "request",
        "wishes",
    )

    def __init__(self, request: Any, wishes: Wishes) -> None:
        self.request = request
        self.wishes = wishes
        self.keys = RequestKeys()
        self.blocks: list[int] = []
        """As ``Tables`` lists them."""
        self.offered = 0
        """Blocks, from the first, that a plan to store has had."""
        self.local = 0
        """Blocks that the engine's own cache had at the last lookup."""
        self.hit = 0
        """Blocks that it would have with what was offered then."""
        self.lease: Lease | None = None
        self.background = False
        self.loading: int | None = None
        """Ticket of a load in the background."""
        self.loads = wishes.load and not getattr(request, "skip_reading_prefix_cache", False)
        """Whether to look for its blocks: not where its answer tells of every token of the prompt, whatever the engine
        asks, and not again after a load of them failed.
        """
        self.keeps = wishes.store
        """Whether its blocks may be stored: not those computed or loaded before a reset."""
        self.looked_up = False
        """Whether its first lookup has been counted."""
        self.loaded = 0
        """Tokens that it was given, but for those whose load failed."""
        self.promoted = 0
        """Those of them that came from the disk for it."""

    def end_lease(self) -> None:
        """What was offered and not taken is held no longer."""
        if self.lease is not None:
            self.lease.release()
            self.lease = None


@dataclass(slots=True)
class Given:
    """What a load brings to a request."""

    to: Tracked
    blocks: int
    tokens: int
    promoted: int
    """Tokens of these that came from the disk for it."""

    def count(self, sign: int) -> None:
        """Counts it, or with -1 takes that back."""
        self.to.loaded += sign * self.tokens
        self.to.promoted += sign * self.promoted
