"""Loads that arrive layer by layer: which hooks may be counted on, and what each of them waits for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvortex import Parts

__all__ = ["LayerHooks"]


class LayerHooks:
    """The hooks of single layers, which a replayed full CUDA graph does not call.

    A load is split by layers only in a step whose forward context shows that layers run one by one, and only after an
    earlier load, awaited as a whole, was followed by the hooks of its step. What had no hook then is awaited up front.
    """

    def __init__(self, part_of: Mapping[str, int], part_bytes: Sequence[int]) -> None:
        """``part_of`` has the part of each layer's blocks, ``part_bytes`` the bytes of each part of a block."""
        self.ends = [sum(part_bytes[: index + 1]) for index in range(len(part_bytes))]
        """Byte of a block at which each part ends."""
        self._part_of = part_of
        self._known: frozenset[int] = frozenset()
        self._ran: set[int] = set()
        self._split: list[Parts] = []
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
        return by_layers and len(self._known) > 1

    def split(self, parts: Parts) -> None:
        """A load was started in these parts."""
        self._split.append(parts)
        for index in range(len(self.ends)):
            if index not in self._known:
                parts.hold(index)

    def computes(self, layer: str) -> None:
        """A layer is about to be computed: what it reads comes first."""
        index = self._part_of.get(layer)
        if index is None or index in self._ran:
            return
        self._ran.add(index)
        if index in self._known:
            for parts in self._split:
                parts.hold(index)

    def end(self) -> None:
        """The pass is enqueued. Raises RuntimeError if it did not wait for a layer's load."""
        missed = self._known - self._ran
        if self._split and missed:
            names = sorted(name for name, index in self._part_of.items() if index in missed)
            raise RuntimeError(f"vLLM computed layers {names} without calling their hooks: what they read is wrong")
        if self._teaches:
            self._known = frozenset(self._ran)
        self.begin()


def _runs_by_layers(forward_context: Any) -> bool:
    """Whether attention runs outside of a graph, with its hooks."""
    mode = getattr(forward_context, "cudagraph_runtime_mode", None)
    return getattr(forward_context, "attn_metadata", None) is not None and getattr(mode, "name", "FULL") in MODES


MODES = ("NONE", "PIECEWISE")
