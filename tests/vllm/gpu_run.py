"""One engine on a GPU with CUDA graphs on: full and partial hits must give the tokens that were computed, although the
pages that held them are overwritten with noise. Prints a row for each prompt.

    VLLM_USE_FLASHINFER_SAMPLER=0 python gpu_run.py [POOL]
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import vllm
from vllm import LLM, SamplingParams

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336,
    "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}  # fmt: skip
LENGTHS = (2048, 8192, 30000)
TOKENS = 16


def real_weights(model):
    """Values so large that tokens depend on keys and values; dummy ones hardly do."""
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weight.data.normal_(0, 1.0 if "embed" in name else 0.03)


class Engine:
    def __init__(self, pool):
        folder = Path(tempfile.mkdtemp())
        (folder / "config.json").write_text(json.dumps(LLAMA_8B))
        start = time.perf_counter()
        self.llm = LLM(
            model=str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=40000,
            gpu_memory_utilization=0.85,
            disable_log_stats=True,
            enable_prefix_caching=True,
            compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24, 32]},
            kv_transfer_config={
                "kv_connector": "KVortexConnector",
                "kv_connector_module_path": "kvortex.vllm",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {"cpu_pool_size_bytes": pool},
            },
        )
        taken = time.perf_counter() - start
        print(f"vLLM {vllm.__version__} on {torch.cuda.get_device_name()}: started in {taken:.0f} s")
        self.llm.apply_model(real_weights)
        assert self.llm.reset_prefix_cache()
        core = self.llm.llm_engine.engine_core.engine_core
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.planner = core.scheduler.connector._scheduler._planner

    def ask(self, tokens, count):
        """Tokens, time to the last of them, and how many of the prompt were cached."""
        params = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, max_tokens=count)
        start = time.perf_counter()
        (answer,) = self.llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)
        return list(answer.outputs[0].token_ids), time.perf_counter() - start, answer.num_cached_tokens

    def drop(self):
        """The engine forgets its blocks, and all of its memory for them is noise."""
        self.settle()
        self.ask([7] * 40, 1)
        for _ in range(50):
            if self.llm.reset_prefix_cache():
                break
        else:
            raise AssertionError("the prefix cache was not reset")
        for cache in self.runner.kv_caches:
            cache.normal_()
        torch.cuda.synchronize()

    def settle(self):
        """Waits for what is being stored."""
        deadline = time.monotonic() + 30
        while self.planner.get_stats()["in_flight"]:
            self.planner.poll()
            assert time.monotonic() < deadline, self.planner.get_stats()


def row(engine, length):
    generator = torch.Generator().manual_seed(length)
    prompt = torch.randint(10, 128000, (length,), generator=generator).tolist()
    _, cold, _ = engine.ask(prompt, 1)
    _, warm, cached = engine.ask(prompt, 1)
    wanted, _, _ = engine.ask(prompt, TOKENS)
    times = []
    for _ in range(3):
        engine.drop()
        _, taken, hit = engine.ask(prompt, 1)
        times.append(taken)
    engine.drop()
    found, _, hit = engine.ask(prompt, TOKENS)
    engine.drop()
    part = prompt[: length // 2 + 5] + prompt[:100]
    partial, _, partial_hit = engine.ask(part, TOKENS)
    engine.llm.reset_prefix_cache(reset_connector=True)
    computed, _, none = engine.ask(part, TOKENS)
    print(
        f"{length:6} tokens: cold {cold * 1e3:7.1f} ms, warm {warm * 1e3:6.1f} ({cached} cached), hit "
        f"{min(times) * 1e3:6.1f} to {max(times) * 1e3:6.1f} ms ({hit} loaded), same tokens: {found == wanted}; "
        f"partial: {partial_hit} loaded, {none} without, same tokens: {partial == computed}",
        flush=True,
    )
    loaded = hit >= length - 32 and partial_hit >= length // 2 - 16 and not none
    return loaded and found == wanted and partial == computed


def main():
    engine = Engine(sys.argv[1] if len(sys.argv) > 1 else "40GiB")
    rows = [row(engine, length) for length in LENGTHS]
    print("ALL RIGHT" if all(rows) else "WRONG", flush=True)
    sys.exit(not all(rows))


if __name__ == "__main__":
    main()
