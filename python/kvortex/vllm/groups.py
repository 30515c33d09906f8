"""Groups of layers that vLLM gives blocks of their own, and the blocks that a request has of all of them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from kvortex import BlockGroups
from kvortex.vllm.identity import KEY
from kvortex.vllm.metadata import Store, block_ids

if TYPE_CHECKING:
    from kvortex import Lease, RankPlanner
    from kvortex.vllm.params import Terms

__all__ = ["LayerGroup", "Tables"]


@dataclass(frozen=True)
class LayerGroup:
    """Layers with one table of blocks."""

    layers: tuple[str, ...]
    window: int = 0
    """Tokens, the newest among them, whose blocks vLLM keeps; 0 for all."""
    looks_ahead: bool = False
    """Whether a drafter's layers are among them: what those keep of a position depends on the next token too."""
    spec: str = ""
    """The specification that the scheduler's process has of them: of layers of one type that differ, the first's."""


class Tables:
    """Lists a request's blocks: block after block of its tokens, of each one of every group, 0 where vLLM has none.

    vLLM puts its null block, number 0, where a window has passed by. All groups have blocks of the same size, so their
    tables are equally long.
    """

    def __init__(self, groups: Sequence[LayerGroup], block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._count = len(groups)
        self._windows = [(index, group.window) for index, group in enumerate(groups) if group.window]
        self._narrowest = min((window for _, window in self._windows), default=0)
        ahead = [index for index, group in enumerate(groups) if group.looks_ahead]
        self.ahead = len(ahead) > 0
        """Whether a block is good only together with the token behind it."""
        self._groups = BlockGroups(block_tokens, [group.window for group in groups], ahead)
        self._is_whole = len(groups) == 1 and not self._windows and not ahead
        """Whether there is the one group of most models, which has every block."""

    def listed(self, ids: Sequence[list[int]]) -> list[int]:
        """The blocks of vLLM's tables, or of what was added to them, in one list."""
        return list(ids[0]) if self._count == 1 else list(chain.from_iterable(zip(*ids, strict=True)))

    def length(self, blocks: list[int]) -> int:
        """Blocks of tokens in a list."""
        return len(blocks) // self._count

    def beyond(self, blocks: list[int], first: int) -> list[int]:
        """What there is from block ``first`` of the tokens on."""
        rest = blocks[first * self._count :]
        return [block for block in rest if block] if self._windows else rest

    def lease(self, planner: RankPlanner, hashes: bytes, first: int, most: int) -> tuple[int, Lease]:
        """Blocks of the longest hit, at most ``most``, and a lease on what it needs beyond ``first`` blocks.

        ``hashes`` name the blocks from ``first`` on.
        """
        if not self._is_whole:
            return planner.lease_groups(self._groups, hashes, first, most)
        lease = planner.lease_prefix(hashes)
        return first + len(lease), lease

    def reach(self, planner: RankPlanner, hashes: bytes, first: int, most: int) -> tuple[bytes, int]:
        """The keys that a hit needs which is as long as what is in memory and below allows, and the tokens it gives.

        With one group whoever looks for the keys below sees for himself how far they go.
        """
        if self._is_whole:
            return hashes, len(hashes) // KEY * self._block_tokens
        hit, keys = planner.reach_groups(self._groups, hashes, first, most) or (0, b"")
        return keys, max(0, hit - first) * self._block_tokens

    def targets(self, ids: Sequence[list[int]], first: int, end: int) -> list[int]:
        """Where a hit of ``end`` blocks is loaded beyond ``first``, in the order of its lease."""
        return self.beyond(self.listed([table[first:end] for table in ids]), 0)

    def taken(self, lease: Lease, offered: int, count: int) -> int:
        """Blocks of a lease on ``offered`` blocks of tokens that the first ``count`` take; 0 if those need others."""
        if count == offered:
            return len(lease)
        return count if self._is_whole else 0

    def kept(self, blocks: list[int], first: int, end: int, computed: int) -> list[int]:
        """What may be stored of the blocks from ``first`` to ``end`` in a step that begins with ``computed`` tokens.

        What is outside of a window by then, vLLM may have given to others in this very step.
        """
        count, kept = self._count, blocks[first * self._count : end * self._count]
        if self._narrowest and computed + 1 - self._narrowest >= (first + 1) * self._block_tokens:
            for index, window in self._windows:
                gone = min(max(0, computed + 1 - window) // self._block_tokens, end) - first
                if gone > 0:
                    kept[index : gone * count : count] = [0] * gone
        return kept

    def keys(self, hashes: bytes) -> list[bytes]:
        """The packed keys of each group's blocks with these hashes."""
        return [self._groups.keys(group, hashes) for group in range(self._count)]

    def plan_store(self, planner: RankPlanner, hashes: bytes, blocks: list[int], terms: Terms) -> Store | None:
        """Plans to store what is not there of ``blocks``, which have these hashes, on ``terms``."""
        planned = planner.plan_store_groups(self._groups, hashes, block_ids(blocks).tobytes(), terms=terms)
        if planned is None:
            return None
        ticket, stored, slots = planned
        return Store(ticket, slots, array("I", stored))
