"""What a request asks of KVortex in its ``kv_transfer_params``."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["LOADED_TOKENS", "Ignored", "Wishes", "read", "terms"]

log = logging.getLogger("kvortex.vllm")

PREFIX = "kvortex_"
"""Keys that begin with it are ours; all others are some other connector's."""

LOADED_TOKENS = "kvortex_loaded_tokens"
"""What answers carry. A client may send an answer's parameters with its next request."""

PRIORITIES = {"low": 0, "normal": 1, "high": 2}

LONGEST_S = 366 * 24 * 3600


@dataclass(frozen=True, slots=True)
class Wishes:
    """What one request asks for."""

    store: bool = True
    load: bool = True
    priority: int = PRIORITIES["normal"]
    ttl_ms: int | None = None
    """How long its blocks are kept after they were stored, or None for as long as there is room."""
    report: bool = False
    """Whether the answer says how many tokens were loaded, and from where."""

    @property
    def is_particular(self) -> bool:
        """Whether its blocks are to be kept on other than the usual terms."""
        return self.priority != PRIORITIES["normal"] or self.ttl_ms is not None


DEFAULT = Wishes()


@dataclass(frozen=True, slots=True)
class Ignored:
    """How many parameters of ours could not be used."""

    values: int = 0
    keys: int = 0


class _BadValueError(ValueError):
    pass


def _flag(value: object) -> bool:
    if type(value) is bool:
        return value
    raise _BadValueError


def _priority(value: object) -> int:
    if type(value) is str and value in PRIORITIES:
        return PRIORITIES[value]
    if type(value) is int and -1 <= value <= 1:
        return PRIORITIES["normal"] + value
    raise _BadValueError


def _ttl_ms(value: object) -> int:
    if (type(value) is int or type(value) is float) and 0 < value <= LONGEST_S:
        return math.ceil(value * 1000)
    raise _BadValueError


FIELDS = {
    "kvortex_store": ("store", _flag),
    "kvortex_load": ("load", _flag),
    "kvortex_priority": ("priority", _priority),
    "kvortex_ttl_s": ("ttl_ms", _ttl_ms),
    "kvortex_report": ("report", _flag),
}


def read(given: Any) -> tuple[Wishes, Ignored]:
    """What ``given`` asks for, and what of it is ignored: values that cannot be used, and unknown keys of ours.

    Never raises: a request is served as if it had not asked for what cannot be understood.
    """
    if given is None:
        return DEFAULT, Ignored()
    try:
        return _read(given)
    except Exception:
        log.exception("the kv_transfer_params of a request cannot be read; it is served without")
        return DEFAULT, Ignored(values=1)


def _read(given: Any) -> tuple[Wishes, Ignored]:
    if not issubclass(type(given), dict):
        return DEFAULT, Ignored(values=1)
    wishes: dict[str, Any] = {}
    values = keys = 0
    for key, value in dict(given).items():
        if type(key) is not str or not key.startswith(PREFIX) or key == LOADED_TOKENS:
            continue
        if key not in FIELDS:
            keys += 1
            continue
        name, parse = FIELDS[key]
        try:
            wishes[name] = parse(value)
        except _BadValueError:
            values += 1
    return replace(DEFAULT, **wishes) if wishes else DEFAULT, Ignored(values, keys)


Terms = list[tuple[int, int, int | None]]
"""Runs of keys with the same terms, as a planner takes them: how many, their priority, until which millisecond."""


def terms(runs: Iterable[tuple[int, Wishes]], now_ms: int) -> Terms:
    """The terms of runs of keys, as a planner takes them."""
    return [
        (count, wishes.priority, None if wishes.ttl_ms is None else now_ms + wishes.ttl_ms) for count, wishes in runs
    ]
