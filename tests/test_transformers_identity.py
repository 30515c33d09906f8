"""KV of one model is never given to another: not to one with other weights, and not to itself after a change."""

import pytest

pytest.importorskip("transformers")

import torch
from transformers import LogitsProcessor

from kvortex.transformers import attach
from tiny_models import PAD, new_model, text

GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
PROMPT = text(60)


@pytest.fixture
def engine(make_engine):
    return make_engine("32MiB")


@pytest.fixture
def llama(engine):
    """A Llama of its own, attached, with the prompt stored."""
    model = new_model()
    with attach(model, engine) as attachment:
        model.generate(PROMPT, **GREEDY)
        yield attachment


def reused(attachment):
    """Generate and compare with the model as it is now; how many tokens came from the cache."""
    model = attachment.model
    said = model.generate(PROMPT, **GREEDY)
    assert torch.equal(said, type(model).generate(model, PROMPT, **GREEDY))
    return attachment.stats.last.reused_tokens


@torch.no_grad()
def edit_one_weight(model):
    model.model.layers[1].self_attn.k_proj.weight[5, 7] += 0.5


@torch.no_grad()
def edit_one_buffer(model):
    model.model.rotary_emb.inv_freq.mul_(0.9)


def step_an_optimizer(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    model(PROMPT, labels=PROMPT).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def load_a_state(model, **options):
    model.load_state_dict(new_model(seed=3).state_dict(), **options)


def load_a_state_by_assignment(model):
    load_a_state(model, assign=True)


def replace_a_parameter(model):
    layer = model.model.layers[0].self_attn.v_proj
    layer.weight = torch.nn.Parameter(-layer.weight.detach())


class Shifted(torch.nn.Module):
    """A layer with something on top, as adapters are put into models."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.strength = 0.5
        self.direction = torch.ones(1)  # a tensor that is neither parameter nor buffer

    def forward(self, states):
        return self.base(states) + self.strength * self.direction * states.mean(-1, keepdim=True)


def add_an_adapter(model):
    layer = model.model.layers[0].self_attn
    layer.k_proj = Shifted(layer.k_proj).eval()


def add_a_hook(model):
    model.model.layers[0].register_forward_hook(lambda _module, _inputs, output: output * 1.5)


def change_a_plain_attribute(model):
    model.model.layers[2].self_attn.scaling *= 3


def change_the_attention_code(model):
    model.set_attn_implementation("eager")


CHANGES = [
    edit_one_weight,
    edit_one_buffer,
    step_an_optimizer,
    load_a_state,
    load_a_state_by_assignment,
    replace_a_parameter,
    add_an_adapter,
    add_a_hook,
    change_a_plain_attribute,
    change_the_attention_code,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_model_does_not_get_its_old_kv(change, llama):
    before = llama.namespace
    assert reused(llama) == 48
    change(llama.model)
    assert reused(llama) == 0
    assert llama.namespace.digest != before.digest
    assert reused(llama) == 48


def test_control_the_old_kv_would_have_changed_the_text(llama, monkeypatch):
    old = llama.namespace
    monkeypatch.setattr(type(llama._identity), "current", lambda self: old)
    load_a_state(llama.model)
    with pytest.raises(AssertionError):
        reused(llama)


def test_a_change_taken_back_finds_the_old_kv(llama):
    before = {name: tensor.clone() for name, tensor in llama.model.state_dict().items()}
    edit_one_weight(llama.model)
    assert reused(llama) == 0
    llama.model.load_state_dict(before)
    assert reused(llama) == 48


def test_an_adapter_that_is_turned_and_taken_off(llama):
    attention = llama.model.model.layers[0].self_attn
    add_an_adapter(llama.model)
    assert reused(llama) == 0
    attention.k_proj.strength = 0.25
    assert reused(llama) == 0
    attention.k_proj.direction.neg_()
    assert reused(llama) == 0
    attention.k_proj = attention.k_proj.base
    assert reused(llama) == 48


def test_an_edit_through_data_needs_refresh(llama):
    llama.model.model.layers[1].self_attn.k_proj.weight.data.mul_(-1)
    llama.refresh()
    assert reused(llama) == 0


def test_inference_tensors_are_read_each_time(engine):
    with torch.inference_mode():
        model = new_model()
    with attach(model, engine) as attachment, torch.inference_mode():
        model.generate(PROMPT, **GREEDY)
        assert reused(attachment) == 48
        model.model.layers[1].self_attn.k_proj.weight[5, 7] += 0.5
        assert reused(attachment) == 0


def test_weights_changed_while_generating_store_nothing(llama):
    class Edit(LogitsProcessor):
        def __call__(self, _input_ids, scores):
            edit_one_weight(llama.model)
            return scores

    llama.engine.reset()
    llama.model.generate(PROMPT, **GREEDY, logits_processor=[Edit()])
    assert llama.engine.get_stats()["blocks"] == 0


def test_equal_models_share_and_others_do_not(engine):
    with attach(new_model(), engine) as first:
        first.model.generate(PROMPT, **GREEDY)
    with attach(new_model(), engine) as twin:
        assert twin.namespace.digest == first.namespace.digest
        assert reused(twin) == 48
    last_bit = new_model()
    with torch.no_grad():
        last_bit.lm_head.weight[-1, -1] = torch.nextafter(last_bit.lm_head.weight[-1, -1], torch.tensor(9.0))
    with attach(last_bit, engine) as other:
        assert reused(other) == 0


@pytest.mark.parametrize(
    "changes",
    [{"rope_theta": 500.0}, {"rms_norm_eps": 1e-3}, {"attention_bias": True}, {"max_position_embeddings": 256}],
    ids=lambda changes: next(iter(changes)),
)
def test_another_configuration_is_another_namespace(changes, llama, make_engine):
    with attach(new_model(**changes), make_engine("32MiB")) as other:
        assert other.namespace.digest != llama.namespace.digest


def test_the_dtype_and_the_block_size_are_part_of_the_namespace(make_engine):
    def attached(dtype, block_tokens):
        with attach(new_model("llama", dtype), make_engine("32MiB"), block_tokens=block_tokens) as attachment:
            return attachment.namespace.digest

    kinds = [(torch.bfloat16, 16), (torch.float16, 16), (torch.float16, 8), (torch.float32, 16)]
    assert len({attached(*kind) for kind in kinds}) == 4


def test_where_a_model_was_loaded_from_does_not_matter(tmp_path, llama, engine):
    llama.model.save_pretrained(tmp_path)
    copied = type(llama.model).from_pretrained(tmp_path)
    with attach(copied, engine) as other:
        assert other.namespace.digest == llama.namespace.digest
