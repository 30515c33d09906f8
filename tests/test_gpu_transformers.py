"""The prefix cache of transformers for models on a GPU: what is loaded was stored, and the text is the model's own."""

import pytest

pytest.importorskip("transformers")

import torch

import kvortex
from kvortex.transformers import attach
from test_transformers import FULL, equal_kv, own_cache, stored
from tiny_models import FAMILIES, left_padded, new_model, text

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]


def on_gpu(inputs):
    return {name: tensor.cuda() for name, tensor in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_hit_is_what_transformers_own_reuse_gives(family, dtype, make_engine):
    engine = make_engine("32MiB", device="cuda")
    model = new_model(family, dtype).cuda()
    rows = on_gpu(left_padded([text(90)[0], text(83, seed=1)[0]]))
    with attach(model, engine) as attachment:
        cold = model.generate(**rows, **FULL)
        hit = model.generate(**rows, **FULL)
        last = attachment.stats.last
    columns = 16 * 5
    assert (last.prompt_tokens, last.reused_tokens) == (90 + 83, columns + columns - 7)
    assert equal_kv(hit.past_key_values, cold.past_key_values, 0, 0, columns)
    assert equal_kv(hit.past_key_values, cold.past_key_values, 1, 7, columns)
    own = model.generate(**rows, **FULL, past_key_values=own_cache(cold.past_key_values, columns))
    assert torch.equal(hit.sequences, own.sequences)
    assert all(torch.equal(x, y) for x, y in zip(hit.logits, own.logits, strict=True))


def test_a_generate_in_a_stream_of_its_own(make_engine):
    engine = make_engine("32MiB", device="cuda")
    model, prompt, stream = new_model().cuda(), text(90).cuda(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with attach(model, engine) as attachment, torch.cuda.stream(stream):
        cold = model.generate(prompt, **FULL)
        assert stored(attachment, prompt[0].cpu()) == 5
        hit = model.generate(prompt, **FULL)
        assert attachment.stats.last.reused_tokens == 80
    stream.synchronize()
    assert torch.equal(cold.sequences, hit.sequences)


def test_the_engine_must_be_of_the_models_gpu(make_engine):
    model = new_model().cuda()
    with pytest.raises(kvortex.UnsupportedError, match="create the engine with device='cuda:0'"):
        attach(model, make_engine("32MiB", device="none"))
