"""vLLM's native OffloadingConnector and ours in the same engine on the same requests: tokens from host memory, and what
the scheduler's thread spends on the connector. vLLM 0.32 on a CPU; prints one line of JSON.

    python native_offload.py native    # or kvortex
"""

import functools
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

HERE = str(Path(__file__).parent)
POOL_BYTES, BLOCK = 256 << 20, 32
DOCUMENTS, QUESTIONS, NEW_TOKENS = 12, 20, 32

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 128,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
    "torch_dtype": "float32",
}


class HostCopies(OffloadingWorker):
    """Copies between the engine's blocks and rows of host memory, at once: the device is the host."""

    def __init__(self, caches, rows):
        self._groups = caches.group_data_refs
        self._device = [cache.tensor for cache in caches.tensors]
        self._host = [torch.zeros(rows, cache.page_size_bytes, dtype=torch.int8) for cache in caches.tensors]
        self._done = []

    def _copy(self, job, on_device, on_host, *, store):
        start = moved = 0
        for refs, count in zip(self._groups, on_device.group_sizes, strict=True):
            blocks, rows = (
                torch.from_numpy(one.block_ids[start : start + count].astype("int64")) for one in (on_device, on_host)
            )
            for ref in refs:
                device, host, size = self._device[ref.tensor_idx], self._host[ref.tensor_idx], ref.page_size_bytes
                if store:
                    host[rows, :size] = device[blocks, :size]
                else:
                    device[blocks, :size] = host[rows, :size]
                moved += count * size
            start += count
        self._done.append(TransferResult(job, True, moved, 1e-6))
        return True

    def submit_store(self, job_id, src_spec, dst_spec):
        return self._copy(job_id, src_spec, dst_spec, store=True)

    def submit_load(self, job_id, src_spec, dst_spec):
        return self._copy(job_id, dst_spec, src_spec, store=False)

    def get_finished(self):
        done, self._done = self._done, []
        return done

    def wait(self, job_ids):
        """Nothing is ever under way."""


class HostSpec(CPUOffloadingSpec):
    """The native CPU tier, all of its scheduler's side, without a GPU."""

    def get_worker(self, kv_caches):
        if not self._worker:
            self._worker = HostCopies(kv_caches, self.num_chunks)
        return self._worker


CONNECTORS = {
    "native": {
        "kv_connector": "OffloadingConnector",
        "kv_connector_extra_config": {
            "spec_name": "HostSpec",
            "spec_module_path": "native_offload",
            "cpu_bytes_to_use": POOL_BYTES,
        },
    },
    "kvortex": {
        "kv_connector": "KVortexConnector",
        "kv_connector_module_path": "kvortex.vllm",
        "kv_connector_extra_config": {"cpu_pool_size_bytes": POOL_BYTES, "num_transfer_streams": 1},
    },
}


class Meter:
    """CPU seconds of the calling thread in a connector's methods, and tokens that the engine took from it."""

    def __init__(self, connector):
        self.seconds, self.steps, self.hit_tokens, self._inside = 0.0, 0, 0, False
        for name in dir(connector):
            method = None if name.startswith("_") else getattr(connector, name)
            if callable(method) and hasattr(method, "__self__") and not isinstance(method.__self__, type):
                setattr(connector, name, functools.partial(self._timed, name, method))

    def _timed(self, name, method, *args, **kwargs):
        if self._inside:
            return method(*args, **kwargs)
        self._inside, start = True, time.thread_time()
        try:
            return method(*args, **kwargs)
        finally:
            self.seconds += time.thread_time() - start
            self._inside = False
            self.steps += name == "build_connector_meta"
            if name == "update_state_after_alloc":
                self.hit_tokens += kwargs["num_external_tokens"] if "num_external_tokens" in kwargs else args[2]

    def reset(self):
        self.seconds, self.steps, self.hit_tokens = 0.0, 0, 0


def questions():
    """Questions about documents of 4 to 9 blocks, in any order."""
    rng = random.Random(7)
    documents = [[rng.randrange(6, 1000) for _ in range(rng.randrange(130, 300))] for _ in range(DOCUMENTS)]
    asked = [one + [rng.randrange(6, 1000) for _ in range(20)] for one in documents for _ in range(QUESTIONS)]
    rng.shuffle(asked)
    return asked


def run(name, folder):
    from vllm import LLM, SamplingParams

    (Path(folder) / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    llm = LLM(
        model=str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=32,
        block_size=BLOCK,
        num_gpu_blocks_override=600,
        seed=0,
        kv_transfer_config={**CONNECTORS[name], "kv_role": "kv_both", "kv_load_failure_policy": "recompute"},
    )
    meter = Meter(llm.llm_engine.engine_core.engine_core.scheduler.connector)
    params = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, max_tokens=NEW_TOKENS)

    def ask(prompts):
        answers = llm.generate([{"prompt_token_ids": one} for one in prompts], params, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    rounds, prompts = [], questions()
    for title in ("first", "the same again", "the next turn"):
        meter.reset()
        answers = ask(prompts)
        rounds.append({"round": title, "steps": meter.steps, "hit_tokens": meter.hit_tokens})
        rounds[-1]["us_per_step"] = round(1e6 * meter.seconds / meter.steps, 1)
        if title == "the same again":
            prompts = [[*prompt, *answer, *range(7, 27)] for prompt, answer in zip(prompts, answers, strict=True)]
        # What ended a moment ago is freed by the next step.
        ask([[5] * 40])
        assert llm.reset_prefix_cache() is True, "the prefix cache was not reset"
    print("\nFOUND " + json.dumps({"connector": name, "requests": len(prompts), "rounds": rounds}), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    sys.path.insert(0, HERE)
    with tempfile.TemporaryDirectory() as place:
        run(sys.argv[1], place)
