"""What makes the KV of a transformers model its own: weights, configuration, code, and the shape of its cache.

The identity becomes a Namespace. It is computed once and again whenever cheap evidence (address, version counter, shape
of each tensor, the modules' plain attributes, the configuration) has moved since.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn, TypeAlias

import torch
import transformers
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvortex import Namespace, UnsupportedError

# What transformers says about the types of its models and caches changes from release to release.
_Model: TypeAlias = Any

FORMAT = 1
_WORDS_PER_SUM = 1 << 18
# Where these attributes differ the keys and values do not.
_NEUTRAL = {"name_or_path", "_name_or_path"}
_PLAIN = frozenset((bool, int, float, str))
_EVERY_MODULE_HAS = frozenset(vars(torch.nn.Module()))
# Their rotary frequencies depend on the longest position of the whole batch, so a prefix has no KV of its own.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope", "su")


def refuse(what: str, remedy: str) -> NoReturn:
    """Raise UnsupportedError for something that would otherwise end in wrong text."""
    raise UnsupportedError(f"the prefix cache does not support {what}; {remedy}")


class Segment(NamedTuple):
    """The keys or the values of one layer: what each token contributes to a block."""

    heads: int
    width: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in this segment."""
        return self.heads * self.width * self.dtype.itemsize

    def describe(self) -> tuple[int, int, str]:
        """What the Namespace says about the segment; the device does not change the bytes."""
        return self.heads, self.width, str(self.dtype)


class _Seen(NamedTuple):
    """One look at a model: its tensors by name, and everything about it that is plain text or a number."""

    tensors: dict[str, torch.Tensor]
    facts: tuple[Any, ...]
    training: bool


def _own_attributes(module: torch.nn.Module) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in vars(module).items() if name not in _EVERY_MODULE_HAS]


def _plain(attributes: list[tuple[str, Any]]) -> tuple[tuple[str, Any], ...]:
    return tuple(
        (name, value) for name, value in attributes if type(value) in _PLAIN and name[0] != "_" and name not in _NEUTRAL
    )


def _hooks(module: torch.nn.Module, own: int) -> tuple[int, ...]:
    """Numbers of the forward hooks other than our own; torch gives every registration a new one."""
    return tuple(number for number in (*module._forward_pre_hooks, *module._forward_hooks) if number != own)


def _tensors(module: torch.nn.Module, attributes: list[tuple[str, Any]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, buffers, and tensors that are neither."""
    for name, value in (*module._parameters.items(), *module._buffers.items(), *attributes):
        if isinstance(value, torch.Tensor):
            yield name, value


def _look(model: _Model, own_hook: int) -> _Seen:
    tensors: dict[str, torch.Tensor] = {}
    facts: list[Any] = [_configuration(model)]
    training = False
    for path, module in model.named_modules():
        training |= module.training
        kind, own = type(module), _own_attributes(module)
        facts.append((path, kind.__module__, kind.__qualname__, _plain(own), _hooks(module, own_hook)))
        tensors.update((f"{path}.{name}", tensor) for name, tensor in _tensors(module, own))
    facts += [(name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in tensors.items()]
    return _Seen(tensors, tuple(facts), training)


def _configuration(model: _Model) -> str:
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NEUTRAL}
    config["attn_implementation"] = getattr(model.config, "_attn_implementation", None)
    return json.dumps(config, sort_keys=True, default=str)


def _evidence(tensor: torch.Tensor) -> tuple[Any, ...]:
    # An inference tensor counts no versions, so nothing proves that it is as it was: its evidence equals no other.
    version = object() if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr(), version


def _multipliers(device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(FORMAT)
    drawn = torch.randint(-(1 << 62), 1 << 62, (_WORDS_PER_SUM,), generator=generator)
    # Odd: then a change of any single word changes the sum, whatever it was.
    return (drawn | 1).to(device)


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor as 64-bit words, filled up with zeros."""
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    missing = -content.numel() % 8
    if missing or content.storage_offset() % 8:
        content = torch.cat([content, content.new_zeros(missing)])
    return content.view(torch.int64)


def checksum(tensor: torch.Tensor, multipliers: torch.Tensor) -> bytes:
    """A digest of every byte of a tensor: integer sums, so the same on each device, at the speed of its memory."""
    sums = [(words * multipliers[: len(words)]).sum() for words in torch.split(_words(tensor), _WORDS_PER_SUM)]
    kind = f"{tuple(tensor.shape)} {tensor.dtype}".encode()
    return hashlib.sha256(kind + repr(torch.stack(sums).tolist()).encode()).digest()


class ModelIdentity:
    """The Namespace of a model's KV and the segments of its blocks, kept true to the model as it changes."""

    def __init__(self, model: _Model, block_tokens: int, own_hook: int) -> None:
        self._model = model
        self._block_tokens = block_tokens
        self._own_hook = own_hook
        self._lock = threading.Lock()
        self._facts: tuple[Any, ...] | None = None
        self._digests: dict[str, tuple[tuple[Any, ...], bytes]] = {}
        self._namespace: Namespace | None = None
        self.segments: tuple[Segment, ...] = ()

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self._block_tokens * sum(segment.token_bytes for segment in self.segments)

    def current(self) -> Namespace | None:
        """The Namespace of the model as it is now; None in training mode, where dropout makes KV random."""
        with self._lock:
            seen = _look(self._model, self._own_hook)
            facts_moved = seen.facts != self._facts
            if facts_moved:
                refuse_model(self._model, seen.tensors)
            if seen.training:
                return None
            if facts_moved:
                self.segments = probe(self._model)
            if self._renew_digests(seen.tensors) or facts_moved:
                self._namespace, self._facts = self._compose(seen), seen.facts
            return self._namespace

    def forget(self) -> None:
        """Trust nothing that was seen before."""
        with self._lock:
            self._facts, self._namespace = None, None
            self._digests.clear()

    def _renew_digests(self, tensors: dict[str, torch.Tensor]) -> bool:
        """Digest the tensors whose evidence moved; whether there were any."""
        evidence = {name: _evidence(tensor) for name, tensor in tensors.items()}
        moved = [name for name, now in evidence.items() if self._digests.get(name, ((), b""))[0] != now]
        gone = self._digests.keys() - tensors.keys()
        if moved:
            multipliers = _multipliers(tensors[moved[0]].device)
            self._digests |= {name: (evidence[name], checksum(tensors[name], multipliers)) for name in moved}
        for name in gone:
            del self._digests[name]
        return bool(moved or gone)

    def _compose(self, seen: _Seen) -> Namespace:
        weights = hashlib.sha256()
        for name in sorted(self._digests):
            weights.update(name.encode() + b"\0" + self._digests[name][1])
        return Namespace(
            format=FORMAT,
            engine="transformers",
            version=transformers.__version__,
            model=type(self._model).__qualname__,
            facts=hashlib.sha256(repr(seen.facts).encode()).digest(),
            weights=weights.digest(),
            segments=tuple(segment.describe() for segment in self.segments),
            block_tokens=self._block_tokens,
        )


def refuse_model(model: _Model, tensors: dict[str, torch.Tensor]) -> None:
    """Raise UnsupportedError, naming the reason, for a model whose prefix KV cannot be kept."""
    refuse_generator(model)
    _refuse_modules(model)
    _refuse_rope(model)
    _refuse_placement(tensors)


def refuse_generator(model: _Model) -> None:
    """Raise UnsupportedError for a class of model that is no plain text generator."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
        refuse(f"{name}", "give attach() a transformers model that generates text")
    if model.config.is_encoder_decoder:
        refuse(f"the encoder-decoder model {name}", "use a decoder-only model")
    if type(model).generate is not GenerationMixin.generate:
        refuse(f"{name}, which brings its own generate()", "use a model with the generate() of transformers")
    if model.main_input_name != "input_ids" or getattr(model, "_is_stateful", False):
        refuse(f"{name}, whose state is more than the keys and values of tokens", "use a full-attention text model")


def _refuse_modules(model: _Model) -> None:
    for module in model.modules():
        if type(module).__module__.split(".")[0] == "peft":
            refuse(f"the PEFT adapter {type(module).__name__}", "merge it into the model first (merge_and_unload())")
        if getattr(module, "_compiled_call_impl", None) is not None:
            refuse("a compiled model", "attach the model before compiling it, and leave it uncompiled")


def _rope_types(config: dict[str, Any], inside: bool = False) -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _rope_types(value, inside or key.startswith("rope"))
        elif inside and key in ("rope_type", "type"):
            yield str(value)


def _refuse_rope(model: _Model) -> None:
    for rope_type in _rope_types(model.config.to_dict()):
        if rope_type.startswith(_LENGTH_DEPENDENT_ROPE):
            refuse(f"{rope_type} rope, whose keys change with the length of the prompt", "use a fixed rope scaling")


def _refuse_placement(tensors: dict[str, torch.Tensor]) -> None:
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) > 1 or torch.device("meta") in devices:
        places = ", ".join(sorted(map(str, devices)))
        refuse(f"a model spread or offloaded over {places}", "load it on one device, without device_map offloading")
    for name, tensor in tensors.items():
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or hasattr(tensor, "ds_id"):
            refuse(f"the {type(tensor).__name__} weights of {name}", "load the model with plain, whole tensors")
        if tensor.layout is not torch.strided:
            refuse(f"the {tensor.layout} weights of {name}", "load the model with dense weights")


def probe(model: _Model) -> tuple[Segment, ...]:
    """Run two rows of two tokens and read from the cache what the model really keeps."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    try:
        returned = _run_two_tokens(model, cache)
    except Exception as error:
        reason = f"{type(model).__name__}, which fails on a dynamic cache ({type(error).__name__}: {error})"
        raise UnsupportedError(f"the prefix cache does not support {reason}") from error
    if returned is not cache:
        refuse(f"{type(model).__name__}, which brings its own cache", "use a full-attention text model")
    refuse_cache(cache)
    for number, layer in enumerate(cache.layers):
        _check_layer(number, layer)
    return tuple(segment_of(kept) for layer in cache.layers for kept in (layer.keys, layer.values))


def _run_two_tokens(model: _Model, cache: Any) -> Any:
    tokens = torch.tensor([[0, 0], [0, 1]], device=model.device)
    with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        output = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), past_key_values=cache, use_cache=True)
    return output.past_key_values


def refuse_cache(cache: Any) -> None:
    """Raise UnsupportedError unless every layer of a cache keeps the keys and values of all tokens."""
    if cache is None:
        refuse("a model that brings its own cache", "use a full-attention text model")
    if type(cache) is not DynamicCache or cache.offloading:
        refuse(f"the cache class {type(cache).__name__}", 'leave cache_implementation unset (or "dynamic")')
    for number, layer in enumerate(cache.layers):
        if type(layer) is not DynamicLayer:
            refuse(f"layer {number} with a {type(layer).__name__}", "use a model whose layers all have full attention")


def _check_layer(number: int, layer: Any) -> None:
    if layer.get_seq_length() != 2 or layer.keys.dim() != 4 or layer.values.dim() != 4:
        refuse(f"layer {number}, which keeps no keys and values of its own", "use a full-attention text model")
    for kept in (layer.keys, layer.values):
        # The rows differ in their second token only, so their first must have the same KV, but for rounding.
        tolerance = min(1024 * torch.finfo(kept.dtype).eps, 0.05) * kept.abs().max()
        if ((kept[0, :, 0] - kept[1, :, 0]).abs() > tolerance).any():
            refuse(f"layer {number}, whose KV depends on later tokens", "use a model with causal attention")


def segment_of(kept: torch.Tensor) -> Segment:
    """The segment that the keys or values of one cache layer belong to."""
    return Segment(kept.shape[1], kept.shape[3], kept.dtype, kept.device)
