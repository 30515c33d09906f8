"""What a model that computes nothing keeps: the KV of a position is a function of all tokens up to it, so that whoever
reads it knows whether it is right, and the token after a prefix follows from it as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from vllm.v1.request import Request

import vllm

NEW = not vllm.__version__.startswith("0.15")
HEADS, SIZE, BLOCK = 2, 4, 16
LAYER_BYTES = 2 * HEADS * SIZE * BLOCK * 4
"""Of one block."""
LONGEST = 512
CHAIN, MASK = 1000003, 0x7FFFFFFF
SALTS = [np.random.default_rng(layer).integers(1, 1 << 30, 2 * HEADS * SIZE, dtype=np.int32) for layer in range(16)]


@dataclass(frozen=True)
class Layer:
    """One layer: its number in the model, its group, and its place among the tensors that the groups share."""

    number: int
    group: int
    place: int

    @property
    def name(self):
        """As vLLM calls it."""
        return f"model.layers.{self.number}.self_attn.attn"


@dataclass(frozen=True)
class Shape:
    """The layers of a model: of each group how many tokens a token sees (0: all), and how many layers there are."""

    windows: tuple[int, ...]
    counts: tuple[int, ...]
    pools: tuple[int, ...]
    """Numbers of blocks that an engine may have."""
    drafter: int | None = None
    """The group of a drafter's layers: what they keep of a position depends on the next token too."""

    @property
    def places(self):
        """Tensors: each holds a layer of every group."""
        return max(self.counts)

    @property
    def layers(self):
        """In the order of the model, which takes turns."""
        pairs = [
            (place, group) for place in range(self.places) for group, count in enumerate(self.counts) if place < count
        ]
        return [Layer(number, group, place) for number, (place, group) in enumerate(pairs)]


SHAPES = {
    "one group": Shape((0,), (3,), (36, 44, 60)),
    "one window": Shape((41,), (3,), (36, 44, 60)),
    "equal groups": Shape((0, 32), (3, 3), (48, 60, 84)),
    "five to one": Shape((0, 48, 48, 48, 48, 48), (2,) * 6, (110, 130, 170)),
    "uneven": Shape((0, 41, 66), (3, 3, 2), (64, 80, 110)),
    "with a drafter": Shape((0, 48, 0), (2, 2, 1), (70, 90, 120), drafter=2),
}
"""A window of 66 tokens reaches into a block by one token; its group has fewer layers than the others."""


class Wrong(AssertionError):
    """A model would have read, or a request would be given, wrong bytes."""


def chain_of(tokens, before=0):
    """A number for each position that depends on all tokens up to it."""
    out = np.empty(len(tokens), np.int64)
    for i, token in enumerate(tokens):
        before = (before * CHAIN + token + 7) & MASK
        out[i] = before
    return out


def token_after(number):
    """The token that the model samples after a prefix."""
    return int(number % 50000)


def words_of(chain, layer):
    """The words of each position in a layer, shape (positions, 2 * HEADS * SIZE)."""
    return chain.astype(np.int32)[:, None] ^ SALTS[layer][None, :]


@dataclass
class Tracked:
    """A request and the chain of its tokens: those of the prompt, then what follows from them."""

    request: Request
    numbers: np.ndarray = field(default_factory=lambda: np.zeros(LONGEST, np.int64))
    known: int = 0
    named: int = 0
    """Blocks whose names have been noted."""

    def chain(self, count):
        """The numbers of the first ``count`` positions."""
        if count > self.known:
            before = int(self.numbers[self.known - 1]) if self.known else 0
            tokens = self.request.prompt_token_ids[self.known : count]
            numbers = self.numbers[self.known : count]
            numbers[: len(tokens)] = chain_of(tokens, before)
            for i in range(len(tokens), len(numbers)):
                before = int(numbers[i - 1]) if i else before
                numbers[i] = (before * CHAIN + token_after(before) + 7) & MASK
            self.known = count
        return self.numbers[:count]

    def token(self, at):
        """The token at a position."""
        prompt = self.request.prompt_token_ids
        return prompt[at] if at < len(prompt) else token_after(self.chain(at)[-1])


def kv_tensors(blocks, layout, shape=SHAPES["one group"]):
    """The tensors to register, and a view of each with shape (block, offset, words...)."""
    tensors, views = [], []
    together = torch.zeros(blocks, shape.places if layout == "BLHNC" else 0, HEADS, BLOCK, 2 * SIZE)
    for place in range(shape.places):
        if layout == "BLHNC":
            tensor = together[:, place]
        elif NEW and layout == "NHD":
            tensor = torch.zeros(blocks, BLOCK, HEADS, 2 * SIZE).transpose(1, 2)
        elif NEW:
            tensor = torch.zeros(blocks, HEADS, BLOCK, 2 * SIZE)
        elif layout == "NHD":
            tensor = torch.zeros(2, blocks, BLOCK, HEADS, SIZE)
        else:
            tensor = torch.zeros(blocks, 2, BLOCK, HEADS, SIZE)
        tensors.append(tensor)
        words = tensor.view(torch.int32).numpy()
        if NEW:
            views.append(words.transpose(0, 2, 1, 3))
        else:
            views.append(words.transpose(1, 2, 0, 3, 4) if layout == "NHD" else words.transpose(0, 2, 1, 3, 4))
    return {layer.name: tensors[layer.place] for layer in shape.layers}, views
