"""What names a block: requests as vLLM makes and hashes them, and configurations of whole engines."""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.request import Request

from conftest import LLAMA, OLD
from kvortex.vllm.groups import LayerGroup
from kvortex.vllm.identity import KEY, KeySource, RequestKeys, identify
from kvortex.vllm.layout import CacheLayout
from kvortex.vllm.weights import files_of

BLOCK = 16
TOKENS = list(range(100, 200))
BLOCKS = len(TOKENS) // BLOCK


@pytest.fixture(scope="module", autouse=True)
def _root():
    init_none_hash(get_hash_fn_by_name("sha256"))


def request(tokens=TOKENS, *, algorithm="sha256", image=None, **more):
    """A request as the engine makes it, hashed by vLLM."""
    place = PlaceholderRange(offset=20, length=30)
    images = [MultiModalFeatureSpec(data=None, modality="image", identifier=image, mm_position=place)]
    return Request(
        request_id="r",
        prompt_token_ids=list(tokens),
        sampling_params=SamplingParams(max_tokens=8),
        pooling_params=None,
        mm_features=images if image else None,
        block_hasher=get_request_block_hasher(BLOCK, get_hash_fn_by_name(algorithm)),
        **({"eos_token_id": None} if OLD else {}),
        **more,
    )


def keys_of(source, one):
    keys = RequestKeys()
    assert source.extend(keys, one)
    return [keys.packed[at : at + KEY] for at in range(0, len(keys.packed), KEY)]


def shared(some, others):
    """Blocks that two requests have in common."""
    return len(set(some) & set(others))


def test_the_same_tokens_have_the_same_keys():
    source = KeySource()
    first = keys_of(source, request())
    assert len(first) == len(set(first)) == BLOCKS
    assert keys_of(source, request()) == first
    assert shared(first, keys_of(source, request([*TOKENS[:40], 7, *TOKENS[41:]]))) == 40 // BLOCK


def test_another_salt_or_image_shares_nothing_that_depends_on_it():
    source = KeySource()
    plain, ours = keys_of(source, request()), keys_of(source, request(cache_salt="ours"))
    assert ours == keys_of(source, request(cache_salt="ours"))
    assert shared(ours, plain) == shared(ours, keys_of(source, request(cache_salt="theirs"))) == 0
    cat = keys_of(source, request(image="cat"))
    assert cat == keys_of(source, request(image="cat"))
    # The first block ends before the image.
    assert shared(cat, keys_of(source, request(image="dog"))) == shared(cat, plain) == 20 // BLOCK


def adapter(folder, content, number=1, name="tuned"):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text('{"r": 8}', encoding="utf-8")
    (folder / "adapter_model.safetensors").write_bytes(content)
    return LoRARequest(name, number, str(folder))


def keys_with(source, lora, seconds=5):
    """Keys of a request with an adapter once its files have been read."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = keys_of(source, request(lora_request=lora))
        if found:
            return found
        time.sleep(0.01)
    return []


def test_an_adapter_is_its_files_and_not_its_name(tmp_path):
    source = KeySource()
    one = adapter(tmp_path / "one", b"weights")
    assert keys_of(source, request(lora_request=one)) == [], "a miss until the files have been read"
    found = keys_with(source, one)
    assert len(found) == BLOCKS
    assert shared(found, keys_of(source, request())) == 0
    # The same name, and on 0.15.1 thus the same hashes.
    other = keys_with(source, adapter(tmp_path / "other", b"weightz", number=2))
    assert len(other) == BLOCKS
    assert shared(found, other) == 0
    assert found == keys_with(KeySource(), adapter(tmp_path / "one", b"weights"))
    if OLD:
        # Later versions hash the path as well.
        assert found == keys_with(source, adapter(tmp_path / "copy", b"weights", number=3))


def test_an_adapter_whose_files_change_in_use_is_a_miss(tmp_path):
    source = KeySource()
    lora = adapter(tmp_path / "one", b"weights")
    asked, keys = request(lora_request=lora), RequestKeys()
    assert keys_with(source, lora)
    assert source.extend(keys, asked)
    before = keys.packed
    adapter(tmp_path / "one", b"WEIGHTS")
    asked.append_output_token_ids([1] * BLOCK)
    assert source.extend(keys, asked)
    assert keys.packed == before, "what the request computes from now on has no name"
    assert keys_of(source, request(lora_request=lora)) == []
    # Loaded again under a number of its own, it is known.
    again = keys_with(source, adapter(tmp_path / "one", b"WEIGHTS", number=2))
    assert len(again) == BLOCKS
    assert shared(again, [before[at : at + KEY] for at in range(0, len(before), KEY)]) == 0


def test_an_adapter_that_cannot_be_read_is_a_miss(tmp_path, caplog):
    source = KeySource()
    nowhere = LoRARequest("tuned", 1, str(tmp_path / "nowhere"))
    assert keys_with(source, nowhere, seconds=0.1) == []
    if os.geteuid():
        lora = adapter(tmp_path / "one", b"weights")
        (tmp_path / "one" / "adapter_model.safetensors").chmod(0)
        assert keys_with(source, lora, seconds=0.5) == []
        assert "cannot be read" in caplog.text


def test_hashes_that_are_no_digests_keep_nothing(caplog):
    source = KeySource()
    one = request()
    one.block_hashes = [digest[:16] for digest in one.block_hashes]
    for _ in range(2):
        assert keys_of(source, one) == []
    assert keys_of(source, request()) == [], "an engine does not change its mind"
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert (
        "have 16 bytes and KVortex needs SHA-256: start vLLM with --prefix-caching-hash-algo sha256" in record.message
    )


ROOT = """
import json, logging, sys
logging.disable(logging.INFO - 1)
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from types import SimpleNamespace
from kvortex.vllm.identity import KeySource, RequestKeys
source, said = KeySource(), []
log = logging.getLogger("kvortex.vllm")
log.handlers = [SimpleNamespace(level=0, handle=lambda record: said.append(record.getMessage()))]
log.setLevel(logging.INFO)
before = source.survives_restart
kv_cache_utils.init_none_hash(get_hash_fn_by_name(sys.argv[1]))
for _ in range(2):
    source.extend(RequestKeys(), SimpleNamespace(block_hashes=[bytes(32)], lora_request=None))
print("FOUND", json.dumps([before, source.survives_restart, said]))
"""


@pytest.mark.parametrize("algorithm", ["sha256", "sha256_cbor"])
@pytest.mark.parametrize("seed", [None, "0"])
def test_a_root_that_is_random_in_each_process_is_noticed_at_the_first_lookup(algorithm, seed):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}
    environment |= {} if seed is None else {"PYTHONHASHSEED": seed}
    done = subprocess.run(
        [sys.executable, "-c", ROOT, algorithm],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")] or [done.stderr]
    before, survives, said = json.loads(line[6:])
    assert before is None
    assert survives is (not OLD or seed is not None)
    assert [("PYTHONHASHSEED" in one) for one in said] == ([] if survives else [True]), "once, with the remedy"


# Engines.


def model_at(folder, config=LLAMA, weights=b"weights"):
    """A folder with a configuration and one file of weights as safetensors writes it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(weights)], "data_offsets": [0, len(weights)]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + weights)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_at(tmp_path_factory.mktemp("model") / "m")


def engine(model, **args):
    args = {"dtype": "float32", "max_model_len": 512, "block_size": 32, "skip_tokenizer_init": True} | args
    return EngineArgs(model=str(model), **args).create_engine_config()


def layout(kind=FullAttentionSpec, groups=(("a", "b"),), **more):
    spec = kind(**{"block_size": 32, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32} | more)
    groups, page = tuple(LayerGroup(names, spec=repr(spec)) for names in groups), spec.page_size_bytes
    return CacheLayout({"a": spec, "b": spec}, {"a": page, "b": page}, 100, spec.block_size, 2 * page, False, groups)


def namespace(config, described=None, version="0.32.0", name=""):
    return identify(config, described or layout(), version, name).namespace


@pytest.fixture(scope="module")
def plain(model):
    return namespace(engine(model))


@pytest.mark.parametrize(
    "args",
    [
        {"hf_overrides": {"rope_theta": 20000.0}},
        {"hf_overrides": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}},
        {"load_format": "dummy"},
    ],
)
def test_another_rope_or_no_weights_change_the_namespace(model, plain, args):
    assert namespace(engine(model, **args)) != plain


def test_another_configuration_at_the_same_path_changes_the_namespace(model, plain):
    try:
        model_at(model, LLAMA | {"rope_theta": 20000.0})
        assert namespace(engine(model)) != plain
    finally:
        model_at(model)


def test_what_changes_no_key_or_value_changes_no_namespace(model, plain):
    neutral = {"max_num_seqs": 7, "max_num_batched_tokens": 2048, "max_model_len": 1024, "seed": 3}
    neutral |= {"served_model_name": "other", "enforce_eager": True, "gpu_memory_utilization": 0.5}
    assert namespace(engine(model, **neutral)) == plain


MATTERS = {
    "model_config.dtype": torch.bfloat16,
    "model_config.revision": "main",
    "model_config.code_revision": "main",
    "model_config.hf_config_path": "elsewhere",
    "model_config.model_impl": "transformers",
    "model_config.quantization": "fp8",
    "cache_config.cache_dtype": "fp8_e5m2",
    "cache_config.calculate_kv_scales": True,
    "cache_config.kv_cache_layout": "BLHNC",
    "cache_config.prefix_caching_hash_algo": "sha256_cbor",
    "parallel_config.tensor_parallel_size": 2,
}


def test_what_makes_kv_incompatible_changes_the_namespace(model, plain):
    config, found = engine(model), {}
    assert namespace(config) == plain
    for field, value in MATTERS.items():
        part, name = field.split(".")
        place = getattr(config, part)
        before = getattr(place, name, None)
        object.__setattr__(place, name, value)
        found[field] = namespace(config)
        object.__setattr__(place, name, before)
    specs = ({"block_size": 64}, {"head_size": 32}, {"dtype": torch.float16}, {"sliding_window": 128})
    found |= {str(spec): namespace(config, layout(**spec)) for spec in specs}
    windows = ({"sliding_window": 128}, {"sliding_window": 64})
    found |= {f"window {spec}": namespace(config, layout(SlidingWindowSpec, **spec)) for spec in windows}
    groups = ((("a",), ("b",)), (("b",), ("a",)))
    found |= {str(one): namespace(config, layout(groups=one)) for one in groups}
    found["version"] = namespace(config, version="0.15.1")
    found["name"] = namespace(config, name="the second weights")
    assert namespace(config) == plain
    assert plain not in found.values(), [field for field, one in found.items() if one == plain]
    assert len(set(found.values())) == len(found)


def test_the_longest_context_matters_to_a_rope_that_is_chosen_by_it(model):
    config = engine(model)
    config.model_config.hf_config.rope_scaling = {"rope_type": "longrope"}
    before = namespace(config)
    config.model_config.max_model_len = 1024
    assert namespace(config) != before


def test_a_configuration_by_a_function_is_known_in_this_process_only(model):
    config = engine(model)
    assert identify(config, layout(), "1").survives_restart
    config.model_config.hf_overrides = lambda given: given
    assert not identify(config, layout(), "1").survives_restart


def test_scales_of_the_first_request_are_known_in_this_process_only(model):
    config = engine(model)
    object.__setattr__(config.cache_config, "calculate_kv_scales", True)
    assert not identify(config, layout(), "1").survives_restart


# Files.


def seen(folder, load_format="auto"):
    return files_of(str(folder), None, None, load_format)


def test_other_files_are_another_model(tmp_path):
    folder = model_at(tmp_path / "m", weights=bytes(50_000))
    first = seen(folder)
    assert first.complete
    assert seen(folder) == first
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    (folder / "generation_config.json").write_text('{"temperature": 1}', encoding="utf-8")
    assert seen(folder) == first, "neither changes what a token's keys are"
    digests = {first.digest}
    spoiled = bytes(30_000) + b"1" + bytes(19_999)
    for change in (
        lambda: model_at(folder, LLAMA | {"rope_theta": 20000.0}, bytes(50_000)),
        lambda: model_at(folder, weights=b"1" + bytes(49_999)),
        lambda: (model_at(folder, weights=spoiled), os.utime(folder / "model.safetensors", ns=(2, 2))),
        lambda: (folder / "modeling.py").write_text("attention = None", encoding="utf-8"),
        lambda: (folder / "more.safetensors").write_bytes(b"more"),
        lambda: (folder / "pytorch_model.bin").write_bytes(bytes(1 << 20)),
    ):
        change()
        digests.add(seen(folder).digest)
    assert len(digests) == 7


def test_the_middle_of_every_tensor_is_looked_at(tmp_path):
    folder = model_at(tmp_path / "m", weights=bytes(50_000))
    first = seen(folder)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-25_000] = 1
    (folder / "model.safetensors").write_bytes(content)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert seen(folder).digest != first.digest


def test_a_file_that_a_hub_named_by_its_content_is_the_same_anywhere(tmp_path):
    digests = set()
    for place, moment in (("here", 1), ("there", 2)):
        blob = tmp_path / place / "blobs" / ("ab" * 32)
        blob.parent.mkdir(parents=True)
        blob.write_bytes(b"weights")
        os.utime(blob, ns=(moment, moment))
        folder = tmp_path / place / "snapshots" / "main"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}", encoding="utf-8")
        (folder / "model.safetensors").symlink_to(blob)
        digests.add(seen(folder).digest)
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("name", "load_format"), [("dummy", "dummy"), ("elsewhere", "runai_streamer"), ("nothing/of-that-name", "auto")]
)
def test_weights_that_nobody_can_know_are_good_for_one_process(tmp_path, name, load_format):
    place = str(model_at(tmp_path / name)) if "/" not in name else name
    found = files_of(place, None, None, load_format)
    assert not found.complete
    assert found.digest != files_of(place, "other", None, load_format).digest


def test_a_model_of_one_file(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + bytes(10_000))
    first = seen(path, "gguf")
    assert first.complete
    path.write_bytes(b"GGUF" + bytes(9_999) + b"1")
    assert seen(path, "gguf") != first


def test_a_broken_header_is_sampled_all_over(tmp_path):
    folder = model_at(tmp_path / "m")
    for content in (
        b"",
        b"12",
        (1 << 62).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        b"\x02" * 9,
    ):
        Path(folder / "model.safetensors").write_bytes(content)
        assert seen(folder).complete
