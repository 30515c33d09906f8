"""Blocks whose bytes follow from their keys, so that a byte served under another key is seen."""

import functools
import hashlib

import numpy as np

BLOCK = 5000  # no multiple of a page, a cache line or 8


def key_of(*name):
    """A key for any name."""
    return hashlib.sha256(repr(name).encode()).digest()


def keys_of(count, *name):
    """`count` keys of one family."""
    return [key_of(*name, i) for i in range(count)]


@functools.cache
def block_of(key, size=BLOCK):
    """The bytes that belong to `key`, as a read-only array."""
    return np.frombuffer(hashlib.shake_128(key).digest(size), np.uint8)


def blocks_of(keys, size=BLOCK):
    """The blocks of `keys`, one row each."""
    return np.stack([block_of(key, size) for key in keys]) if keys else np.empty((0, size), np.uint8)
