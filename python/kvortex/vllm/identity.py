"""What names a block: the engine's own block hashes, and what they leave out."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from typing import Any

from kvortex import Namespace, UnsupportedError

__all__ = ["KEY", "KeySource", "RequestKeys", "check_hashes", "namespace"]

log = logging.getLogger("kvortex.vllm")

KEY = 32
"""Bytes of a key."""


class RequestKeys:
    """The keys of one request's full blocks, packed, as far as they are known."""

    __slots__ = ("last", "packed")

    def __init__(self) -> None:
        self.packed = b""
        self.last = b""
        """The engine's hash of the last of them."""


class KeySource:
    """Turns the block hashes of requests into keys."""

    def __init__(self) -> None:
        self._adapters = Adapters()
        self._refused = False

    def extend(self, keys: RequestKeys, request: Any) -> bool:
        """Adds what the engine has hashed since. False if the request has other tokens than before, thus other keys."""
        hashes, known = request.block_hashes, len(keys.packed) // KEY
        same = not known or (len(hashes) >= known and hashes[known - 1] == keys.last)
        if not same:
            keys.packed, known = b"", 0
        fresh = hashes[known:]
        if fresh and self._are_digests(fresh):
            added = self._identify(fresh, request.lora_request)
            if added:
                keys.packed += added
                keys.last = fresh[-1]
        return same

    def _are_digests(self, fresh: list[bytes]) -> bool:
        if len(fresh[0]) != KEY and not self._refused:
            self._refused = True
            log.error(
                "block hashes have %d bytes and KVortex needs SHA-256: start vLLM with "
                "--prefix-caching-hash-algo sha256; nothing is kept",
                len(fresh[0]),
            )
        return not self._refused

    def _identify(self, fresh: list[bytes], lora_request: Any) -> bytes:
        """The keys of hashed blocks; none while nobody knows what adapter they were computed with."""
        if lora_request is None:
            return b"".join(fresh)
        digest = self._adapters.digest(lora_request)
        return b"" if digest is None else b"".join(hashlib.sha256(digest + one).digest() for one in fresh)


class Adapters:
    """Digests of LoRA adapters' files, read in the background.

    Until an adapter's digest is known its requests are misses, and so they are once its files have changed under the
    same number: nobody knows which weights the engine then holds.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[tuple[int, str], tuple[tuple[Any, ...], bytes]] = {}
        self._reading: set[tuple[int, str]] = set()

    def digest(self, lora_request: Any) -> bytes | None:
        """Digest of the adapter's weights; None if its blocks are neither kept nor found."""
        which = (int(lora_request.lora_int_id), str(lora_request.lora_path))
        evidence = _evidence(which[1])
        with self._lock:
            if which in self._known:
                seen, digest = self._known[which]
                return digest if seen == evidence else None
            if evidence and which not in self._reading:
                self._reading.add(which)
                threading.Thread(target=self._read, args=(which, evidence), daemon=True).start()
        return None

    def _read(self, which: tuple[int, str], evidence: tuple[Any, ...]) -> None:
        digest = hashlib.sha256()
        try:
            for name, *_ in evidence:
                with open(os.path.join(which[1], name), "rb") as file:
                    content = hashlib.file_digest(file, "sha256").digest()
                digest.update(hashlib.sha256(name.encode()).digest() + content)
        except OSError as error:
            log.warning("the adapter in %s cannot be read (%s); its blocks are not kept", which[1], error)
            return
        if _evidence(which[1]) == evidence:
            with self._lock:
                self._known[which] = (evidence, digest.digest())


def _evidence(path: str) -> tuple[Any, ...]:
    """Name, inode, size and time of each file of a folder; empty where there is none."""
    try:
        found = [(entry.name, entry.stat()) for entry in os.scandir(path) if entry.is_file()]
    except OSError:
        return ()
    return tuple(sorted((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found))


def check_hashes(cache_config: Any) -> None:
    """Raises UnsupportedError unless the engine names blocks by SHA-256."""
    if not cache_config.enable_prefix_caching:
        raise UnsupportedError("prefix caching is off and KVortex needs its block hashes: --enable-prefix-caching")
    algorithm = str(cache_config.prefix_caching_hash_algo)
    if algorithm not in ("sha256", "sha256_cbor"):
        raise UnsupportedError(
            f"--prefix-caching-hash-algo is {algorithm}, whose hashes may collide: use sha256 or sha256_cbor"
        )


def namespace(vllm_config: Any, layout: Any, version: str) -> Namespace:
    """The namespace of the engine's blocks, the same in the scheduler and in every rank."""
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    return Namespace(
        host="vllm",
        version=version,
        model=str(model.model),
        revision=str(model.revision or ""),
        dtype=str(model.dtype),
        quantization=str(model.quantization or ""),
        cache_dtype=str(cache.cache_dtype),
        hashes=str(cache.prefix_caching_hash_algo),
        block_tokens=layout.block_tokens,
        block_size_bytes=layout.block_size_bytes,
        tensor_parallel_size=parallel.tensor_parallel_size,
        layers=[f"{name}: {spec!r}" for name, spec in sorted(layout.layers.items())],
    )
