"""The tests of the connector need vLLM: ``.ci/dev vllm`` makes an environment for each version and runs them there."""

import importlib.util
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

# This folder alone would count as a package without a file.
SPEC = importlib.util.find_spec("vllm")
HAS_VLLM = SPEC is not None and SPEC.origin is not None
REASON = "vLLM is not installed here: .ci/dev vllm runs these"

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    # Threads that spin while they wait take the time of others.
    OMP_WAIT_POLICY="PASSIVE",
)

# Taken out of the environment, where the connector takes them for knobs that it does not know.
SEEDS = int(os.environ.pop("KVORTEX_VLLM_SEEDS", "20"))
PARAMS_CASES = int(os.environ.pop("KVORTEX_PARAMS_CASES", "2000"))

# Without vLLM nothing of this folder can even be imported.
collect_ignore_glob = [] if HAS_VLLM else ["test_*.py"]

if HAS_VLLM:
    import vllm

    OLD = vllm.__version__.startswith("0.15")
    if OLD:
        import attention_in_torch  # noqa: F401

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
    "initializer_range": 0.12,
}


GEMMA = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_size": 128,
    "num_hidden_layers": 12,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 2,
    "sliding_window": 100,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "intermediate_size": 256,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "initializer_range": 0.12,
}


def with_random_weights(folder):
    """Gives the configuration in ``folder`` random weights, so large that tokens depend on every key and value."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A model of one file: its configuration."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def weights_folder(model_folder, tmp_path_factory):
    """A small model of one kind of attention."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    return with_random_weights(folder)


@pytest.fixture(scope="session")
def gemma_folder(tmp_path_factory):
    """A small model with five layers of sliding windows for each one that sees everything."""
    folder = tmp_path_factory.mktemp("gemma")
    (folder / "config.json").write_text(json.dumps(GEMMA), encoding="utf-8")
    return with_random_weights(folder)


class RealModel(NamedTuple):
    """A small model that has read a book, a question about a text, and how to read its answer."""

    folder: Path
    prompt: list
    decode: Callable


@pytest.fixture(scope="session")
def smollm(tmp_path_factory):
    """SmolLM2-135M-Instruct as files that vLLM serves."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from kvortex import demo

    folder, gguf = tmp_path_factory.mktemp("smollm"), demo.fetch()
    files = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    if hasattr(transformers, "GgufConfig"):
        files["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # A copy: what was read from such a file counts as quantized, though it is not any more.
    read = AutoModelForCausalLM.from_pretrained(**files, dtype=torch.bfloat16)
    config = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    text = f"{demo.document()[:1500]}\n\nAnswer in one sentence: How long and how wide is the rock?"
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    return RealModel(folder, tokenizer(asked, add_special_tokens=False)["input_ids"], tokenizer.decode)


@pytest.fixture(autouse=True)
def _quiet():
    yield
    logging.disable(logging.NOTSET)
