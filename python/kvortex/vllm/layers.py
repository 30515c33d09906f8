"""Loads that arrive layer by layer: which hooks may be counted on, and what each of them waits for."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvortex import Parts

__all__ = ["LayerHooks"]

MODES = ("NONE", "PIECEWISE")
"""Of CUDA graphs, in which attention and its hooks run outside of any."""

LEAST_PART_BYTES = 4 << 20
"""The first part has at least as much, and so has the last: the sooner the first is there, the sooner the first layer
is computed, and what the last one brings is computed when nothing is loaded any more."""

MOST_PART_BYTES = 32 << 20
"""What a part has before it ends grows to this, twice that of the one before, and shrinks from it to half of what is
left: each part costs some calls of the driver, which a small load would feel."""


class LayerHooks:
    """The hooks of single layers, which a replayed full CUDA graph does not call.

    A load is split by layers only in a step whose forward context shows that layers run one by one, and only after an
    earlier load, awaited as a whole, was followed by the hooks of its step. What had no hook then is awaited up front.
    Layers of several groups share places: the first of them to be computed waits, if all of them have hooks.
    """

    def __init__(self, order: Mapping[str, int], layer_bytes: Sequence[int]) -> None:
        """``order`` has the place of each layer in a block, ``layer_bytes`` the bytes of each place."""
        self._order = order
        self._places = len(layer_bytes)
        self._ends = [sum(layer_bytes[: index + 1]) for index in range(len(layer_bytes))]
        self._known: frozenset[str] = frozenset()
        """Layers whose hooks were seen."""
        self._unhooked: frozenset[int] = frozenset(range(self._places))
        """Places of layers whose hooks were not."""
        self._ran: set[str] = set()
        self._split: list[_Split] = []
        self._teaches = False

    def begin(self) -> None:
        """A step begins."""
        self._ran.clear()
        self._split.clear()
        self._teaches = False

    def may_split(self, forward_context: Any) -> bool:
        """Whether loads of this step may be awaited layer by layer; asked once, if the step has any."""
        by_layers = _runs_by_layers(forward_context)
        self._teaches = by_layers and not self._known
        return by_layers and self._places - len(self._unhooked) > 1

    def parts(self, blocks: int) -> list[int]:
        """Layers at which the parts of a load of ``blocks`` blocks end."""
        parts, start, total, grown = [], 0, self._ends[-1], LEAST_PART_BYTES
        for layer, end in enumerate(self._ends[:-1], 1):
            least = max(LEAST_PART_BYTES, min(grown, (total - start) * blocks // 2))
            if (end - start) * blocks >= least and (total - end) * blocks >= LEAST_PART_BYTES:
                parts.append(layer)
                start, grown = end, min(2 * grown, MOST_PART_BYTES)
        return [*parts, len(self._ends)]

    def ends(self, parts: Sequence[int]) -> list[int]:
        """Byte of a block at which each of ``parts`` ends."""
        return [self._ends[layer - 1] for layer in parts]

    def split(self, started: Parts, parts: Sequence[int]) -> None:
        """A load was started in ``parts``."""
        load = _Split(started, parts)
        self._split.append(load)
        for place in self._unhooked:
            load.hold(place)

    def computes(self, layer: str) -> None:
        """A layer is about to be computed: what it reads comes first."""
        place = self._order.get(layer)
        if place is None or layer in self._ran:
            return
        self._ran.add(layer)
        for started in self._split:
            started.hold(place)

    def end(self) -> None:
        """The pass is enqueued. Raises RuntimeError if it did not wait for a layer's load."""
        missed = self._known - self._ran
        if self._split and missed:
            raise RuntimeError(
                f"vLLM computed layers {sorted(missed)} without calling their hooks: what they read is wrong"
            )
        if self._teaches:
            self._known = frozenset(self._ran)
            self._unhooked = frozenset(place for name, place in self._order.items() if name not in self._known)
        self.begin()


class _Split:
    """A load that is awaited in parts, each once."""

    def __init__(self, started: Parts, parts: Sequence[int]) -> None:
        self._started, self._parts = started, parts
        self._held: set[int] = set()

    def hold(self, layer: int) -> None:
        part = bisect_right(self._parts, layer)
        if part not in self._held:
            self._started.hold(part)
            self._held.add(part)


def _runs_by_layers(forward_context: Any) -> bool:
    """Whether attention runs outside of a graph, with its hooks."""
    mode = getattr(forward_context, "cudagraph_runtime_mode", None)
    return getattr(forward_context, "attn_metadata", None) is not None and getattr(mode, "name", "FULL") in MODES
