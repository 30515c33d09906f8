"""What names a block: the engine's own block hashes, and what they leave out."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from typing import Any, NamedTuple

from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils

from kvortex import Namespace, UnsupportedError
from kvortex.vllm.weights import ModelFiles, files_of

__all__ = ["KEY", "EngineIdentity", "KeySource", "RequestKeys", "check_hashes", "identify"]

log = logging.getLogger("kvortex.vllm")

KEY = 32
"""Bytes of a key."""

ALGORITHMS = ("sha256", "sha256_cbor")


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
        self._root_is_fixed: bool | None = None

    @property
    def survives_restart(self) -> bool | None:
        """Whether the same tokens have the same keys in other processes; None until the first keys were made."""
        return self._root_is_fixed

    def extend(self, keys: RequestKeys, request: Any) -> bool:
        """Adds what the engine has hashed since. False if the request has other tokens than before, thus other keys."""
        hashes, known = request.block_hashes, len(keys.packed) // KEY
        same = not known or (len(hashes) >= known and hashes[known - 1] == keys.last)
        if not same:
            keys.packed, known = b"", 0
        fresh = hashes[known:]
        if added := self.keys(fresh, request.lora_request):
            keys.packed += added
            keys.last = fresh[-1]
        return same

    def keys(self, hashes: list[bytes], lora_request: Any) -> bytes:
        """The packed keys of hashed blocks; none while nobody knows what adapter they were computed with."""
        if not hashes or not self._are_digests(hashes):
            return b""
        if lora_request is None:
            return b"".join(hashes)
        digest = self._adapters.digest(lora_request)
        return b"" if digest is None else b"".join(hashlib.sha256(digest + one).digest() for one in hashes)

    def _are_digests(self, fresh: list[bytes]) -> bool:
        if len(fresh[0]) != KEY and not self._refused:
            self._refused = True
            log.error(
                "block hashes have %d bytes and KVortex needs SHA-256: start vLLM with "
                "--prefix-caching-hash-algo sha256; nothing is kept",
                len(fresh[0]),
            )
        elif self._root_is_fixed is None:
            # Not before: vLLM chooses the root after it has made the connector.
            self._root_is_fixed = root_is_fixed()
            if not self._root_is_fixed:
                log.info(
                    "block hashes begin at random in each process, so blocks can be kept in host memory only: to keep "
                    "them for the next start, set PYTHONHASHSEED to the same number for every start"
                )
        return not self._refused


def root_is_fixed() -> bool:
    """Whether vLLM's block hashes begin with what another process begins with."""
    seeds = (os.environ.get("PYTHONHASHSEED"), getattr(kv_cache_utils, "DEFAULT_NONE_HASH_SEED", None))
    hashes = [get_hash_fn_by_name(name) for name in ALGORITHMS]
    root = getattr(kv_cache_utils, "NONE_HASH", None)
    return root in [hash_of(seed) for hash_of in hashes for seed in seeds if seed is not None]


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
    if algorithm not in ALGORITHMS:
        raise UnsupportedError(
            f"--prefix-caching-hash-algo is {algorithm}, whose hashes may collide: use sha256 or sha256_cbor"
        )


class EngineIdentity(NamedTuple):
    """What the engine's blocks are, the same in the scheduler and in every rank."""

    namespace: Namespace
    survives_restart: bool
    """Whether equal namespaces mean equal KV in other processes too: else blocks are kept in host memory only."""


def identify(vllm_config: Any, layout: Any, version: str, name: str = "") -> EngineIdentity:
    """What makes KV incompatible and is not in the engine's block hashes, and the operator's ``name`` for all that."""
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    drafter = getattr(vllm_config.speculative_config, "draft_model_config", None)
    files = [_files(one, vllm_config.load_config) for one in (model, drafter) if one is not None]
    # Of what the first request happens to be, in each process.
    calculates_scales = bool(getattr(cache, "calculate_kv_scales", False))
    overrides, are_plain = _plain(getattr(model, "hf_overrides", None))
    namespace = Namespace(
        host="vllm",
        name=name,
        version=version,
        files=[one.digest for one in files],
        overrides=overrides,
        revisions=[str(model.revision), str(model.code_revision), str(model.hf_config_path)],
        implementation=str(model.model_impl),
        longest=model.max_model_len if _depends_on_longest(model.hf_config) else 0,
        dtype=str(model.dtype),
        quantization=str(model.quantization),
        cache_dtype=str(cache.cache_dtype),
        cache_scales=calculates_scales,
        cache_layout=str(getattr(cache, "kv_cache_layout", None)),
        hashes=str(cache.prefix_caching_hash_algo),
        block_tokens=layout.block_tokens,
        block_size_bytes=layout.block_size_bytes,
        tensor_parallel_size=parallel.tensor_parallel_size,
        layers=[
            f"{index}: {name}: {layout.layer_bytes[name]}: {group.spec}"
            for index, group in enumerate(layout.groups)
            for name in sorted(group.layers)
        ],
    )
    survives_restart = are_plain and not calculates_scales and all(one.complete for one in files)
    return EngineIdentity(namespace, survives_restart)


def _files(model: Any, load: Any) -> ModelFiles:
    # What is streamed from elsewhere is not in the folder that `model` then names.
    load_format = "streamed" if getattr(model, "model_weights", "") else str(load.load_format)
    return files_of(str(model.model), model.revision, load.download_dir, load_format)


def _plain(overrides: Any) -> tuple[str, bool]:
    """The overrides of a model's configuration as text, and whether that says all: a function could do anything."""
    try:
        return json.dumps(overrides, sort_keys=True), True
    except (TypeError, ValueError):
        return "a function", False


def _depends_on_longest(hf_config: Any) -> bool:
    """Whether rotary frequencies are chosen by the longest context that the engine serves."""
    return "longrope" in str(getattr(hf_config, "rope_parameters", "")) + str(getattr(hf_config, "rope_scaling", ""))
