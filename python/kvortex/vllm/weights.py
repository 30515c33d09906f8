"""What tells one model's files from another's, without reading hundreds of gigabytes."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["ModelFiles", "files_of"]

FROM_FILES = ("auto", "safetensors", "fastsafetensors", "instanttensor", "pt", "npcache", "mistral", "hf", "gguf")
"""Ways of loading that take the weights from the model's own files, as they are."""

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")

NEUTRAL = ("tokenizer", "generation_config", "special_tokens", "added_tokens", "vocab", "chat_template")
"""Files whose names begin like this change texts and samples, and no key or value of given tokens."""

SAMPLE_BYTES = 1024
SAMPLES = 256
"""Samples of a file whose tensors are not known."""

_LONGEST_HEADER = 100 << 20


class ModelFiles(NamedTuple):
    """The files that a model was loaded from."""

    digest: bytes
    """Another one for other weights, another configuration or other code."""
    complete: bool
    """Whether that holds after a restart too: not if weights came from elsewhere, or from nowhere."""


def files_of(model: str, revision: str | None, download_dir: str | None, load_format: str) -> ModelFiles:
    """The files of ``model``, a folder, a file, or a name that was downloaded."""
    place = _place(model, revision, download_dir)
    names = sorted(os.listdir(place)) if os.path.isdir(place) else [""] if os.path.isfile(place) else []
    digest, weights = hashlib.sha256(), 0
    for name in names:
        path = os.path.join(place, name) if name else place
        if path.endswith(WEIGHTS):
            weights += 1
            digest.update(_line(name, _weights_evidence(path)))
        elif name.endswith((".json", ".py")) and not name.startswith(NEUTRAL):
            digest.update(_line(name, _content(path)))
    complete = weights > 0 and load_format.lower() in FROM_FILES
    if not complete:
        digest.update(_line(model, str(revision).encode()))
    return ModelFiles(digest.digest(), complete)


def _place(model: str, revision: str | None, download_dir: str | None) -> str:
    """Where the files of ``model`` are; ``model`` itself if nobody knows."""
    if os.path.exists(model):
        return model
    try:
        from huggingface_hub import snapshot_download

        return str(snapshot_download(model, revision=revision, cache_dir=download_dir, local_files_only=True))
    except (ImportError, OSError, ValueError):
        return model


def _line(name: str, content: bytes) -> bytes:
    return hashlib.sha256(name.encode()).digest() + hashlib.sha256(content).digest()


def _content(path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _weights_evidence(path: str) -> bytes:
    """Evidence of a large file. One that a hub has named by its content is known by that name, wherever it lies."""
    real = os.path.realpath(path)
    folder, name = os.path.split(real)
    if os.path.basename(folder) == "blobs" and re.fullmatch("[0-9a-f]{64}", name):
        return name.encode()
    stat = os.stat(real)
    # Samples alone would miss a change of a few rows, time and place alone a file that was copied with its times.
    seen = hashlib.sha256(repr((real, stat.st_size, stat.st_mtime_ns)).encode())
    with open(real, "rb") as file:
        for start in _sample_starts(file.fileno(), stat.st_size):
            seen.update(os.pread(file.fileno(), SAMPLE_BYTES, start))
    return seen.digest()


def _sample_starts(file: int, size: int) -> Iterator[int]:
    """Where to look: at the beginning and the middle of every tensor if they are known, else all over the file."""
    spans = _safetensors_spans(file, size)
    if not spans:
        yield from range(0, size, max(1, size // SAMPLES))
    for start, end in spans:
        yield start
        yield (start + end) // 2


def _safetensors_spans(file: int, size: int) -> list[tuple[int, int]]:
    """First and last byte of each tensor; none if the file has no such header."""
    length = int.from_bytes(os.pread(file, 8, 0), "little")
    if not 0 < length <= min(size - 8, _LONGEST_HEADER):
        return []
    try:
        header = json.loads(os.pread(file, length, 8))
        spans = [one["data_offsets"] for name, one in sorted(header.items()) if name != "__metadata__"]
        return [(8 + length + int(start), 8 + length + int(end)) for start, end in spans]
    except (ValueError, TypeError, KeyError, AttributeError):
        return []
