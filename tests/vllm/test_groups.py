"""Several groups of layers: what they share in memory, what is refused, and what is kept beside a drafter."""

import hashlib
from types import SimpleNamespace

import pytest
import torch
import vllm.v1.kv_cache_interface as interface
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec

from conftest import OLD
from kvortex import KVortexConfig, KVortexEngine, LayoutError, UnsupportedError
from kvortex.vllm import layout as layouts

BLOCK, BLOCKS, HEADS, SIZE = 16, 9, 2, 32
PLAIN = {"block_size": BLOCK, "num_kv_heads": HEADS, "head_size": SIZE, "dtype": torch.float16}
new_only = pytest.mark.skipif(OLD, reason="with a connector this vLLM has one group")


def full(**more):
    return FullAttentionSpec(**PLAIN | more)


def window(tokens=64, **more):
    return SlidingWindowSpec(**PLAIN | {"sliding_window": tokens} | more)


def config_of(*groups, **more):
    made = [KVCacheGroupSpec([f"layer {index}"], spec) for index, spec in enumerate(groups)]
    return KVCacheConfig(num_blocks=7, kv_cache_tensors=[], kv_cache_groups=made, **more)


# What is kept of which group.


def test_one_group_that_keeps_every_block_is_whole():
    assert layouts.describe(config_of(full())).is_whole
    # As vLLM makes it of a model with windows too where it is told to have one group.
    assert layouts.describe(config_of(full(sliding_window=64))).is_whole
    described = layouts.describe(config_of(window(64)))
    assert not described.is_whole
    assert described.groups[0].window == 64
    assert described.spare_blocks(0) == 0, "loads are inside steps where vLLM is not told whose load failed"


@new_only
def test_what_is_retained_below_a_window_belongs_to_it():
    described = layouts.describe(config_of(full(), window(64, extra_retained_tokens=3)))
    assert [group.window for group in described.groups] == [0, 67]
    assert str(described) == "2 layers in 2 groups, windows [67]"


def kinds():
    """Specifications of other kinds."""
    attention = {name: PLAIN[name] for name in PLAIN}
    yield interface.ChunkedLocalAttentionSpec(**attention, attention_chunk_size=64)
    yield interface.CrossAttentionSpec(**attention)
    yield interface.EncoderOnlyAttentionSpec(**attention)
    yield interface.SinkFullAttentionSpec(**attention, sink_len=16)
    yield interface.MambaSpec(block_size=BLOCK, shapes=((4, 16),), dtypes=(torch.float32,))
    if not OLD:
        yield interface.SlidingWindowMLASpec(**attention | {"num_kv_heads": 1}, sliding_window=64)


@pytest.mark.parametrize("spec", list(kinds()), ids=lambda spec: type(spec).__name__)
def test_other_kinds_are_refused_by_name(spec):
    message = (
        f"layer 0 has a cache of kind {type(spec).__name__}, and KVortex keeps FullAttentionSpec, MLAAttentionSpec, "
    )
    with pytest.raises(UnsupportedError, match=message):
        layouts.describe(config_of(spec))
    if not OLD:
        with pytest.raises(UnsupportedError, match=message.replace("0", "1", 1)):
            layouts.describe(config_of(full(), spec))


@new_only
def test_groups_that_do_not_fit_together_are_refused():
    shared = KVCacheGroupSpec(
        ["a", "b"],
        interface.UniformTypeKVCacheSpecs(block_size=BLOCK, kv_cache_specs={"a": window(64), "b": window(32)}),
    )
    hidden = KVCacheGroupSpec(["b"], full(), enable_kv_transfer=False)
    refused = {
        "have blocks of 16 and 32 tokens, and KVortex keeps blocks of one size": config_of(
            full(), window(block_size=32)
        ),
        "vLLM matches prefixes by 8 tokens and its blocks have 16": config_of(full(), window(), hash_block_size=8),
        "have windows of .32, 64. tokens": KVCacheConfig(7, [], [shared]),
        "a cache that vLLM keeps from connectors": KVCacheConfig(7, [], [KVCacheGroupSpec(["a"], full()), hidden]),
        "vLLM zeroes this model's blocks before it uses them": config_of(full(), window(dtype=torch.float8_e4m3fn)),
        "the model has no KV cache": KVCacheConfig(7, [], []),
    }
    for message, config in refused.items():
        with pytest.raises(UnsupportedError, match=message):
            layouts.describe(config)


# What groups share in memory.


class Caches:
    """The tensors that vLLM makes for layers of two kinds, in groups that it makes too."""

    def __init__(self, layout, wholes, windows, **more):
        from vllm.v1.core import kv_cache_utils
        from vllm.v1.kv_cache_layout import KVCacheLayout
        from vllm.v1.worker.utils import allocate_kv_cache

        names = [*(f"full {index}" for index in range(wholes)), *(f"window {index}" for index in range(windows))]
        specs = {name: full() if name.startswith("full") else window(**more) for name in names}
        groups = kv_cache_utils._get_kv_cache_groups_uniform_page_size(specs)
        layout = KVCacheLayout[layout]
        cache = SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: layout,
            num_gpu_blocks_override=BLOCKS,
            prefix_cache_retention_interval=None,
        )
        vllm_config = SimpleNamespace(cache_config=cache, attention_config=SimpleNamespace(hisparse_config=None))
        self.config = kv_cache_utils.get_kv_cache_config_from_groups(vllm_config, groups, 1 << 30)
        self.tensors = allocate_kv_cache(self.config, torch.device("cpu"), layout, [BLOCK] * len(groups))
        self.layout = layouts.describe(self.config)

    def paged(self):
        return layouts.paged_cache(self.layout, self.tensors, SimpleNamespace())

    def fill(self, seed):
        generator = torch.Generator().manual_seed(seed)
        for tensor in self.tensors.values():
            tensor.copy_(torch.randint(-99, 99, tensor.shape, generator=generator))

    def read(self, group, block):
        """What the layers of a group have in a block."""
        return torch.stack([self.tensors[name][block] for name in self.layout.groups[group].layers])


@new_only
@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"])
@pytest.mark.parametrize(("wholes", "windows"), [(2, 10), (3, 4), (3, 7)])
def test_a_block_of_any_group_comes_back_into_another_block(layout, wholes, windows):
    source, target = (Caches(layout, wholes, windows) for _ in range(2))
    assert source.layout.block_size_bytes == 4 * HEADS * SIZE * BLOCK * max(
        map(len, [g.layers for g in source.layout.groups])
    )
    source.fill(1)
    target.fill(2)
    moves = [(group, 8 - group, 1 + group) for group in range(len(source.layout.groups))]
    untouched = [target.read(0, block).clone() for block in (0, 8)]
    keys = [hashlib.sha256(bytes([group])).digest() for group, *_ in moves]
    config = KVortexConfig(cpu_pool_size_bytes=4 << 20, device="none", huge_pages=False, num_transfer_streams=1)
    with KVortexEngine.create(config) as engine:
        engine.save_blocks(keys, source.paged().blocks([there for _, there, _ in moves]))
        assert engine.load_blocks(keys, target.paged().blocks([here for *_, here in moves])).mask.all()
    for group, there, here in moves:
        assert torch.equal(target.read(group, here), source.read(group, there))
    assert [torch.equal(target.read(0, block), before) for block, before in zip((0, 8), untouched, strict=True)] == [
        True
    ] * 2


@new_only
def test_pages_of_other_shapes_and_the_same_bytes_are_one():
    caches = Caches("LBNHC", 2, 2, num_kv_heads=1, head_size=2 * SIZE)
    assert len({tuple(tensor.shape) for tensor in caches.tensors.values()}) == 2
    assert caches.paged().block_size_bytes == caches.layout.block_size_bytes


@new_only
def test_groups_that_share_bytes_otherwise_are_refused():
    caches = Caches("LBNHC", 2, 2)
    caches.tensors["window 1"] = torch.zeros_like(caches.tensors["window 1"])
    with pytest.raises(LayoutError, match="layer window 1 does not lie in the blocks that it shares"):
        caches.paged()


@new_only
def test_layers_of_several_groups_are_awaited_by_place():
    caches = Caches("LBNHC", 2, 10)
    hooks = layouts.layer_hooks(caches.layout, caches.tensors, caches.paged())
    assert hooks is not None
    names = [f"window {index}" for index in range(5)] + ["full 0", "full 1"]
    places = {name: hooks._order[name] for name in names}
    assert places["full 0"] == places["window 0"] != places["full 1"]
    assert set(hooks._order.values()) == {0, 1}
