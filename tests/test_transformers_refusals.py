"""What the prefix cache cannot do right is refused by name, and the model stays as it was."""

import types

import pytest

pytest.importorskip("transformers")

import torch
import transformers
from transformers import GenerationConfig

import kvortex
from kvortex.transformers import attach
from tiny_models import BOS, PAD, VOCABULARY, left_padded, new_model, shared_model, text

GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}


@pytest.fixture
def engine(make_engine):
    return make_engine("32MiB")


def embedded(model):
    return model.get_input_embeddings()(text(20))


CALLS = {
    "beam search": lambda m: {"num_beams": 2},
    "beam sample": lambda m: {"num_beams": 2, "do_sample": True},
    "contrastive search": lambda m: {"penalty_alpha": 0.6, "top_k": 4},
    "group beam search": lambda m: {"num_beams": 4, "num_beam_groups": 2},
    "constrained beam search": lambda m: {"num_beams": 2, "force_words_ids": [[5]]},
    "dola generation": lambda m: {"dola_layers": "low"},
    "assisted generation": lambda m: {"assistant_model": m},
    "cache_implementation='static'": lambda m: {"cache_implementation": "static"},
    "cache_implementation='offloaded'": lambda m: {"cache_implementation": "offloaded"},
    "cache_implementation='quantized'": lambda m: {"cache_implementation": "quantized"},
    "compile_config=": lambda m: {"compile_config": transformers.CompileConfig()},
    "prefill_chunk_size=32": lambda m: {"prefill_chunk_size": 32},
    "custom_generate": lambda m: {"custom_generate": lambda *a, **k: None},
    "the input token_type_ids": lambda m: {"token_type_ids": torch.zeros(1, 50, dtype=torch.long)},
    "the input inputs_embeds": lambda m: {"inputs_embeds": embedded(m)},
    "the input pixel_values": lambda m: {"pixel_values": torch.zeros(1, 3, 8, 8)},
    "position_ids": lambda m: {"position_ids": torch.arange(50)[None] + 3},
    "right padding": lambda m: {"attention_mask": (torch.arange(50) < 40).long()[None]},
    "gaps in the attention mask": lambda m: {"attention_mask": (torch.arange(50) != 20).long()[None]},
    "an attention mask of shape": lambda m: {"attention_mask": (torch.arange(51) > 0).long()[None]},
}
if not transformers.__version__.startswith("4."):
    CALLS["cache_implementation='paged'"] = lambda m: {"cache_implementation": "paged"}


@pytest.mark.parametrize("name", CALLS)
def test_a_way_to_generate(name, engine):
    model, prompt = shared_model(), text(50)
    with attach(model, engine) as attachment:
        with pytest.raises(kvortex.UnsupportedError, match=rf"the prefix cache does not support .*{name}") as refused:
            model.generate(prompt, **GREEDY | CALLS[name](model))
        assert "; " in str(refused.value)
        assert engine.get_stats()["saved_blocks"] == 0
        assert torch.equal(model.generate(prompt, **GREEDY), type(model).generate(model, prompt, **GREEDY))
        assert attachment.stats.calls == 1


def test_prompt_lookup(engine):
    with attach(shared_model(), engine), pytest.raises(kvortex.UnsupportedError, match="assisted generation"):
        shared_model().generate(text(50), **GREEDY, prompt_lookup_num_tokens=3)


def test_embeddings_alone(engine):
    model = shared_model()
    with attach(model, engine), pytest.raises(kvortex.UnsupportedError, match="inputs_embeds"):
        model.generate(inputs_embeds=embedded(model), **GREEDY)


def test_right_padding_that_only_transformers_can_see(engine):
    batch = left_padded([text(60)[0], text(41, seed=1)[0]])["input_ids"].flip(1)
    with attach(shared_model(), engine), pytest.raises(kvortex.UnsupportedError, match="padding_side"):
        shared_model().generate(batch, **GREEDY)


def test_a_cache_that_is_not_the_one_of_the_first_look(engine, monkeypatch):
    class Other(transformers.DynamicCache):
        pass

    def prepare(_config, inputs, *_):
        inputs["past_key_values"] = Other()

    model = shared_model()
    with attach(model, engine):
        monkeypatch.setitem(vars(model), "_prepare_cache_for_generation", prepare)
        with pytest.raises(kvortex.UnsupportedError, match="the cache class Other"):
            model.generate(text(50), **GREEDY)


def test_settings_of_the_model_count_as_those_of_the_call(engine):
    model = new_model()
    model.generation_config = GenerationConfig(num_beams=3, **GREEDY)
    with attach(model, engine), pytest.raises(kvortex.UnsupportedError, match="beam search"):
        model.generate(text(50))


def test_autocast(engine):
    model, refused = shared_model(), pytest.raises(kvortex.UnsupportedError, match="autocast")
    with attach(model, engine), torch.autocast("cpu", torch.bfloat16), refused:
        model.generate(text(50), **GREEDY)


def sliding_window():
    return new_model("mistral", sliding_window=32)


def some_layers_slide():
    return new_model("gemma2")


def state_space():
    config = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
    return transformers.MambaForCausalLM(config).eval()


def encoder_decoder():
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=BOS
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def rope(kind, **more):
    theta = {"rope_theta": 10000.0}
    scaling = {"rope_type": kind, "factor": 2.0, "original_max_position_embeddings": 64, **more}
    if transformers.__version__.startswith("4."):
        return new_model(rope_scaling=scaling, **theta)
    return new_model(rope_parameters=scaling | theta)


def dynamic_rope():
    return rope("dynamic")


def long_rope():
    return rope("longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8)


def later_tokens_seen():
    model = new_model()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    return model


def own_generate():
    class Talker(transformers.LlamaForCausalLM):
        def generate(self, *args, **kwargs):
            return super().generate(*args, **kwargs)

    model = new_model()
    model.__class__ = Talker
    return model


def generate_from_the_hub():
    model = new_model()
    model.generate = lambda *args, **kwargs: None
    return model


def low_rank_adapter():
    model = new_model()
    linear = type("Linear", (torch.nn.Linear,), {"__module__": "peft.tuners.lora.layer"})
    model.model.layers[0].self_attn.q_proj = linear(64, 64, bias=False)
    return model


def compiled():
    model = new_model()
    model.compile(backend="eager")
    return model


def offloaded():
    model = new_model()
    model.model.layers[0].to("meta")
    return model


def subclassed_weights():
    class Packed(torch.nn.Parameter):
        pass

    model = new_model()
    model.lm_head.weight = Packed(model.lm_head.weight.detach())
    return model


def no_model():
    return torch.nn.Linear(2, 2)


MODELS = {
    sliding_window: "layer 0 with a DynamicSlidingWindowLayer",
    some_layers_slide: "layer . with a DynamicSlidingWindowLayer",
    state_space: "MambaForCausalLM",
    encoder_decoder: "encoder-decoder model T5ForConditionalGeneration",
    dynamic_rope: "dynamic rope",
    long_rope: "longrope rope",
    later_tokens_seen: "layer 1, whose KV depends on later tokens",
    own_generate: r"Talker, which brings its own generate\(\)",
    generate_from_the_hub: r"custom generate\(\)",
    low_rank_adapter: "PEFT adapter Linear",
    compiled: "compiled model",
    offloaded: "spread or offloaded over cpu, meta",
    subclassed_weights: "the Packed weights of lm_head.weight",
    no_model: "Linear; give attach",
}


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_a_model(make, engine):
    model = make()
    before = set(vars(model))
    with pytest.raises(kvortex.UnsupportedError, match=MODELS[make]):
        attach(model, engine)
    assert set(vars(model)) == before
    assert not model._forward_pre_hooks
    assert engine.block_size_bytes is None


def test_a_model_that_becomes_one(engine):
    model = new_model()
    with attach(model, engine):
        linear = type("Linear", (torch.nn.Linear,), {"__module__": "peft.tuners.lora.layer"})
        model.model.layers[0].self_attn.q_proj = linear(64, 64, bias=False).eval()
        with pytest.raises(kvortex.UnsupportedError, match="PEFT"):
            model.generate(text(50), **GREEDY)


@pytest.mark.parametrize(
    ("place", "reach", "said"),
    [
        ("cuda:0", "none", "create the engine with device='cuda:0'"),
        ("cuda:1", "cuda:0", "create the engine with device='cuda:1'"),
        ("mps", "none", "a model on mps:0"),
    ],
)
def test_a_model_beyond_the_reach_of_its_engine(place, reach, said):
    model, engine = (types.SimpleNamespace(device=where) for where in (torch.device(place), reach))
    with pytest.raises(kvortex.UnsupportedError, match=said):
        kvortex.transformers._refuse_place(model, engine)
    kvortex.transformers._refuse_place(types.SimpleNamespace(device=torch.device("cpu")), engine)
