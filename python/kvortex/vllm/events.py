"""KV events: which blocks are in host memory, told to whoever listens to vLLM's."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.v1.core import kv_cache_utils

from kvortex.vllm.identity import KEY

if TYPE_CHECKING:
    from kvortex import RankPlanner

__all__ = ["EventSource", "are_wanted"]

log = logging.getLogger("kvortex.vllm")

MEDIUM = "CPU"
"""As vLLM's own offloading calls host memory."""

DESCRIBES_MORE = "extra_keys" in getattr(BlockStored, "__struct_fields__", ())
"""Whether events name the group and what else than tokens was hashed: since after 0.15.1."""


def are_wanted(vllm_config: Any) -> bool:
    """Whether the engine publishes KV events."""
    events = vllm_config.kv_events_config
    return events is not None and bool(events.enable_kv_cache_events)


@dataclass(slots=True)
class _Run:
    """Consecutive blocks of one request, as vLLM names them."""

    keys: list[bytes]
    hashes: list[bytes]
    parent: bytes | None
    tokens: list[int]
    extra_keys: Sequence[Any] | None
    lora: Any
    group: int


def _keys_in(packed: bytes) -> list[bytes]:
    return [packed[at : at + KEY] for at in range(0, len(packed), KEY)]


class EventSource:
    """Turns what the planner tells of changes into vLLM's events.

    A planner tells keys; events need the tokens and vLLM's hashes, which are noted when blocks are planned to be
    stored, and are dropped when that has ended.
    """

    def __init__(self, planner: RankPlanner, block_tokens: int) -> None:
        self._planner = planner
        self._block_tokens = block_tokens
        self._runs: dict[int, list[_Run]] = {}
        """By the ticket that stores them."""
        self._seen: list[_Run] = []
        """Runs since the last call of ``take``: blocks that were there already may be told of as well."""
        self._other_hashes: dict[bytes, tuple[bytes, int]] = {}
        """vLLM's hash, and the group, of blocks told of whose key is another: adapters and further groups."""
        planner.watch()

    def planned(self, ticket: int | None, runs: Iterable[tuple[Any, bytes, int, int]]) -> None:
        """Blocks are stored by ``ticket`` as far as they are not there: request, packed keys, first block, group."""
        try:
            described = [
                self._describe(request, _keys_in(packed), first, group) for request, packed, first, group in runs
            ]
        except Exception:
            log.exception("blocks cannot be described; their events will name them only")
            return
        self._seen.extend(described)
        if ticket is not None:
            self._runs[ticket] = described

    def _describe(self, request: Any, keys: list[bytes], first: int, group: int) -> _Run:
        size, hashes = self._block_tokens, request.block_hashes
        end = first + len(keys)
        return _Run(
            keys=keys,
            hashes=list(hashes[first:end]),
            parent=hashes[first - 1] if first else None,
            tokens=list(request.all_token_ids[first * size : end * size]),
            extra_keys=self._extra_keys(request, first, end) if DESCRIBES_MORE else None,
            lora=request.lora_request,
            group=group,
        )

    def _extra_keys(self, request: Any, first: int, end: int) -> Sequence[Any] | None:
        found, image = [], 0
        for block in range(first, end):
            start = block * self._block_tokens
            extra, image = kv_cache_utils.generate_block_hash_extra_keys(
                request, start, start + self._block_tokens, image
            )
            found.append(extra)
        return found

    def take(self) -> list[Any]:
        """Events since the last call: first what was forgotten."""
        stored, removed, ended = self._planner.take_changes()
        seen, self._seen = self._seen, []
        runs = [run for ticket, _ in ended for run in self._runs.pop(ticket, ())]
        events = self._removed(_keys_in(removed)) if removed else []
        if stored:
            events.extend(self._stored(set(_keys_in(stored)), [*runs, *seen]))
        return events

    def _removed(self, keys: list[bytes]) -> list[Any]:
        by_group: dict[int, list[Any]] = {}
        for key in keys:
            name, group = self._other_hashes.pop(key, (key, 0))
            by_group.setdefault(group, []).append(kv_cache_utils.maybe_convert_block_hash(name))
        return [
            BlockRemoved(block_hashes=hashes, medium=MEDIUM, **({"group_idx": group} if DESCRIBES_MORE else {}))
            for group, hashes in by_group.items()
        ]

    def _stored(self, keys: set[bytes], runs: list[_Run]) -> Iterator[Any]:
        """One event for each stretch of a run that is there; blocks of which nothing was noted by themselves."""
        for run in runs:
            start = 0
            for at, key in enumerate([*run.keys, None]):
                if key in keys:
                    keys.discard(key)
                    continue
                if at > start:
                    yield self._stretch(run, start, at)
                start = at + 1
        for key in keys:
            yield self._event([key], None, [], 0, 0)

    def _stretch(self, run: _Run, start: int, end: int) -> Any:
        size, hashes = self._block_tokens, run.hashes[start:end]
        named = zip(run.keys[start:end], hashes, strict=True)
        self._other_hashes |= {key: (name, run.group) for key, name in named if key != name}
        parent = run.hashes[start - 1] if start else run.parent
        tokens = run.tokens[start * size : end * size]
        extra = run.extra_keys[start:end] if run.extra_keys is not None else None
        return self._event(hashes, parent, tokens, size, run.group, run.lora, extra)

    @staticmethod
    def _event(
        hashes: list[bytes],
        parent: bytes | None,
        tokens: list[int],
        block_size: int,
        group: int,
        lora: Any = None,
        extra_keys: Sequence[Any] | None = None,
    ) -> Any:
        convert = kv_cache_utils.maybe_convert_block_hash
        more: dict[str, Any] = {}
        if DESCRIBES_MORE:
            more = {"extra_keys": kv_cache_utils.to_event_extra_keys(extra_keys), "group_idx": group}
        return BlockStored(
            block_hashes=[convert(one) for one in hashes],
            parent_block_hash=None if parent is None else convert(parent),
            token_ids=tokens,
            block_size=block_size,
            lora_id=None if lora is None else lora.adapter_id,
            medium=MEDIUM,
            lora_name=None if lora is None else lora.name,
            **more,
        )
