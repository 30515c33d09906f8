"""Where a block of the engine lies in memory, from the KV-cache specification and the tensors' strides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

import kvortex
from kvortex import PagedCache, RawTensor
from kvortex.vllm.groups import LayerGroup
from kvortex.vllm.layers import LayerHooks

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["CacheLayout", "describe", "paged_cache"]

KNOWN = (FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec)
"""Exactly these kinds of layers; what derives from them keeps other things in its pages."""

FAILS_BY_REQUEST = hasattr(KVConnectorBase_V1, "get_transfer_results")
"""Whether vLLM can be told which request's load failed. With several groups, or a window, blocks do not say it all."""

Place = tuple[int, tuple[tuple[int, int], ...]]
"""First byte, and (stride, length) of each dimension of what is not contiguous: which bytes, whatever the shape."""


@dataclass(frozen=True)
class CacheLayout:
    """What the planner and every rank know of the KV cache before its memory exists."""

    layers: Mapping[str, KVCacheSpec]
    layer_bytes: Mapping[str, int]
    """Bytes of each layer's part of a block, known in every process."""
    num_blocks: int
    block_tokens: int
    """Tokens of one block of the engine."""
    block_size_bytes: int
    """Bytes of one block on one rank: all layers of the largest group."""
    replicated: bool
    """Whether every rank keeps the same bytes."""
    groups: tuple[LayerGroup, ...]

    @property
    def is_whole(self) -> bool:
        """Whether there is one group, of which a request keeps every block."""
        return len(self.groups) == 1 and not self.groups[0].window

    def __str__(self) -> str:
        several = f" in {len(self.groups)} groups" if len(self.groups) > 1 else ""
        windows = sorted({group.window for group in self.groups if group.window})
        return f"{len(self.layers)} layers{several}{f', windows {windows}' if windows else ''}"

    def spare_blocks(self, tokens: int) -> int:
        """Blocks that are left when a request of ``tokens`` has all that it needs. One block is the engine's own."""
        return max(0, self.num_blocks - 1 - -(-tokens // self.block_tokens)) if self.is_whole else 0


def describe(config: KVCacheConfig) -> CacheLayout:
    """The layout that ``config`` means. Raises UnsupportedError for what KVortex does not keep."""
    groups = config.kv_cache_groups
    if not groups:
        raise kvortex.UnsupportedError("the model has no KV cache: start vLLM without the connector")
    if len(groups) > 1 and not FAILS_BY_REQUEST:
        raise kvortex.UnsupportedError(
            f"the model has {len(groups)} KV-cache groups and KVortex keeps one of this vLLM: start it with "
            "--disable-hybrid-kv-cache-manager, use vLLM 0.32 or later, or leave the connector out"
        )
    by_group = [_specs_of(group) for group in groups]
    for specs in by_group:
        for name, spec in specs.items():
            _refuse_unknown(name, spec)
    _refuse_together(config)
    layers = {name: spec for specs in by_group for name, spec in specs.items()}
    layer_bytes = _layer_bytes(config, by_group)
    return CacheLayout(
        layers=layers,
        layer_bytes=layer_bytes,
        num_blocks=config.num_blocks,
        block_tokens=groups[0].kv_cache_spec.block_size,
        # A block number means the same bytes in every group. What a group with fewer layers leaves out of them is kept
        # with the rest.
        block_size_bytes=max(sum(layer_bytes[name] for name in specs) for specs in by_group),
        replicated=all(isinstance(spec, MLAAttentionSpec) for spec in layers.values()),
        groups=tuple(
            LayerGroup(tuple(specs), _window(specs), bool(getattr(group, "is_eagle_group", False)), repr(_first(specs)))
            for group, specs in zip(groups, by_group, strict=True)
        ),
    )


def _specs_of(group: KVCacheGroupSpec) -> dict[str, KVCacheSpec]:
    """The specification of each layer of a group."""
    specs = getattr(group.kv_cache_spec, "kv_cache_specs", None)
    return dict(specs or dict.fromkeys(group.layer_names, group.kv_cache_spec))


def _first(specs: Mapping[str, KVCacheSpec]) -> KVCacheSpec:
    """What the scheduler's process is told of layers of one type that differ in size."""
    return next(iter(specs.values()))


def _layer_bytes(config: KVCacheConfig, by_group: Sequence[Mapping[str, KVCacheSpec]]) -> dict[str, int]:
    """Bytes of each layer's part of a block, from what every process is told: the first specification of a group, and
    how far apart the layers lie, for those that have other sizes.
    """
    apart, found = _pages_apart(config), {}
    for specs in by_group:
        first = _first(specs)
        alike = len({apart.get(name) for name in specs}) == 1
        for name in specs:
            found[name] = page_bytes(first) if alike or apart[name] == first.page_size_bytes else apart[name]
    return found


def _pages_apart(config: KVCacheConfig) -> dict[str, int]:
    """Bytes from one layer's part of a block to the next one's."""
    apart: dict[str, int] = {}
    for tensor in config.kv_cache_tensors:
        if hasattr(tensor, "shared_by"):
            apart |= dict.fromkeys(tensor.shared_by, tensor.size // config.num_blocks)
        elif tensor.layer_stride >= tensor.block_stride:
            apart |= dict.fromkeys(tensor.layers, tensor.layer_stride // config.num_blocks)
        else:
            apart |= dict.fromkeys(tensor.layers, tensor.layer_stride)
    return apart


def _window(specs: Mapping[str, KVCacheSpec]) -> int:
    """Tokens whose blocks vLLM keeps for a group, 0 for all. The layers of one have the same window."""
    windows = {
        spec.sliding_window + getattr(spec, "extra_retained_tokens", 0) if isinstance(spec, SlidingWindowSpec) else 0
        for spec in specs.values()
    }
    if len(windows) != 1:
        raise kvortex.UnsupportedError(
            f"layers {sorted(specs)} share a table of blocks and have windows of {sorted(windows)} tokens (0: all): "
            "start vLLM without the connector"
        )
    return windows.pop()


def _refuse_unknown(name: str, spec: KVCacheSpec) -> None:
    """Raises UnsupportedError for a layer that keeps something else."""
    if type(spec) not in KNOWN:
        kinds = ", ".join(kind.__name__ for kind in KNOWN)
        raise kvortex.UnsupportedError(
            f"layer {name} has a cache of kind {type(spec).__name__}, and KVortex keeps {kinds}: start vLLM with "
            "--disable-hybrid-kv-cache-manager, which makes others of some kinds, or without the connector"
        )
    if page_bytes(spec) != spec.page_size_bytes and getattr(spec, "page_size_padded", None) is None:
        raise kvortex.UnsupportedError(
            f"layer {name} keeps {spec.page_size_bytes - page_bytes(spec)} bytes of a block beside its tensor, "
            "scales of each token say: use another --kv-cache-dtype"
        )


def _refuse_together(config: KVCacheConfig) -> None:
    """Raises UnsupportedError for what is wrong with the groups as a whole."""
    sizes = sorted({group.kv_cache_spec.block_size for group in config.kv_cache_groups})
    if len(sizes) > 1:
        raise kvortex.UnsupportedError(
            f"the KV-cache groups have blocks of {' and '.join(map(str, sizes))} tokens, and KVortex keeps blocks of "
            "one size: start vLLM with --disable-hybrid-kv-cache-manager, or without the connector"
        )
    hash_tokens = getattr(config, "hash_block_size", None) or sizes[0]
    if sizes[0] != hash_tokens:
        raise kvortex.UnsupportedError(
            f"vLLM matches prefixes by {hash_tokens} tokens and its blocks have {sizes[0]}: "
            "leave --prefix-match-unit out"
        )
    for group in config.kv_cache_groups:
        if getattr(group, "host_resident", False) or not getattr(group, "enable_kv_transfer", True):
            raise kvortex.UnsupportedError(
                f"layers {sorted(group.layer_names)} have a cache that vLLM keeps from connectors: "
                "start vLLM without the connector"
            )
    if getattr(config, "needs_kv_cache_zeroing", False):
        # Zeroes are written before any hook could put stores of those blocks first.
        raise kvortex.UnsupportedError(
            "vLLM zeroes this model's blocks before it uses them, which KVortex cannot order: "
            "use one dtype for the whole KV cache, or start vLLM without the connector"
        )


def page_bytes(spec: KVCacheSpec) -> int:
    """Bytes of one layer's part of a block, without padding."""
    return int(getattr(spec, "real_page_size_bytes", None) or spec.page_size_bytes)


def paged_cache(layout: CacheLayout, kv_caches: Mapping[str, Any], vllm_config: VllmConfig) -> PagedCache:
    """The blocks of the registered tensors, layer after layer, or whole where the layers of a block lie side by side.

    Raises LayoutError for tensors that do not fit ``layout``.
    """
    views = _layer_views(layout, kv_caches, vllm_config)
    largest = max(layout.groups, key=lambda group: sum(page_bytes(layout.layers[name]) for name in group.layers))
    places = {_place(view): view for name, view in views.items() if name in largest.layers}
    blocks = _whole_blocks(list(places.values()))
    for name, view in views.items():
        if _place(view) not in places and not (len(blocks) == 1 and _is_inside(view, blocks[0])):
            raise kvortex.LayoutError(
                f"layer {name} does not lie in the blocks that it shares with layers of other groups: "
                "start vLLM with --disable-hybrid-kv-cache-manager"
            )
    cache = PagedCache([_raw(view) for view in blocks])
    if cache.block_size_bytes != layout.block_size_bytes:
        raise kvortex.LayoutError(
            f"the registered tensors have {cache.block_size_bytes} bytes a block, "
            f"the KV-cache specification {layout.block_size_bytes}"
        )
    return cache


def _layer_views(layout: CacheLayout, kv_caches: Mapping[str, Any], vllm_config: VllmConfig) -> dict[str, torch.Tensor]:
    """Each layer's part of the blocks. Layers that only share another one's cache are left out."""
    views: dict[str, torch.Tensor] = {}
    for name, tensor in kv_caches.items():
        spec = layout.layers.get(name)
        if not isinstance(tensor, torch.Tensor):
            raise kvortex.LayoutError(f"the cache of layer {name} is {type(tensor).__name__} and no tensor")
        if spec is None and _aliases(tensor, kv_caches, layout):
            continue
        if spec is None:
            raise kvortex.LayoutError(f"layer {name} has a cache that the KV-cache configuration does not name")
        views[name] = _in_order_of_memory(_block_view(name, tensor, spec, layout.num_blocks, vllm_config))
    return views


def layer_hooks(layout: CacheLayout, kv_caches: Mapping[str, Any], cache: PagedCache) -> LayerHooks | None:
    """What loads of ``cache`` by layers need; None if its blocks are not one tensor for each layer."""
    places: dict[Place, int] = {}
    order: dict[str, int] = {}
    sizes: list[int] = []
    for name, tensor in kv_caches.items():
        index = places.setdefault(_place(tensor), len(places))
        order[name] = index
        if index == len(sizes) and name in layout.layers:
            sizes.append(page_bytes(layout.layers[name]))
    fits = len(sizes) == len(places) == len(cache.parts()) and sum(sizes) == cache.block_size_bytes
    return LayerHooks(order, sizes) if fits else None


def _place(view: torch.Tensor) -> Place:
    """Which bytes a tensor is made of: layers of several groups see the same ones, maybe in other shapes."""
    size = view.element_size()
    sides = zip(view.stride(), view.shape, strict=True)
    dims = sorted(((stride * size, length) for stride, length in sides if length > 1), reverse=True)
    merged = [(1, size)]
    for stride, length in reversed(dims):
        inner, extent = merged[-1]
        if stride == inner * extent:
            merged[-1] = (inner, extent * length)
        else:
            merged.append((stride, length))
    return view.data_ptr(), tuple(merged)


def _aliases(tensor: torch.Tensor, kv_caches: Mapping[str, Any], layout: CacheLayout) -> bool:
    """Whether a layer only shares the cache of another one."""
    return any(_place(kv_caches[name]) == _place(tensor) for name in layout.layers if name in kv_caches)


def _block_view(
    name: str, tensor: torch.Tensor, spec: KVCacheSpec, num_blocks: int, vllm_config: VllmConfig
) -> torch.Tensor:
    """``tensor`` with the engine's blocks as its first dimension; the attention kernel's may be smaller."""
    total = tensor.numel() * tensor.element_size()
    if total != num_blocks * page_bytes(spec):
        raise kvortex.LayoutError(
            f"layer {name} has a tensor of {total} bytes, shape {tuple(tensor.shape)}, where {num_blocks} blocks of "
            f"{page_bytes(spec)} bytes were configured"
        )
    dim = _block_dim(name, tensor, spec, num_blocks, vllm_config)
    pieces = tensor.shape[dim] // num_blocks
    shape, strides = list(tensor.shape), list(tensor.stride())
    shape[dim : dim + 1], strides[dim : dim + 1] = [num_blocks, pieces], [strides[dim] * pieces, strides[dim]]
    return tensor.as_strided(shape, strides, tensor.storage_offset()).movedim(dim, 0)


def _block_dim(name: str, tensor: torch.Tensor, spec: KVCacheSpec, num_blocks: int, vllm_config: VllmConfig) -> int:
    """The dimension that counts blocks. It is a multiple of them: where several are, the backend says which."""
    if hasattr(spec, "state_content_size_bytes"):
        return _dim_of_standard_view(name, tensor, spec, num_blocks)
    fits = [dim for dim, size in enumerate(tensor.shape) if size >= num_blocks and size % num_blocks == 0]
    dim = fits[0] if len(fits) == 1 else _dim_by_backend(name, spec, vllm_config)
    if dim not in fits:
        raise kvortex.LayoutError(
            f"layer {name} has a tensor of shape {tuple(tensor.shape)}, and no dimension is known to count "
            f"{num_blocks} blocks: start vLLM with another --attention-backend"
        )
    return dim


def _dim_of_standard_view(name: str, tensor: torch.Tensor, spec: Any, num_blocks: int) -> int:
    """The first, if the tensor is vLLM's view (blocks, heads, states, content)."""
    pieces = max(1, tensor.shape[0] // num_blocks)
    content = spec.state_content_size_bytes // tensor.element_size()
    expected = (num_blocks * pieces, spec.num_heads, spec.num_states // pieces, content)
    if tuple(tensor.shape) != expected:
        raise kvortex.LayoutError(
            f"layer {name} has a tensor of shape {tuple(tensor.shape)} where its specification means {expected}: "
            "start vLLM with another --attention-backend"
        )
    return 0


def _dim_by_backend(name: str, spec: Any, vllm_config: VllmConfig) -> int | None:
    """Where the layer's attention backend puts its blocks, if it tells; asked for a number that nothing else has."""
    layer = vllm_config.compilation_config.static_forward_context.get(name)
    backend = getattr(layer, "get_attn_backend", lambda: None)()
    shape_of = getattr(backend, "get_kv_cache_shape", None)
    if shape_of is None:
        return None
    shape = tuple(shape_of(12347, spec.block_size, spec.num_kv_heads, spec.head_size))
    return shape.index(12347) if 12347 in shape else None


def _in_order_of_memory(view: torch.Tensor) -> torch.Tensor:
    """The same blocks with the rest of each in the order of its addresses, so that what is contiguous is one copy."""
    rest = sorted(range(1, view.dim()), key=lambda dim: -view.stride()[dim])
    return view.permute(0, *rest)


def _whole_blocks(views: list[torch.Tensor]) -> list[torch.Tensor]:
    """One view of whole blocks if ``views`` fill each without a gap, as where blocks are outermost; else ``views``."""
    first = min(views, key=lambda view: view.data_ptr())
    stride = first.stride(0) * first.element_size()
    storage = first.untyped_storage()
    alike = {(view.stride(0) * view.element_size(), view.untyped_storage().data_ptr()) for view in views}
    if len(views) == 1 or len(alike) != 1 or not _fill(views, first.data_ptr(), stride):
        return views
    whole = torch.empty(0, dtype=torch.uint8, device=first.device)
    return [whole.set_(storage, first.data_ptr() - storage.data_ptr(), (first.shape[0], stride), (stride, 1))]


def _is_inside(view: torch.Tensor, whole: torch.Tensor) -> bool:
    """Whether block for block a layer's bytes are among those of whole blocks."""
    start, size = view.data_ptr() - whole.data_ptr(), view.element_size()
    if view.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr() or start < 0:
        return False
    last = sum((length - 1) * stride for length, stride in zip(view.shape[1:], view.stride()[1:], strict=True))
    return view.stride(0) * size == whole.stride(0) and start + (last + 1) * size <= whole.stride(0)


def _fill(views: list[torch.Tensor], start: int, stride: int) -> bool:
    """Whether block 0 of all ``views`` has each of the ``stride`` bytes from ``start`` exactly once."""
    if sum(view[0].numel() * view.element_size() for view in views) != stride:
        return False
    times = torch.zeros(stride, dtype=torch.uint8)
    for view in views:
        size, at = view.element_size(), view.data_ptr() - start
        shape, steps = (*view.shape[1:], size), (*(step * size for step in view.stride()[1:]), 1)
        if at + sum((count - 1) * step for count, step in zip(shape, steps, strict=True)) >= stride:
            return False
        times.as_strided(shape, steps, at).add_(1)
    return bool((times == 1).all())


def _raw(view: torch.Tensor) -> RawTensor:
    """The memory itself: whatever the dtype, bytes are copied."""
    if math.prod(view.shape) == 0:
        raise kvortex.LayoutError(f"a KV cache of shape {tuple(view.shape)} has no bytes")
    return RawTensor(
        view.data_ptr(), list(view.shape), list(view.stride()), view.element_size(), device=view.device, owner=view
    )
