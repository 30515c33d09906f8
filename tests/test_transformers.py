"""The prefix cache of transformers: what is loaded was stored, and the text is what the model would have said."""

import copy
import gc
import logging
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("transformers")

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.generation.streamers import BaseStreamer

import kvortex
import kvortex.transformers
from kvortex.transformers import Reuse, attach
from tiny_models import FAMILIES, PAD, left_padded, new_model, shared_model, text

# Greedy to the full length: no test depends on where a random model happens to end.
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
FULL = GREEDY | {"return_dict_in_generate": True, "output_logits": True}


@pytest.fixture
def engine(make_engine):
    return make_engine("32MiB")


@pytest.fixture
def llama(engine):
    """The shared Llama, attached."""
    with attach(shared_model(), engine) as attachment:
        yield attachment


class Wrapped:
    """An engine of which a test replaces some methods."""

    def __init__(self, engine, **replaced):
        self._engine = engine
        self.__dict__.update(replaced)

    def __getattr__(self, name):
        return getattr(self._engine, name)


def raising(error):
    def method(*_args, **_kwargs):
        raise error

    return method


def plain(model, **inputs):
    """What the model says without a cache; a fresh attachment would change nothing about it."""
    return type(model).generate(model, **GREEDY | inputs)


def kept(cache):
    """Keys and values of all layers: each [rows, heads, tokens, width]."""
    return [part for layer in cache.layers for part in (layer.keys, layer.values)]


def equal_kv(a, b, row, start, stop):
    """Bit for bit, so that -0.0 is not 0.0 and NaN is itself."""
    pairs = zip(kept(a), kept(b), strict=True)
    cut = (row, slice(None), slice(start, stop))
    return all(torch.equal(x[cut].view(torch.uint8), y[cut].view(torch.uint8)) for x, y in pairs)


def own_cache(cache, columns):
    """A cache of transformers' own with the first columns of another."""
    parts = [part[:, :, :columns].clone() for part in kept(cache)]
    return DynamicCache(list(zip(parts[0::2], parts[1::2], strict=True)))


def keys_of(attachment, tokens):
    return kvortex.hash_tokens(attachment.namespace, tokens, attachment.block_tokens)


def stored(attachment, tokens):
    """How many blocks of a text are in the engine, without a gap."""
    return attachment.engine.match_prefix(keys_of(attachment, tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_hit_is_what_transformers_own_reuse_gives_bit_for_bit(family, dtype, engine):
    model = shared_model(family, dtype)
    rows = left_padded([text(90)[0], text(83, seed=1)[0]])
    with attach(model, engine) as attachment:
        cold = model.generate(**rows, **FULL)
        hit = model.generate(**rows, **FULL)
        last = attachment.stats.last
    columns = min(0 + 16 * 5, 7 + 16 * 5)
    assert (last.prompt_tokens, last.reused_tokens) == (90 + 83, columns + columns - 7)
    assert equal_kv(hit.past_key_values, cold.past_key_values, 0, 0, columns)
    assert equal_kv(hit.past_key_values, cold.past_key_values, 1, 7, columns)
    own = model.generate(**rows, **FULL, past_key_values=own_cache(cold.past_key_values, columns))
    assert torch.equal(hit.sequences, own.sequences)
    assert all(torch.equal(x, y) for x, y in zip(hit.logits, own.logits, strict=True))
    assert equal_kv(hit.past_key_values, own.past_key_values, slice(None), columns, None)


def test_the_tail_of_a_text_is_evicted_before_its_head(make_engine):
    """A head whose lease ended before its tail was stored was the older of the two, and went first."""
    engine = make_engine("1MiB", eviction_watermark=1.0, eviction_ratio=0.0)
    model, document = shared_model(), text(64)
    with attach(model, engine) as attachment:
        model.generate(document, **GREEDY)
        tokens = model.generate(torch.cat([document, text(48, seed=1)], dim=1), **GREEDY)[0, :-1]
        blocks = stored(attachment, tokens)
        assert blocks == 7
        room = engine.capacity_blocks - engine.get_stats()["blocks"]
        others = [bytes([i]) * 32 for i in range(room + 3)]
        engine.save_blocks(others, [bytes(engine.block_size_bytes)] * len(others))
        assert stored(attachment, tokens) == blocks - 3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_what_the_model_says_without_a_cache(family, engine):
    model = shared_model(family)
    document, questions = text(70), text(12, seed=5, rows=3)
    with attach(model, engine) as attachment:
        for question in questions:
            prompt = torch.cat([document, question[None]], dim=1)
            assert torch.equal(model.generate(prompt, **GREEDY), plain(model, input_ids=prompt))
        assert attachment.stats.total.reused_tokens == 2 * 64


def test_reused_tokens_do_not_reach_the_model(engine):
    model, seen = new_model(), []
    model.model.register_forward_pre_hook(
        lambda _m, _a, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    with attach(model, engine):
        seen.clear()
        model.generate(text(100), **GREEDY)
        model.generate(text(100), **GREEDY)
    assert seen == [100, *[1] * 7, 4, *[1] * 7]


@pytest.mark.parametrize(("length", "reused"), [(1, 0), (16, 0), (17, 16), (32, 16), (33, 32), (48, 32)])
def test_one_token_at_least_is_left_to_compute(length, reused, llama):
    prompt = text(length)
    expected = plain(llama.model, input_ids=prompt)
    llama.model.generate(prompt, **GREEDY)
    assert torch.equal(llama.model.generate(prompt, **GREEDY), expected)
    assert llama.stats.last.reused_tokens == reused


def test_generated_tokens_are_stored_but_the_last_which_has_no_kv(llama):
    prompt = text(20)
    said = llama.model.generate(prompt, **GREEDY | {"max_new_tokens": 28})
    assert said.shape[1] == 48
    assert stored(llama, said[0]) == 2
    said = llama.model.generate(prompt, **GREEDY | {"max_new_tokens": 29})
    assert stored(llama, said[0]) == 3


def test_a_conversation_reuses_its_own_answers(llama):
    said = text(40)
    for turn in range(1, 4):
        before = said.shape[1]
        said = llama.model.generate(torch.cat([said, text(9, seed=turn)], dim=1), **GREEDY | {"max_new_tokens": 24})
        if turn > 1:
            assert llama.stats.last.reused_tokens == (before - 1) // 16 * 16
    assert torch.equal(said, plain(llama.model, input_ids=said[:, :-24], max_new_tokens=24))


def test_the_same_tokens_after_other_tokens_are_another_block(llama):
    first, second = text(64), text(64)
    second[0, 0] += 1
    llama.model.generate(first, **GREEDY)
    assert torch.equal(llama.model.generate(second, **GREEDY), plain(llama.model, input_ids=second))
    assert llama.stats.last.reused_tokens == 0


LENGTHS = [[100, 37, 110], [20, 110], [110, 5], [33, 34, 35, 36], [64, 1, 80]]


@pytest.mark.parametrize("warm", ["all rows", "first row", "last row"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_a_batch_reuses_the_shortest_hit_of_its_rows(lengths, warm, llama):
    texts = [text(length, seed=number)[0] for number, length in enumerate(lengths)]
    known = {"all rows": texts, "first row": texts[:1], "last row": texts[-1:]}[warm]
    for row in known:
        llama.model.generate(row[None], **GREEDY)
    batch = left_padded(texts)
    assert torch.equal(llama.model.generate(**batch, **GREEDY), plain(llama.model, **batch))
    hits = [(len(row) - 1) // 16 * 16 if any(row is one for one in known) else 0 for row in texts]
    columns = min(max(lengths) - length + hit for length, hit in zip(lengths, hits, strict=True))
    reused = sum(max(0, columns - (max(lengths) - length)) for length in lengths)
    assert llama.stats.last.reused_tokens == reused
    if known is texts:
        return
    # What the padded batch itself stored is right too.
    for row in texts:
        assert torch.equal(llama.model.generate(row[None], **GREEDY), plain(llama.model, input_ids=row[None]))


def test_padding_that_only_transformers_can_see(llama):
    batch = left_padded([text(60)[0], text(41, seed=1)[0]])
    expected = plain(llama.model, **batch)
    for reused in (0, 48 + 48 - 19):
        assert torch.equal(llama.model.generate(batch["input_ids"], **GREEDY), expected)
        assert llama.stats.last.reused_tokens == reused


def test_padding_after_the_end_of_a_row_is_not_stored(llama):
    prompt = left_padded([text(30)[0], text(30, seed=1)[0]])
    ends = plain(llama.model, **prompt)[0, 32].item()
    said = llama.model.generate(**prompt, **GREEDY | {"eos_token_id": ends, "max_new_tokens": 40})
    assert said[0, -30:].eq(PAD).all()
    assert stored(llama, said[0]) == 2
    assert stored(llama, said[1]) >= 4


def test_every_way_to_call_generate(llama):
    model, prompt = llama.model, text(50)
    expected = plain(model, input_ids=prompt)
    config = GenerationConfig(**GREEDY)
    for call in (
        lambda: model.generate(prompt, **GREEDY),
        lambda: model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **GREEDY),
        lambda: model.generate(prompt, config),
        lambda: model.generate(inputs=prompt, generation_config=config),
        lambda: model.generate(prompt.int(), **GREEDY),
        lambda: model.generate(prompt, **FULL).sequences,
        lambda: model.generate(prompt, **GREEDY, cache_implementation="dynamic"),
        lambda: model.generate(prompt, **GREEDY, tokenizer=object()),
    ):
        assert torch.equal(call(), expected)
    assert llama.stats.calls == 8
    assert llama.stats.total.reused_tokens == 7 * 48


def test_inference_mode(llama):
    prompt = text(50)
    expected = plain(llama.model, input_ids=prompt)
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(llama.model.generate(prompt, **GREEDY), expected)
    assert llama.stats.last.reused_tokens == 48


def test_a_streamer_hears_the_same(llama):
    class Heard(BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    heard = [Heard(), Heard()]
    for streamer in heard:
        llama.model.generate(text(50), streamer=streamer, **GREEDY)
    assert llama.stats.last.reused_tokens == 48
    assert heard[0].tokens == heard[1].tokens
    assert heard[0].tokens[-1] == "end"


def test_sampling_and_several_answers(llama):
    options = GREEDY | {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 20}
    prompt = text(50)

    def sampled(generate):
        torch.manual_seed(7)
        return generate(prompt, **options)

    expected = sampled(llama.plain_generate)
    assert torch.equal(sampled(llama.model.generate), expected)
    assert torch.equal(sampled(llama.model.generate), expected)
    assert (llama.stats.last.prompt_tokens, llama.stats.last.reused_tokens) == (150, 144)
    assert len({tuple(row) for row in expected.tolist()}) == 3


def test_guidance_runs_its_own_forward_passes_untouched(llama):
    prompt, negative = text(50), text(40, seed=3)
    options = GREEDY | {"guidance_scale": 1.5, "negative_prompt_ids": negative}
    expected = llama.plain_generate(prompt, **options)
    for _ in range(2):
        assert torch.equal(llama.model.generate(prompt, **options), expected)
    assert llama.stats.last.reused_tokens == 48


def test_the_returned_cache_is_what_the_caller_would_have_seen(llama):
    cold, hit = (llama.model.generate(text(50), **FULL).past_key_values for _ in range(2))
    assert type(hit) is DynamicCache
    assert hit.get_seq_length() == cold.get_seq_length() == 57
    assert [part.shape for part in kept(hit)] == [part.shape for part in kept(cold)]
    assert all(part.is_contiguous() for part in kept(hit))


def test_nothing_of_a_call_is_kept_after_it(llama):
    for _ in range(2):
        result = llama.model.generate(text(50), **FULL)
        caches = [weakref.ref(result.past_key_values), weakref.ref(result.past_key_values.layers[0].keys)]
        del result
        gc.collect()
        assert [cache() for cache in caches] == [None, None]
    assert llama.engine.get_stats()["leased_blocks"] == 0


def test_statistics(llama, engine):
    assert llama.stats.calls == 0
    llama.model.generate(text(50), **GREEDY)
    block = llama.block_bytes
    assert block == 3 * 2 * 2 * 16 * 16 * 4 == engine.block_size_bytes
    assert llama.stats.last == Reuse(prompt_tokens=50, stored_blocks=3, stored_bytes=3 * block)
    llama.model.generate(text(50), **GREEDY)
    assert llama.stats.last == Reuse(prompt_tokens=50, reused_tokens=48, loaded_bytes=3 * block)
    assert llama.stats.last.computed_tokens == 2
    assert (llama.stats.total.prompt_tokens, llama.stats.calls) == (100, 2)
    counted = engine.get_stats()
    assert (counted["bytes_saved"], counted["bytes_loaded"]) == (3 * block, 3 * block)
    assert counted["leased_blocks"] == 0


@pytest.mark.parametrize("block_tokens", [1, 7, 64])
def test_other_block_sizes(block_tokens, engine):
    model, prompt = shared_model(), text(65)
    with attach(model, engine, block_tokens=block_tokens) as attachment:
        model.generate(prompt, **GREEDY)
        assert torch.equal(model.generate(prompt, **GREEDY), plain(model, input_ids=prompt))
        assert attachment.stats.last.reused_tokens == 64 // block_tokens * block_tokens


@pytest.mark.parametrize("block_tokens", [0, -1, 4097, True, 16.0, "16"])
def test_a_block_size_that_cannot_be(block_tokens, engine):
    with pytest.raises(kvortex.InvalidArgumentError, match="block_tokens"):
        attach(shared_model(), engine, block_tokens=block_tokens)


def test_threads_share_an_attachment(llama):
    prompts = [torch.cat([text(48), text(20, seed=seed)], dim=1) for seed in range(4)]
    expected = [plain(llama.model, input_ids=prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            said = pool.map(lambda prompt: llama.model.generate(prompt, **GREEDY), prompts)
            assert all(torch.equal(a, b) for a, b in zip(said, expected, strict=True))
    assert llama.stats.calls == 12
    assert llama.stats.last.reused_tokens == 64


def test_an_engine_too_small_for_the_prompts_still_gives_the_right_text(make_engine):
    model = shared_model()
    with attach(model, make_engine(12 * 3 * 2 * 2 * 16 * 16 * 4)) as attachment:
        for round_ in range(8):
            prompt = torch.cat([text(40), text(90, seed=round_ % 3)], dim=1)
            assert torch.equal(model.generate(prompt, **GREEDY), plain(model, input_ids=prompt))
        counted = attachment.engine.get_stats()
    assert counted["evictions"] > 0
    assert counted["leased_blocks"] == 0


@pytest.mark.parametrize("leased", [True, False], ids=["leased", "control"])
def test_eviction_between_lookup_and_load_waits_for_the_lease(leased, make_engine):
    engine = make_engine(16 * 3 * 2 * 2 * 16 * 16 * 4)
    size = 3 * 2 * 2 * 16 * 16 * 4
    flooded = []

    def load_after_a_flood(keys, out):
        others = kvortex.hash_tokens(b"\7" * 32, list(range(64 * 16)))
        flooded.append(engine.save_blocks(others, torch.zeros(64, size, dtype=torch.uint8)))
        return engine.load_blocks(keys, out)

    def look_up(keys):
        lease = engine.lease_prefix(keys)
        if not leased:
            lease.release()
        return lease

    model, prompt = shared_model(), text(100)
    with attach(model, Wrapped(engine, load_blocks=load_after_a_flood, lease_prefix=look_up)) as attachment:
        model.generate(prompt, **GREEDY)
        assert torch.equal(model.generate(prompt, **GREEDY), plain(model, input_ids=prompt))
        assert attachment.stats.last.reused_tokens == (96 if leased else 0)
    assert flooded[0].blocks > 0


@pytest.mark.parametrize("broken", ["lease_prefix", "load_blocks"])
def test_a_load_that_fails_is_computed(broken, engine, caplog):
    wrapped = Wrapped(engine, **{broken: raising(kvortex.TransferError("the copy failed"))})
    model, prompt = shared_model(), text(50)
    with attach(model, wrapped) as attachment, caplog.at_level(logging.WARNING, "kvortex.transformers"):
        for _ in range(3):
            assert torch.equal(model.generate(prompt, **GREEDY), plain(model, input_ids=prompt))
        assert attachment.stats.total.reused_tokens == 0
        assert stored(attachment, prompt[0]) == 3
    assert [record.getMessage() for record in caplog.records if record.name == "kvortex.transformers"] == [
        "no KV was reused, generation goes on without (said once): the copy failed"
    ]
    assert engine.get_stats()["leased_blocks"] == 0


def test_a_block_that_is_gone_at_the_load_is_computed(engine):
    def load_half(keys, out):
        half = kvortex.Segments([part[: len(part) // 2] for part in out.tensors])
        engine.load_blocks(keys[: len(keys) // 64 * 32], half)
        return engine.load_blocks(b"\1" * len(keys), out)

    model, prompt = shared_model(), text(100)
    with attach(model, Wrapped(engine, load_blocks=load_half)) as attachment:
        for _ in range(2):
            assert torch.equal(model.generate(prompt, **GREEDY), plain(model, input_ids=prompt))
        assert attachment.stats.total.reused_tokens == 0


def test_tokens_that_have_no_keys_are_computed(llama, monkeypatch, caplog):
    refused = raising(kvortex.InvalidArgumentError("no such token"))
    monkeypatch.setattr(kvortex.transformers, "KeyChain", refused)
    prompt = text(50)
    assert torch.equal(llama.model.generate(prompt, **GREEDY), plain(llama.model, input_ids=prompt))
    assert "no such token" in caplog.text
    assert llama.engine.get_stats()["saved_blocks"] == 0


def test_blocks_that_are_lost_at_the_load_are_stored_again(engine):
    def lose(keys, out):
        engine.reset()
        return engine.load_blocks(keys, out)

    model, prompt = shared_model(), text(100)
    with attach(model, Wrapped(engine, load_blocks=lose)) as attachment:
        for _ in range(2):
            model.generate(prompt, **GREEDY)
            assert stored(attachment, prompt[0]) == 6
        assert attachment.stats.last.stored_blocks == 6


@pytest.mark.parametrize("error", [kvortex.CapacityError("no room"), RuntimeError("anything")], ids=repr)
def test_a_save_that_fails_does_not_cost_the_text(error, engine, caplog):
    model, prompt = shared_model(), text(50)
    with attach(model, Wrapped(engine, save_blocks=raising(error))) as attachment:
        for _ in range(3):
            assert torch.equal(model.generate(prompt, **GREEDY), plain(model, input_ids=prompt))
        assert attachment.stats.total == Reuse(prompt_tokens=150)
    assert [record.getMessage() for record in caplog.records if record.name == "kvortex.transformers"] == [
        f"no KV was stored, generation goes on without (said once): {error}"
    ]


def test_an_engine_that_was_shut_down(make_engine, caplog):
    engine, model, prompt = make_engine(), shared_model(), text(50)
    with attach(model, engine):
        model.generate(prompt, **GREEDY)
        engine.shutdown()
        assert torch.equal(model.generate(prompt, **GREEDY), plain(model, input_ids=prompt))
    assert "generation goes on without" in caplog.text


def test_a_pool_with_no_room_says_so_and_the_text_stays(make_engine, caplog):
    model, prompt = shared_model(), text(200)
    with attach(model, make_engine(4 * 3 * 2 * 2 * 16 * 16 * 4)):
        assert torch.equal(model.generate(prompt, **GREEDY), plain(model, input_ids=prompt))
    assert "no room" in caplog.text


def differs(attachment, **batch):
    return not torch.equal(attachment.model.generate(**batch, **GREEDY), plain(attachment.model, **batch))


def test_control_wrong_bytes_change_the_text(llama, engine):
    prompt = text(100)
    llama.model.generate(prompt, **GREEDY)
    engine.reset()
    noise = torch.randn(6, llama.block_bytes // 4, generator=torch.Generator().manual_seed(1))
    engine.save_blocks(keys_of(llama, prompt[0, :96]), noise)
    assert differs(llama, input_ids=prompt)
    assert llama.stats.last.reused_tokens == 96


@pytest.mark.parametrize("shift", ["start", "row"])
def test_control_wrong_places_change_the_text(shift, llama, monkeypatch):
    batch = left_padded([text(100)[0], text(93, seed=1)[0]])
    llama.model.generate(**batch, **GREEDY)
    right = type(llama)._blocks
    wrong = {
        "start": lambda self, kept, row, start, blocks: right(self, kept, row, start + 1, blocks),
        "row": lambda self, kept, row, start, blocks: right(self, kept, 1 - row, start, blocks),
    }
    monkeypatch.setattr(type(llama), "_blocks", wrong[shift])
    assert differs(llama, **batch)
    assert llama.stats.last.reused_tokens > 0


def test_detach_gives_the_model_back_as_it_was(engine):
    model = new_model()
    before = set(vars(model))
    attachment = attach(model, engine)
    assert model.generate.__doc__ == type(model).generate.__doc__
    model.generate(text(50), **GREEDY)
    attachment.detach()
    attachment.detach()
    assert set(vars(model)) == before
    assert not model._forward_pre_hooks
    model.generate(text(50), **GREEDY)
    assert attachment.stats.calls == 1


def test_what_was_stored_is_there_for_the_next_attachment(engine):
    model = shared_model()
    with attach(model, engine):
        model.generate(text(50), **GREEDY)
    with attach(model, engine) as attachment:
        model.generate(text(50), **GREEDY)
        assert attachment.stats.last.reused_tokens == 48


def test_a_model_is_attached_once(llama, engine):
    with pytest.raises(kvortex.InvalidArgumentError, match=r"already attached: detach\(\)"):
        attach(llama.model, engine)


def test_a_copy_of_an_attached_model_is_not_attached(llama):
    other = copy.deepcopy(llama.model)
    with torch.no_grad():
        other.lm_head.weight.neg_()
    prompt = text(50)
    llama.model.generate(prompt, **GREEDY)
    assert torch.equal(other.generate(prompt, **GREEDY), plain(other, input_ids=prompt))
    assert not torch.equal(other.generate(prompt, **GREEDY), llama.model.generate(prompt, **GREEDY))
    assert llama.stats.calls == 2


def test_an_engine_with_blocks_of_another_size_is_refused(engine):
    engine.bind(4096)
    model = new_model()
    with pytest.raises(kvortex.LayoutError, match=r"blocks of 4096 bytes.*have 12288.*own engine"):
        attach(model, engine)
    assert not model._forward_pre_hooks


def test_two_models_share_an_engine_but_no_blocks(engine):
    models = [shared_model(), new_model(seed=1)]
    with attach(models[0], engine) as one, attach(models[1], engine) as two:
        for _ in range(2):
            for model in models:
                assert torch.equal(model.generate(text(50), **GREEDY), plain(model, input_ids=text(50)))
        assert one.stats.total.reused_tokens == two.stats.total.reused_tokens == 48


def test_a_model_in_training_mode_neither_loads_nor_stores(engine, caplog):
    model = new_model(attention_dropout=0.5)
    with attach(model, engine) as attachment:
        model.generate(text(50), **GREEDY)
        model.model.layers[1].train()
        assert attachment.namespace is None
        model.generate(text(50), **GREEDY)
        model.generate(text(50, seed=1), **GREEDY)
        assert (attachment.stats.calls, attachment.stats.last) == (1, Reuse())
        model.eval()
        assert torch.equal(model.generate(text(50), **GREEDY), plain(model, input_ids=text(50)))
        assert attachment.stats.last.reused_tokens == 48
    assert engine.get_stats()["saved_blocks"] == 3
    assert caplog.text.count("call model.eval()") == 1


def test_a_model_may_be_attached_in_training_mode(engine):
    model = new_model().train()
    with attach(model, engine) as attachment:
        model.generate(text(50), **GREEDY)
        assert engine.block_size_bytes is None
        model.eval().generate(text(50), **GREEDY)
        assert attachment.stats.last.stored_blocks == 3


def test_the_callers_own_cache_is_left_alone(llama):
    prompt = text(50)
    expected = plain(llama.model, input_ids=prompt)
    own = DynamicCache(config=llama.model.config)
    assert torch.equal(llama.model.generate(prompt, **GREEDY, past_key_values=own), expected)
    assert own.get_seq_length() == 57
    assert llama.stats.calls == 0
    assert llama.engine.get_stats()["saved_blocks"] == 0


def test_no_cache_asked_for_is_no_cache_used(llama):
    prompt = text(50)
    for _ in range(2):
        assert torch.equal(
            llama.model.generate(prompt, **GREEDY, use_cache=False), plain(llama.model, input_ids=prompt)
        )
    assert llama.stats.calls == 0


def test_forward_passes_outside_generate_are_the_models_own(llama):
    prompt = text(50)
    llama.model.generate(prompt, **GREEDY)
    logits = llama.model(prompt).logits
    assert logits.shape[1] == 50
