"""Runs one engine with our connector in a process of its own, and prints what came out as one line of JSON.

python engine_run.py MODEL '{"extra": {...}, "llm": {...}, "multi": false, "prompt": [...]}'
"""

import json
import os
import sys
from pathlib import Path

HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)

import vllm  # noqa: E402

OLD = vllm.__version__.startswith("0.15")
if OLD:
    import attention_in_torch  # noqa: F401

import torch  # noqa: E402

from vllm import LLM, SamplingParams  # noqa: E402

TOKENS = 24


def transfer_config(options):
    ours = {
        "kv_connector": "KVortexConnector",
        "kv_connector_module_path": "kvortex.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"cpu_pool_size_bytes": "256MiB", **options.get("extra", {})},
    }
    if not options.get("multi"):
        return ours
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": [ours]},
    }


class Engine:
    """An engine, and what the tests do to it."""

    def __init__(self, model, options):
        given = {
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "dtype": "float32",
            "max_model_len": 1024,
            "max_num_seqs": 4,
            "seed": 0,
            "block_size": 32,
            "kv_transfer_config": transfer_config(options),
        }
        if OLD:
            given["compilation_config"] = {"custom_ops": ["none"]}
        self.llm = LLM(model=model, **{**given, **options.get("llm", {})})

    @property
    def runner(self):
        """The model runner, where it is in this process."""
        core = getattr(self.llm.llm_engine.engine_core, "engine_core", None)
        worker = getattr(getattr(core, "model_executor", None), "driver_worker", None)
        return None if worker is None else worker.worker.model_runner

    def ask(self, tokens, salt=None):
        params = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, max_tokens=TOKENS)
        prompt = {"prompt_token_ids": tokens}
        if salt is not None:
            prompt["cache_salt"] = salt
        (answer,) = self.llm.generate([prompt], params, use_tqdm=False)
        return list(answer.outputs[0].token_ids), answer.num_cached_tokens

    def score(self, tokens):
        """Log-probabilities of the tokens of a prompt."""
        params = SamplingParams(temperature=0, detokenize=False, max_tokens=1, prompt_logprobs=0)
        (answer,) = self.llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)
        rows = zip(tokens[1:], answer.prompt_logprobs[1:], strict=True)
        return [round(row[token].logprob, 3) for token, row in rows], answer.num_cached_tokens

    def drop(self, *, connector=False):
        """The engine forgets its own blocks, and their memory is overwritten."""
        # What ended a moment ago is freed by the next step.
        self.ask([5] * 40)
        assert self.llm.reset_prefix_cache(reset_connector=connector) is True, "the prefix cache was not reset"
        if self.runner is not None:
            for cache in self.runner.kv_caches:
                # Bytes of fp8 are numbers of 8 bits to torch, and none of these are NaN.
                cache.normal_() if cache.is_floating_point() else cache.random_(0, 64)


def main(model, options):
    generator = torch.Generator().manual_seed(1)
    prompt = options.get("prompt") or torch.randint(6, 31000, (600,), generator=generator).tolist()
    engine = Engine(model, options)
    found = {"cold": engine.ask(prompt), "warm": engine.ask(prompt)}
    engine.drop()
    found["hit"] = engine.ask(prompt)
    if "prompt" not in options:
        found |= other_prompts(engine, prompt)
    if engine.runner is not None and not OLD:
        found["after pause"] = paused(engine, prompt)
    if engine.runner is not None and not options.get("multi"):
        for what, part in {"corrupted": slice(None), "last corrupted": slice(-1, None)}.items():
            engine.drop()
            found[what] = corrupted(engine, prompt, part)
    print("\nFOUND " + json.dumps(found), flush=True)


def other_prompts(engine, prompt):
    """A shared beginning, generated blocks, salts, and nothing after a reset."""
    found = {}
    other = prompt[:300] + prompt[:200]
    engine.drop()
    found["partial"] = engine.ask(other)
    engine.drop(connector=True)
    found["partial cold"] = engine.ask(other)
    engine.drop()
    found["generated"] = engine.ask(other + found["partial cold"][0] + [7, 8, 9])
    engine.ask(prompt, salt="ours")
    engine.drop()
    found["salted"] = engine.ask(prompt, salt="ours")
    found["other salt"] = engine.ask(prompt, salt="theirs")
    found["scored"] = engine.score(prompt[300:])
    engine.drop()
    found["scored again"] = engine.score(prompt[300:])
    engine.drop(connector=True)
    found["after reset"] = engine.ask(prompt)
    return found


def paused(engine, prompt):
    """What an engine does before its memory goes to sleep, and after it is awake again."""
    core = engine.llm.llm_engine.engine_core.engine_core
    core.pause_scheduler("abort", clear_cache=True)
    core.resume_scheduler()
    return engine.ask(prompt)


def corrupted(engine, prompt, part):
    """The control: noise instead of what was loaded must give other tokens, or nothing above proves anything. So must
    noise in the last block alone, which with several groups is one of a sliding window.
    """
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from kvortex.vllm.metadata import block_ids

    side = get_kv_transfer_group()._worker
    load = side.load

    def spoiled(forward_context=None):
        ids = [block for one in side._step.loads for block in one.blocks[part]]
        load(forward_context)
        # A load in the background must not come after the noise.
        side._mover.fence(side._cache.blocks(block_ids(ids)))
        for cache in engine.runner.kv_caches:
            dim = next(dim for dim, size in enumerate(cache.shape) if size == side._cache.num_blocks)
            if ids:
                cache.index_fill_(dim, torch.tensor(ids), 0.5 if cache.is_floating_point() else 60)

    side.load = spoiled
    try:
        return engine.ask(prompt)
    finally:
        side.load = load


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    main(sys.argv[1], json.loads(sys.argv[2]))
