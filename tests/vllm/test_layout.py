"""Every way in which vLLM lays out its KV cache: what is written through the engine's own view comes back there."""

import hashlib
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from vllm.v1.core.kv_cache_utils import generate_scheduler_kv_cache_config
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    MLAAttentionSpec,
    UniformTypeKVCacheSpecs,
)

from conftest import OLD
from kvortex import KVortexConfig, KVortexEngine, LayoutError, UnsupportedError
from kvortex.vllm import layout as layouts

LAYERS, HEADS, SIZE = 3, 2, 32
NAMES = [f"model.layers.{layer}.self_attn.attn" for layer in range(LAYERS)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2]
FROM, INTO = [4, 0, 6, 3], [1, 5, 2, 0]


@dataclass
class Case:
    """One layout. ``order`` names the dimensions of a layer's tensor: B blocks, K keys and values, N tokens."""

    order: str
    backend: str = ""
    layout: str = "NHD"
    dtype: torch.dtype = torch.float16
    block: int = 16
    pieces: int = 1
    """Blocks of the attention kernel in one of the engine's."""
    blocks: int = 7
    mla: bool = False
    spec: dict = field(default_factory=dict)
    shared: bool = False
    """Whether one more layer uses the cache of the first."""

    def spec_of(self, layer=0):
        kind, heads = (MLAAttentionSpec, 1) if self.mla else (FullAttentionSpec, HEADS)
        more = {name: value[layer] if isinstance(value, list) else value for name, value in self.spec.items()}
        more = {"num_kv_heads": heads, "head_size": SIZE, "dtype": self.dtype} | more
        return kind(block_size=self.block, **more)

    @property
    def specs(self):
        return {name: self.spec_of(layer) for layer, name in enumerate(NAMES)}

    def group(self):
        specs = self.specs
        same = len(set(specs.values())) == 1
        return KVCacheGroupSpec(
            NAMES, specs[NAMES[0]] if same else UniformTypeKVCacheSpecs(block_size=self.block, kv_cache_specs=specs)
        )


class Caches:
    """The tensors that an engine would have, made by vLLM's own code, and the connector's description of them."""

    def __init__(self, case):
        self.case = case
        self.config, self.tensors, context = (old_caches if OLD else new_caches)(case)
        if case.shared:
            self.tensors["model.layers.9.self_attn.attn"] = self.tensors[NAMES[0]]
        self.layout = layouts.describe(self.config)
        self.vllm = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=context))

    def paged(self):
        return layouts.paged_cache(self.layout, self.tensors, self.vllm)

    def positions(self, name):
        """The engine's view of one layer as (block, position, everything of that position)."""
        case, order = self.case, self.case.order
        view = self.tensors[name].unflatten(order.index("B"), (case.blocks, case.pieces))
        order = order.replace("B", "BP")
        return view.permute([order.index(dim) for dim in "BPN" + order.translate(str.maketrans("", "", "BPN"))])

    def read(self):
        """The bytes of every position: layers of (block, position, bytes)."""
        case = self.case
        found = [self.positions(name).contiguous().view(torch.uint8) for name in NAMES]
        return [one.reshape(case.blocks, case.block, -1) for one in found]

    def write(self, seed):
        """Gives every byte of every (layer, block, position) a value of its own."""
        generator = torch.Generator().manual_seed(seed)
        for name in NAMES:
            view = self.positions(name)
            numbers = torch.randint(0, 256, (view.numel() * view.element_size(),), generator=generator)
            view.copy_(numbers.to(torch.uint8).view(view.dtype).reshape(view.shape))


def old_caches(case):
    """As the model runner of 0.15.1 does: a raw tensor for each layer, seen through the backend's shape and strides."""
    from vllm.v1.attention.backends import flash_attn
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    backend = backends()[case.backend]
    group = case.group()
    raw = {name: torch.zeros(case.blocks * spec.page_size_bytes, dtype=torch.int8) for name, spec in case.specs.items()}
    tensors = [KVCacheTensor(size=one.numel(), shared_by=[name]) for name, one in raw.items()]
    config = KVCacheConfig(num_blocks=case.blocks, kv_cache_tensors=tensors, kv_cache_groups=[group])
    of_one = [
        SimpleNamespace(kv_cache_spec=spec, backend=backend, kv_cache_group_id=0, layer_names=[name])
        for name, spec in case.specs.items()
    ]
    runner = SimpleNamespace(
        _kv_cache_spec_attn_group_iterator=lambda: of_one,
        runner_only_attn_layers=set(),
        cache_config=SimpleNamespace(cache_dtype=case.spec.get("cache_dtype_str", "auto")),
    )
    with mock.patch.object(flash_attn, "get_kv_cache_layout", return_value=case.layout):
        views = GPUModelRunner._reshape_kv_cache_tensors(runner, config, raw, [case.block // case.pieces])
    return config, views, dict.fromkeys(NAMES, SimpleNamespace(get_attn_backend=lambda: backend))


def backends():
    """The backends of 0.15.1 by name; FlashInfer cannot be imported here, and its shape and strides are these."""
    from vllm.model_executor.layers.attention.mla_attention import MLACommonBackend
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
    from vllm.v1.attention.backends.mla.flashmla_sparse import FlashMLASparseBackend
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    class InTheStyleOfFlashInfer(TritonAttentionBackend):
        get_kv_cache_stride_order = staticmethod(lambda: (0, 1, 3, 2, 4))

    return {
        "FlashAttention": FlashAttentionBackend,
        "Triton": TritonAttentionBackend,
        "FlashInfer": InTheStyleOfFlashInfer,
        "CPU": CPUAttentionBackend,
        "MLA": MLACommonBackend,
        "sparse MLA": FlashMLASparseBackend,
    }


def new_caches(case):
    """As 0.32 does: one allocation, and of each layer a view of blocks, heads, states and content."""
    from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
    from vllm.v1.kv_cache_layout import KVCacheLayout
    from vllm.v1.worker.utils import allocate_kv_cache

    layout = KVCacheLayout[case.layout]
    cache = SimpleNamespace(
        get_resolved_kv_cache_layout=lambda: layout,
        num_gpu_blocks_override=case.blocks,
        prefix_cache_retention_interval=None,
    )
    vllm_config = SimpleNamespace(cache_config=cache, attention_config=SimpleNamespace(hisparse_config=None))
    config = get_kv_cache_config_from_groups(vllm_config, [case.group()], 1 << 30)
    assert config.num_blocks == case.blocks
    return config, allocate_kv_cache(config, torch.device("cpu"), layout, [case.block // case.pieces]), {}


def cases_of_old():
    shapes = {
        "FlashAttention": ("KBNHC", "NHD"),
        "FlashAttention HND": ("KBNHC", "HND"),
        "Triton": ("BKNHC", "NHD"),
        "FlashInfer": ("BKNHC", "HND"),
        "CPU": ("KBHNC", "NHD"),
        "MLA": ("BNC", "NHD"),
    }
    for name, (order, layout) in shapes.items():
        one = {"order": order, "backend": name.split()[0], "layout": layout, "mla": name == "MLA"}
        for dtype in DTYPES:
            yield f"{name}, {dtype}", Case(**one, dtype=dtype)
        for block in (32, 128):
            yield f"{name}, blocks of {block}", Case(**one, block=block)
        yield f"{name}, blocks of the kernel", Case(**one, block=64, pieces=4)
        yield f"{name}, as many blocks as keys and values", Case(**one, blocks=16, block=32, pieces=2)
        yield f"{name}, a shared cache", Case(**one, shared=True)
    sparse = {"head_size": 576, "cache_dtype_str": "fp8_ds_mla"}
    yield "sparse MLA, fp8", Case("BNC", "sparse MLA", dtype=torch.uint8, block=64, mla=True, spec=sparse)


def cases_of_new():
    for layout in ("LBNHC", "LBHNC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"):
        one = {"order": "BHNC", "layout": layout}
        for dtype in DTYPES:
            yield f"{layout}, {dtype}", Case(**one, dtype=dtype)
        for block in (32, 128):
            yield f"{layout}, blocks of {block}", Case(**one, block=block)
        yield f"{layout}, MLA", Case(**one, mla=True, block=64)
        yield f"{layout}, a shared cache", Case(**one, shared=True)
        yield f"{layout}, sizes that are alike", Case(**one, blocks=16, block=16)
        yield (
            f"{layout}, scales beside each head's content",
            Case(**one, dtype=torch.uint8, spec={"state_content_bytes": 2 * SIZE + 8}),
        )
        if layout in ("LBNHC", "LBHNC"):
            yield f"{layout}, blocks of the kernel", Case(**one, block=64, pieces=4)
            yield f"{layout}, blocks of the kernel, as many as tokens", Case(**one, blocks=8, block=32, pieces=2)
        if layout not in ("LHBNC", "BHLNC"):
            # vLLM itself refuses these two for pages of two sizes, or padded ones.
            page = 2 * HEADS * SIZE * 2 * 16
            yield f"{layout}, padded pages", Case(**one, spec={"page_size_padded": page + 512})
            yield f"{layout}, padded MLA", Case(**one, mla=True, spec={"alignment": 1536})
        if layout not in ("LHBNC", "BHLNC"):
            yield f"{layout}, layers of two sizes", Case(**one, spec={"head_size": [SIZE, 2 * SIZE, SIZE]})


CASES = dict(cases_of_old() if OLD else cases_of_new())


def moved(case):
    """Blocks of one engine stored and loaded into others of a second; what that has then, and what it should."""
    source, target = Caches(case), Caches(case)
    source.write(1)
    target.write(2)
    said, expected = source.read(), target.read()
    for there, here in zip(INTO, FROM, strict=True):
        for layer in range(LAYERS):
            expected[layer][there] = said[layer][here]
    keys = [hashlib.sha256(bytes([number])).digest() for number in FROM]
    config = KVortexConfig(cpu_pool_size_bytes=4 << 20, device="none", huge_pages=False, num_transfer_streams=1)
    with KVortexEngine.create(config) as engine:
        engine.save_blocks(keys, source.paged().blocks(FROM))
        assert engine.load_blocks(keys, target.paged().blocks(INTO)).mask.all()
    assert same(source.read(), said), "storing wrote"
    return target.read(), expected


def same(some, others):
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_what_the_engine_wrote_is_what_it_reads_in_other_blocks(name):
    assert same(*moved(CASES[name]))


@pytest.mark.parametrize("name", CASES)
def test_the_scheduler_knows_the_same_blocks(name):
    """It is told the specification of one layer only where those of a type differ in size."""
    worker = Caches(CASES[name])
    scheduler = layouts.describe(generate_scheduler_kv_cache_config([worker.config]))
    assert scheduler.block_size_bytes == worker.layout.block_size_bytes == worker.paged().block_size_bytes
    assert (scheduler.layer_bytes, scheduler.groups) == (worker.layout.layer_bytes, worker.layout.groups)
    assert scheduler.replicated == worker.layout.replicated


def blocks_for_what_is_outside(view):
    """Takes [2, blocks] for [blocks, 2]: sizes are right, no two blocks share a byte, and all of them are wrong."""
    shape, strides = list(view.shape), list(view.stride())
    outside = next(dim for dim in range(1, view.dim()) if strides[dim] == shape[0] * strides[0])
    strides[0], strides[outside] = strides[0] * shape[outside], strides[0]
    return view.as_strided(shape, strides)


def blocks_for_layers(view):
    """Takes [blocks, layers] for [layers, blocks]."""
    page = view[0].numel()
    assert view.stride(0) == page * LAYERS
    layer = view.storage_offset() // page
    return view.as_strided(view.shape, (page, *view.stride()[1:]), layer * page * view.shape[0])


SWAPS = {
    "FlashAttention, torch.float16": blocks_for_what_is_outside,
    "CPU, torch.float32": blocks_for_what_is_outside,
    "LHBNC, torch.float16": blocks_for_what_is_outside,
    "BLNHC, torch.float16": blocks_for_layers,
    "BLHNC, torch.uint8": blocks_for_layers,
}


@pytest.mark.parametrize("name", [name for name in SWAPS if name in CASES])
def test_swapped_strides_of_blocks_are_noticed(monkeypatch, name):
    right = layouts._block_view
    monkeypatch.setattr(layouts, "_block_view", lambda *args: SWAPS[name](right(*args)))
    assert not same(*moved(CASES[name]))


def pieces_of(case):
    """How many contiguous runs the blocks of all layers are copied in, for each block."""
    made = []
    with (
        mock.patch.object(layouts, "PagedCache", lambda views: made.extend(views)),
        mock.patch.object(layouts, "_raw", lambda view: view),
        pytest.raises(AttributeError),
    ):
        Caches(case).paged()
    runs = 0
    for view in made:
        one, dims = view[0], list(range(view.dim() - 1))
        size = 1
        while dims and (one.shape[dims[-1]] == 1 or one.stride(dims[-1]) == size):
            size *= one.shape[dims.pop()]
        runs += one.numel() // size
    return runs


@pytest.mark.skipif(OLD, reason="these are layouts of later versions")
@pytest.mark.parametrize(
    ("layout", "pieces"),
    {"LBNHC": LAYERS, "LBHNC": LAYERS, "LHBNC": LAYERS * HEADS, "BLHNC": 1, "BLNHC": 1, "BHLNC": 1}.items(),
)
def test_what_lies_side_by_side_is_copied_at_once(layout, pieces):
    assert pieces_of(Case("BHNC", layout=layout)) == pieces


@pytest.mark.skipif(not OLD, reason="these are layouts of 0.15.1")
@pytest.mark.parametrize(
    ("name", "pieces"),
    {"FlashAttention": 2, "FlashAttention HND": 2, "FlashInfer": 1, "CPU": 2, "MLA": 1}.items(),
)
def test_keys_and_values_are_copied_whole(name, pieces):
    assert pieces_of(CASES[f"{name}, torch.float16"]) == pieces * LAYERS


# What is not known is refused with what to do.


def config_of(specs, **more):
    groups = [KVCacheGroupSpec(list(one), next(iter(one.values()))) for one in specs]
    return KVCacheConfig(num_blocks=7, kv_cache_tensors=[], kv_cache_groups=groups, **more)


def attention(kind=FullAttentionSpec, **more):
    return kind(**{"block_size": 16, "num_kv_heads": HEADS, "head_size": SIZE, "dtype": torch.float16} | more)


def test_what_is_not_known_is_refused_by_name():
    several = config_of([{"a": attention()}, {"b": attention()}])
    if OLD:
        refused = {"2 KV-cache groups and KVortex keeps one of this vLLM: start it with --disable-hybrid": several}
    else:
        mixed = {"a": attention(), "b": attention(dtype=torch.float8_e4m3fn)}
        group = KVCacheGroupSpec(list(mixed), UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs=mixed))
        assert len(layouts.describe(several).groups) == 2
        refused = {
            "vLLM zeroes this model's blocks before it uses them": KVCacheConfig(
                num_blocks=7, kv_cache_tensors=[], kv_cache_groups=[group]
            ),
            "vLLM matches prefixes by 8 tokens and its blocks have 16": config_of(
                [{"a": attention()}], hash_block_size=8
            ),
        }
    for message, config in refused.items():
        with pytest.raises(UnsupportedError, match=message):
            layouts.describe(config)


def test_a_derived_kind_of_cache_is_refused():
    class Other(FullAttentionSpec):
        """Keeps who knows what in its pages."""

    with pytest.raises(UnsupportedError, match="layer a has a cache of kind Other, and KVortex keeps"):
        layouts.describe(config_of([{"a": attention(Other)}]))


def registered(change):
    caches = Caches(Case("BHNC", "", "LBNHC") if not OLD else CASES["Triton, torch.float16"])
    change(caches)
    return caches.paged


def test_tensors_that_do_not_fit_are_refused():
    def drop(caches):
        del caches.tensors[NAMES[1]]

    def stranger(caches):
        caches.tensors["b"] = torch.zeros(7, 2, 16, 2, 32)

    def part_of_another(caches):
        caches.tensors["b"] = caches.tensors[NAMES[0]][:4]

    def list_of_states(caches):
        caches.tensors[NAMES[0]] = [caches.tensors[NAMES[0]]]

    def too_small(caches):
        caches.tensors[NAMES[0]] = caches.tensors[NAMES[0]][:-1]

    for change, message in {
        drop: "the registered tensors have .* bytes a block, the KV-cache specification",
        stranger: "layer b has a cache that the KV-cache configuration does not name",
        part_of_another: "layer b has a cache that the KV-cache configuration does not name",
        list_of_states: "is list and no tensor",
        too_small: "where 7 blocks of 4096 bytes were configured",
    }.items():
        with pytest.raises(LayoutError, match=message):
            registered(change)()


@pytest.mark.skipif(OLD, reason="0.15.1 has no specification of a layer's view")
def test_a_shape_that_the_specification_does_not_mean_is_refused():
    def heads_for_tokens(caches):
        caches.tensors[NAMES[0]] = caches.tensors[NAMES[0]].transpose(1, 2)

    with pytest.raises(LayoutError, match=r"shape \(7, 16, 2, 64\) where its specification means \(7, 2, 16, 64\)"):
        registered(heads_for_tokens)()


@pytest.mark.skipif(not OLD, reason="later versions specify each layer's view")
def test_a_dimension_of_blocks_that_nobody_tells_is_not_guessed():
    """Two blocks of keys and values: [blocks, 2, ...] and [2, blocks, ...] look alike."""
    caches = Caches(Case("BKNHC", "Triton", blocks=2))
    caches.vllm.compilation_config.static_forward_context.clear()
    with pytest.raises(LayoutError, match="no dimension is known to count 2 blocks"):
        caches.paged()
