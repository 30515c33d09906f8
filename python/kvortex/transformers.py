"""The Hugging Face prefix cache: plain ``generate`` that computes only what no earlier call has computed.

``attach(model, engine)`` puts itself in front of ``model.generate`` and of the first forward pass of each call. There
the longest cached prefix of the batch is written into the cache object that transformers made for the call, and the
tokens it covers are left out of the forward pass. After the call the new full blocks are stored.
"""

import inspect
import logging
import math
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, Self, TypeAlias

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from kvortex import (
    InvalidArgumentError,
    KeyChain,
    KVortexEngine,
    KVortexError,
    LayoutError,
    Namespace,
    Segments,
    UnsupportedError,
)
from kvortex._model_identity import ModelIdentity, Segment, refuse, refuse_cache, refuse_generator, segment_of

__all__ = ["Attachment", "Reuse", "Stats", "attach"]

# What transformers says about the types of its models and caches changes from release to release.
_Model: TypeAlias = Any
_Cache: TypeAlias = Any

_logger = logging.getLogger(__name__)
_KEY_BYTES = 32
# What may reach a forward pass: anything else could change KV without changing a key.
_FORWARD_INPUTS = {
    "attention_mask",
    "cache_position",
    "input_ids",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "past_key_values",
    "position_ids",
    "return_dict",
    "use_cache",
}
# Arguments of generate() that some releases hand on to the forward pass, which makes nothing of them.
_WITHOUT_EFFECT = {"assistant_tokenizer", "tokenizer", "trust_remote_code"}
_MODES = {GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE}


@dataclass(frozen=True)
class Reuse:
    """What one generate took from the cache and gave to it. Tokens are counted over all rows, padding is not."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    loaded_bytes: int = 0
    stored_blocks: int = 0
    stored_bytes: int = 0

    @property
    def computed_tokens(self) -> int:
        """Tokens of the prompt that the model had to compute."""
        return self.prompt_tokens - self.reused_tokens

    def __add__(self, other: "Reuse") -> "Reuse":
        return Reuse(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Stats:
    """The last generate (all zeros for one that passed by the cache), and the sum and number of those that did not."""

    last: Reuse = Reuse()
    total: Reuse = Reuse()
    calls: int = 0


@dataclass
class _Row:
    """One row of a batch: where its text starts, the keys of its blocks, and how many of them were found."""

    pad: int
    chain: KeyChain
    hit: int = 0

    def keys(self, start: int, stop: int) -> bytes:
        return self.chain.keys[start * _KEY_BYTES : stop * _KEY_BYTES]


@dataclass
class _Call:
    """One generate on one thread, from its first forward pass to what is stored after it."""

    namespace: Namespace
    segments: tuple[Segment, ...]
    pad_token: int | None
    # Held until the new blocks are stored: a head used less recently than its tail would be evicted first.
    leases: ExitStack = field(default_factory=ExitStack)
    entered: bool = False
    cache: _Cache = None
    columns: int = 0
    rows: list[_Row] = field(default_factory=list)
    reuse: Reuse = Reuse()


class _Generate:
    """`model.generate` of an attached model. A deep copy of the model gets its plain generate back."""

    def __init__(self, attachment: "Attachment") -> None:
        self._attachment = attachment
        self.__wrapped__ = attachment.plain_generate
        self.__doc__ = self.__wrapped__.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._attachment.generate(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._attachment.model))
        return self if copied is None else MethodType(type(copied).generate, copied)


class Attachment:
    """A model whose `generate` reuses cached prefixes, until `detach()`. A context manager that detaches at its end."""

    def __init__(self, model: _Model, engine: KVortexEngine, block_tokens: int) -> None:
        refuse_generator(model)
        _refuse_patched(model)
        _refuse_place(model, engine)
        self.model = model
        self.engine = engine
        self.block_tokens = _checked_block_tokens(block_tokens)
        self.plain_generate = MethodType(type(model).generate, model)
        self._signature = inspect.signature(self.plain_generate)
        self._local = threading.local()
        self._lock = threading.Lock()
        self._stats = Stats()
        self._warned: set[str] = set()
        self._handle = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self._identity = ModelIdentity(model, self.block_tokens, self._handle.id)
        try:
            self._prepare()
        except BaseException:
            self._handle.remove()
            raise
        model.__dict__["generate"] = _Generate(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __deepcopy__(self, _memo: dict[int, Any]) -> Self:
        # Reached through the hook that a copied model carries along; on the copy that hook does nothing.
        return self

    @property
    def stats(self) -> Stats:
        """Tokens reused and computed, bytes and blocks: of the last generate and in total."""
        return self._stats

    @property
    def namespace(self) -> Namespace | None:
        """The Namespace that the keys of the model's blocks are rooted in; None while it is in training mode."""
        return self._identity.current()

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: `block_tokens` tokens, keys and values of all layers."""
        return self._identity.block_bytes

    def detach(self) -> None:
        """Give the model its plain `generate` back. What is stored stays in the engine. Idempotent."""
        self._handle.remove()
        if isinstance(self.model.__dict__.get("generate"), _Generate):
            del self.model.__dict__["generate"]

    def refresh(self) -> None:
        """Read all weights again: needed only after a change that leaves no trace, such as an edit through `.data`."""
        self._identity.forget()
        self._prepare()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`model.generate`, with the cached prefix of its prompts not computed again."""
        call = self._admit(args, kwargs)
        if call is None:
            self._count(Reuse(), 0)
            return self.plain_generate(*args, **kwargs)
        with call.leases:
            with self._entered(call):
                result = self.plain_generate(*args, **kwargs)
            self._store(call, getattr(result, "sequences", result))
        self._count(call.reuse, 1)
        return result

    def _count(self, reuse: Reuse, calls: int) -> None:
        with self._lock:
            self._stats = Stats(reuse, self._stats.total + reuse, self._stats.calls + calls)

    def _prepare(self) -> Namespace | None:
        """The model's Namespace now, its blocks fitting the engine; None in training mode, which has neither."""
        namespace = self._identity.current()
        if namespace is None:
            return None
        size = self.engine.block_size_bytes
        if size is None:
            # The keys tell models apart; a tier that outlives the process wants to know whose blocks it keeps as well.
            self.engine.bind(self.block_bytes, namespace)
        elif size != self.block_bytes:
            raise LayoutError(
                f"the engine holds blocks of {size} bytes and those of this model have {self.block_bytes}: "
                "give each shape of KV its own engine"
            )
        return namespace

    def _admit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        """The call to cache, or None for one that passes through: training, no cache, or the caller's own."""
        given = self._signature.bind(*args, **kwargs).arguments
        inputs = given.get("kwargs", {})
        namespace = None if inputs.get("past_key_values") is not None else self._usable()
        if namespace is None:
            return None
        chosen = {name: given[name] for name in ("use_model_defaults",) if name in given}
        config, inputs = self.model._prepare_generation_config(given.get("generation_config"), **chosen, **inputs)
        if config.use_cache is False:
            return None
        _refuse_generation(config, given, inputs)
        _refuse_autocast(self.model.device.type)
        return _Call(namespace, self._identity.segments, _pad_token(config))

    def _usable(self) -> Namespace | None:
        try:
            namespace = self._prepare()
        except UnsupportedError:
            raise
        except KVortexError as error:
            self._warn("reused or stored", error)
            return None
        if namespace is None:
            self._warn("reused or stored", "the model is in training mode: call model.eval()")
        return namespace

    @contextmanager
    def _entered(self, call: _Call) -> Iterator[None]:
        outer = getattr(self._local, "call", None)
        self._local.call = call
        try:
            yield
        finally:
            self._local.call = outer

    def _before_forward(self, model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        call: _Call | None = getattr(self._local, "call", None)
        if call is None or call.entered or model is not self.model:
            return None
        call.entered = True
        _refuse_inputs(kwargs)
        refuse_cache(kwargs.get("past_key_values"))
        if kwargs["past_key_values"].get_seq_length() > 0:
            return None
        pads = _left_padding(kwargs["input_ids"], kwargs.get("attention_mask"))
        _refuse_positions(kwargs.get("position_ids"), pads, kwargs["input_ids"].shape[1])
        try:
            self._open(call, kwargs["input_ids"], pads.tolist())
        except KVortexError as error:
            self._warn("reused or stored", error)
            return None
        call.cache = kwargs["past_key_values"]
        columns = self._reuse(call, call.cache)
        return args, _without_columns(kwargs, columns)

    def _open(self, call: _Call, input_ids: torch.Tensor, pads: list[int]) -> None:
        """Note the rows of the prompt and the keys of their blocks."""
        call.columns = input_ids.shape[1]
        for pad, tokens in zip(pads, input_ids.cpu(), strict=True):
            chain = KeyChain(call.namespace, self.block_tokens)
            chain.extend(tokens[pad:])
            call.rows.append(_Row(pad, chain))
        call.reuse = Reuse(prompt_tokens=sum(call.columns - row.pad for row in call.rows))

    def _reuse(self, call: _Call, cache: _Cache) -> int:
        """Fill the cache with the longest prefix that all rows have; how many columns that are."""
        try:
            columns = self._find(call)
            reused = sum(max(0, columns - row.pad) for row in call.rows)
            if reused == 0:
                return 0
            kept, loaded = self._load(call, columns)
        except KVortexError as error:
            self._warn("reused", error)
            for row in call.rows:
                row.hit = 0
            return 0
        _fill(cache, kept, columns)
        call.reuse += Reuse(reused_tokens=reused, loaded_bytes=loaded)
        return columns

    def _find(self, call: _Call) -> int:
        """Lease what each row finds. One token at least is left to compute, or there would be no logits."""
        for row in call.rows:
            whole = max(0, call.columns - 1 - row.pad) // self.block_tokens
            row.hit = len(call.leases.enter_context(self.engine.lease_prefix(row.keys(0, whole))))
        return min(row.pad + row.hit * self.block_tokens for row in call.rows)

    def _load(self, call: _Call, columns: int) -> tuple[list[torch.Tensor], int]:
        """The keys and values of all layers, and the bytes that came from the engine."""
        # A row's last block may reach beyond the shared columns: room for it, cut off when the cache is filled.
        room = columns + self.block_tokens - 1
        shapes = [(len(call.rows), segment.heads, room, segment.width) for segment in call.segments]
        kept = [
            torch.empty(shape, dtype=segment.dtype, device=segment.device)
            for shape, segment in zip(shapes, call.segments, strict=True)
        ]
        loaded = 0
        for number, row in enumerate(call.rows):
            for part in kept:
                part[number, :, : row.pad] = 0
            blocks = math.ceil(max(0, columns - row.pad) / self.block_tokens)
            if blocks:
                loaded += self._load_row(row.keys(0, blocks), self._blocks(kept, number, row.pad, blocks))
        return kept, loaded

    def _load_row(self, keys: bytes, target: Segments) -> int:
        report = self.engine.load_blocks(keys, out=target)
        if not report.mask.all():
            raise KVortexError(f"{report.missing} leased blocks were not loaded")
        return report.bytes

    def _blocks(self, kept: list[torch.Tensor], row: int, start: int, blocks: int) -> Segments:
        """Views of one row whose leading dimension counts its blocks: each [blocks, heads, tokens, width]."""
        stop, shape = start + blocks * self.block_tokens, (blocks, self.block_tokens)
        return Segments([torch.unflatten(part[row, :, start:stop], 1, shape).transpose(0, 1) for part in kept])

    def _store(self, call: _Call, sequences: torch.Tensor) -> None:
        if call.cache is None:
            return
        try:
            self._store_rows(call, call.cache, sequences)
        except Exception as error:  # noqa: BLE001 - the text is there: whatever storing meets, the caller gets it
            self._warn("stored", error)

    def _store_rows(self, call: _Call, cache: _Cache, sequences: torch.Tensor) -> None:
        kept = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        now = self._identity.current()
        if now is None or now.digest != call.namespace.digest:
            raise KVortexError("the model changed while it generated")
        if tuple(map(segment_of, kept)) != call.segments or kept[0].shape[0] != len(call.rows):
            raise KVortexError("the cache has another shape than the model's own")
        computed = sequences[:, call.columns : kept[0].shape[2]].cpu()
        for number, (row, tokens) in enumerate(zip(call.rows, computed, strict=True)):
            row.chain.extend(_without_padding(tokens, call.pad_token))
            self._store_row(call, kept, number)

    def _store_row(self, call: _Call, kept: list[torch.Tensor], number: int) -> None:
        row = call.rows[number]
        new = len(row.chain) - row.hit
        if new <= 0:
            return
        start = row.pad + row.hit * self.block_tokens
        report = self.engine.save_blocks(row.keys(row.hit, len(row.chain)), self._blocks(kept, number, start, new))
        call.reuse += Reuse(stored_blocks=report.blocks, stored_bytes=report.bytes)
        if report.refused:
            raise KVortexError(f"the pool had no room for {report.refused} of {new} blocks")

    def _warn(self, undone: str, error: object) -> None:
        """Say once per kind what could not be done; generation goes on without it."""
        if undone not in self._warned:
            self._warned.add(undone)
            _logger.warning("no KV was %s, generation goes on without (said once): %s", undone, error)


def attach(model: PreTrainedModel, engine: KVortexEngine, *, block_tokens: int = 16) -> Attachment:
    """Let `model.generate` take the KV of known prefixes from `engine`, and give it the new.

    Args:
        model: a decoder-only transformers model with full attention, on the CPU or one CUDA GPU, in eval mode.
        engine: an open engine, of the model's GPU if it is on one. Its blocks get the size of this model's, or must
            already have it.
        block_tokens: tokens per block, 1 to 4096; the unit of reuse. All users of an engine should agree on it.

    Returns:
        The Attachment: statistics, `refresh()`, `detach()`.

    Raises:
        UnsupportedError: a model whose KV cannot be reused safely; the message says why and what to do.
        LayoutError: the engine holds blocks of another size.
        InvalidArgumentError: the model is already attached, or `block_tokens` is out of range.
    """
    return Attachment(model, engine, block_tokens)


def _checked_block_tokens(block_tokens: object) -> int:
    if isinstance(block_tokens, bool) or not isinstance(block_tokens, int) or not 0 < block_tokens <= 4096:
        raise InvalidArgumentError(f"block_tokens = {block_tokens!r}: give a whole number from 1 to 4096, such as 16")
    return block_tokens


def _refuse_place(model: _Model, engine: KVortexEngine) -> None:
    """Raise UnsupportedError for a model whose KV the engine does not reach."""
    device = model.device
    if device.type in ("cpu", "meta"):
        return
    place = f"{device.type}:{device.index or 0}"
    if device.type != "cuda":
        refuse(f"a model on {place}", "use the CPU or a CUDA GPU")
    if engine.device != place:
        refuse(
            f"a model on {place} with an engine of device {engine.device!r}", f"create the engine with device={place!r}"
        )


def _refuse_patched(model: _Model) -> None:
    patched = model.__dict__.get("generate")
    if isinstance(patched, _Generate):
        raise InvalidArgumentError(f"this {type(model).__name__} is already attached: detach() it first")
    if patched is not None:
        refuse("a model with a custom generate()", "load it without its custom_generate code")


def _refuse_generation(config: GenerationConfig, given: dict[str, Any], inputs: dict[str, Any]) -> None:
    """Raise UnsupportedError for a way of generating that would end in wrong text or a cache of another kind."""
    mode = config.get_generation_mode(given.get("assistant_model"))
    if mode not in _MODES:
        refuse(mode.value.replace("_", " "), "use greedy search or sampling, or detach() for this call")
    if config.cache_implementation not in (None, "dynamic"):
        refuse(f"cache_implementation={config.cache_implementation!r}", 'leave it unset (or "dynamic")')
    for name in ("compile_config", "prefill_chunk_size"):
        if getattr(config, name, None) is not None:
            refuse(f"{name}={getattr(config, name)!r}", "leave it unset")
    if given.get("custom_generate") is not None:
        refuse("custom_generate", "use the generate() of transformers, or detach() for this call")
    _refuse_inputs(inputs)


def _refuse_inputs(inputs: dict[str, Any]) -> None:
    for name, value in inputs.items():
        if value is not None and name not in _FORWARD_INPUTS | _WITHOUT_EFFECT:
            refuse(f"the input {name}, which is no part of a block's key", "leave it out, or detach() for this call")


def _refuse_autocast(device_type: str) -> None:
    if torch.is_autocast_enabled(device_type):
        refuse("torch.autocast", "load the model in the dtype you want")


def _refuse_positions(position_ids: torch.Tensor | None, pads: torch.Tensor, columns: int) -> None:
    if position_ids is None:
        return
    expected = torch.arange(columns, device=pads.device) - pads[:, None]
    if position_ids.dim() != 2 or ((position_ids != expected) & (expected >= 0)).any():
        refuse("position_ids that do not count each row from 0", "leave position_ids out")


def _left_padding(input_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Columns of padding before each row's text."""
    rows, columns = input_ids.shape
    if mask is None:
        return torch.zeros(rows, dtype=torch.long, device=input_ids.device)
    if mask.shape != input_ids.shape:
        refuse(f"an attention mask of shape {tuple(mask.shape)}", f"give one of shape {tuple(input_ids.shape)}")
    pads = columns - mask.bool().sum(-1)
    if (mask.bool() != (torch.arange(columns, device=mask.device) >= pads[:, None])).any():
        remedy = 'pad with tokenizer.padding_side = "left" and pass its attention_mask'
        refuse("right padding or gaps in the attention mask", remedy)
    return pads


def _pad_token(config: GenerationConfig) -> int | None:
    """What generate() fills finished rows with."""
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    if config.eos_token_id is None:
        return None
    return int(torch.as_tensor(config.eos_token_id).flatten()[0])


def _without_padding(tokens: torch.Tensor, pad_token: int | None) -> torch.Tensor:
    """Generated tokens without the padding that follows a finished row: its KV is right, but nobody asks for it."""
    written = (tokens != pad_token).nonzero() if pad_token is not None else None
    if written is None:
        return tokens
    return tokens[: int(written[-1]) + 1] if len(written) else tokens[:0]


def _without_columns(inputs: dict[str, Any], columns: int) -> dict[str, Any]:
    """The inputs of the forward pass for the tokens that follow the cached columns; the mask stays whole."""
    return inputs | {
        name: inputs[name][..., columns:].contiguous()
        for name in ("input_ids", "position_ids", "cache_position")
        if inputs.get(name) is not None
    }


def _fill(cache: _Cache, kept: list[torch.Tensor], columns: int) -> None:
    """Hand tensors to the layers of an empty cache, as they are: `update` would copy them once more."""
    while len(cache.layers) < len(kept) // 2:
        cache.layers.append(cache.layer_class_to_replicate())
    for layer, keys, values in zip(cache.layers, kept[0::2], kept[1::2], strict=True):
        layer.dtype, layer.device = keys.dtype, keys.device
        layer.keys, layer.values = keys[:, :, :columns], values[:, :, :columns]
        layer.is_initialized = True
