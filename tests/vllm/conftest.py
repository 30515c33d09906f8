"""The tests of the connector need vLLM: ``.ci/dev vllm`` makes an environment for each version and runs them there."""

import importlib.util
import json
import logging
import os

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
)

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


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A model of one file: its configuration."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def weights_folder(model_folder, tmp_path_factory):
    """A small model with random weights so large that its tokens depend on every key and value."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder)).float()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _quiet():
    yield
    logging.disable(logging.NOTSET)
