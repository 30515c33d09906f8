"""What the commands share: sizes as people read them, and the pictures that they draw."""

import argparse
import importlib.util
from pathlib import Path

from kvortex._core import KVortexError


def size_of(count: int) -> str:
    """Bytes in the largest unit of which there is one: "3.5 GiB", "512.0 KiB"."""
    size, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{count} bytes" if units[0] == "bytes" else f"{size:.1f} {units[0]}"


def picture(text: str) -> Path:
    """The value of `--plot`: a file of a kind that can be drawn."""
    path = Path(text)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"{text!r} ends in none of .png, .svg, .pdf")
    return path


def need_matplotlib() -> None:
    """KVortexError before anything is measured that could not be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise KVortexError("--plot needs matplotlib: pip install 'kvortex[plot]' brings it")
