"""What the scheduler's side tells the workers of one step."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

__all__ = ["KVortexMetadata", "Load", "Store", "block_ids"]


def block_ids(ids: Iterable[int] = ()) -> array[int]:
    """Numbers of the engine's blocks, packed: 32 bits each."""
    return array("I", ids)


@dataclass(slots=True)
class Load:
    """Blocks of one request that are brought back."""

    ticket: int
    request_id: str
    background: bool
    """Whether the engine goes on without them and is told when they are there."""
    slots: bytes
    blocks: array[int]


@dataclass(slots=True)
class Store:
    """Blocks that are full after this step and are not kept yet."""

    ticket: int
    slots: bytes
    blocks: array[int]


@dataclass(slots=True)
class KVortexMetadata(KVConnectorMetadata):
    """The plans of one step; a few packed buffers, whatever the batch."""

    written: array[int] = field(default_factory=block_ids)
    """Blocks that the engine was given in this step: it, or a load, writes them."""
    loads: list[Load] = field(default_factory=list)
    store: Store | None = None
