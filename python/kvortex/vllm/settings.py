"""What the connector reads from ``kv_connector_extra_config``: the knobs of the engine, and how to load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvortex import ConfigError, KVortexConfig

__all__ = ["LoadMode", "check_block_size", "read"]

MODES = ("auto", "sync", "async")

SMALL_LOAD_BYTES = 64 << 20
"""A load up to this goes inside the step: it takes about a millisecond."""

ASSUMED_BYTES_PER_S = 10e9
"""What followers of a load count on; twice the time is allowed."""


@dataclass(frozen=True)
class LoadMode:
    """When blocks are loaded inside the step that needs them, and when beside it."""

    name: str
    """``auto``, ``sync`` (inside) or ``async`` (beside)."""
    held_blocks: int | None = None
    """The most blocks that requests may hold which were loaded beside the steps and wait for their turn."""

    def is_background(self, nbytes: int, running: int) -> bool:
        """Whether to load ``nbytes`` beside the steps of ``running`` requests."""
        if self.name == "auto":
            return running > 0 and nbytes > SMALL_LOAD_BYTES
        return self.name == "async"

    def seconds(self, nbytes: int) -> float:
        """How long others wait for a load of ``nbytes``."""
        return 0.05 + 2 * nbytes / ASSUMED_BYTES_PER_S


def read(extra: Mapping[str, object], held_blocks: int | None) -> tuple[KVortexConfig, LoadMode]:
    """The configuration in ``extra``. ``auto`` means ``sync`` for an engine that reserves no room for loads.

    ``held_blocks`` is None for an engine that does, else what it can spare. Raises ConfigError for what is unknown or
    cannot work.
    """
    knobs = dict(extra)
    mode = str(knobs.pop("load_mode", "auto")).strip().lower()
    if mode not in MODES:
        raise ConfigError(f"load_mode = {mode!r}: give one of {', '.join(MODES)}")
    if mode == "auto" and held_blocks is not None:
        mode = "sync"
    config = KVortexConfig.of({**KVortexConfig.from_env().to_dict(), **knobs})
    return config, LoadMode(mode, held_blocks)


def check_block_size(config: KVortexConfig, block_size_bytes: int) -> None:
    """Raises ConfigError if a size is configured that the engine's blocks do not have."""
    if config.block_size_bytes not in (None, block_size_bytes):
        raise ConfigError(
            f"block_size_bytes = {config.block_size_bytes}: blocks of this engine have {block_size_bytes} on each "
            "rank; leave it out"
        )
