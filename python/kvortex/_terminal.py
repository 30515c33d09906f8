"""What the commands share: sizes as people read them, and the pictures that they draw."""

import argparse
import importlib.util
from pathlib import Path

from kvortex._core import KVortexError


def gib(size: int) -> str:
    """Bytes as "3.5 GiB"."""
    return f"{size / 2**30:.1f} GiB"


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
