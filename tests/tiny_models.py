"""Small models with random weights, large enough for each token to depend on all before it."""

import copy
from functools import cache

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# For matrices this small a second thread costs more than it brings, most of all beside other work.
torch.set_num_threads(1)

PAD, BOS, EOS, VOCABULARY = 0, 1, 2, 160
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_OWN = {
    "mistral": {"sliding_window": None},
    # Keys and values of different widths.
    "deepseek_v3": {
        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
        "v_head_dim": 24, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
        "moe_intermediate_size": 32, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    },
}  # fmt: skip
FAMILIES = ["llama", "qwen2", "qwen3", "gpt2", "mistral", "deepseek_v3"]


def new_model(family="llama", dtype=torch.float32, seed=0, **changes):
    """A model of its own, in eval mode; the same arguments give the same weights."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(family, **_SIZES | _OWN.get(family, {}) | changes)
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()


@cache
def _model(family, dtype):
    return new_model(family, dtype)


def shared_model(family="llama", dtype=torch.float32):
    """A model that other tests use too: attach it, but leave its weights alone."""
    return _model(family, dtype)


def changed_copy(model, change):
    """A copy of a model after `change(copy)`."""
    other = copy.deepcopy(model)
    change(other)
    return other


def text(length, seed=0, rows=1):
    """Random token ids without special tokens, [rows, length]."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(rows):
    """`input_ids` and `attention_mask` of rows of different lengths."""
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([torch.full((width - len(row),), PAD), row]) for row in rows])
    mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows])
    return {"input_ids": ids, "attention_mask": mask}
