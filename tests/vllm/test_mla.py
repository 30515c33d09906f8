"""Real engines with MLA on the CPU, whose KV is the same on every rank: it is kept once, and every rank loads it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import LLAMA, OLD

pytestmark = pytest.mark.skipif(OLD, reason="vLLM 0.15.1 has no MLA on a CPU")

RUN = Path(__file__).parent / "mla_run.py"

# The sizes of the latent are those that the CPU's kernel has; the others are small, and no layer has experts.
DEEPSEEK = LLAMA | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 3,
    # Computed in one go or behind cached blocks, sums differ in their last bits. Larger weights turn that into tokens.
    "initializer_range": 0.05,
}
BLOCK_BYTES = 16 * (512 + 64) * 4 * 3
POOL = 32 << 20


@pytest.fixture(scope="module")
def mla_folder(tmp_path_factory):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("deepseek")
    (folder / "config.json").write_text(json.dumps(DEEPSEEK), encoding="utf-8")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float().save_pretrained(folder)
    return folder


def run(model, options):
    command = [sys.executable, str(RUN), str(model), json.dumps(options)]
    # Threads of several ranks that spin for each other's cores would take minutes.
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(lines[0][6:]), done.stdout + done.stderr


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("ranks", "mode"), [(2, "sync"), (2, "async"), (1, "sync")])
def test_tokens_are_those_from_the_engines_own_cache(mla_folder, ranks, mode):
    extra = {"cpu_pool_size_bytes": POOL, "load_mode": mode}
    found, log = run(mla_folder, {"extra": extra, "llm": {"tensor_parallel_size": ranks}})
    tokens = {name: answer[0] for name, answer in found.items()}
    cached = {name: answer[1] for name, answer in found.items()}
    assert len(set(tokens["cold"])) > 12, "a model that repeats itself proves nothing"
    assert tokens["hit"] == tokens["warm"]
    assert tokens["partial"] == tokens["partial warm"] != tokens["warm"]
    assert tokens["after reset"] == tokens["cold"]
    assert tokens["spoiled"] != tokens["hit"], "what one rank loads matters"
    assert cached["cold"] == cached["after reset"] == 0
    assert cached["warm"] == cached["hit"] == cached["spoiled"] == 592
    assert cached["partial"] == cached["partial warm"] == 288
    where = f"once for all of {ranks} ranks" if ranks > 1 else "on each of 1 ranks"
    assert f"KVortex keeps {POOL // BLOCK_BYTES} blocks of 16 tokens, {BLOCK_BYTES} bytes {where}" in log
    rows = re.findall(r"KVortex rank (\d) of \d: .*?(\d+) bytes of plain memory( that all ranks share)?", log)
    assert sorted(rows) == [(str(rank), str(POOL), " that all ranks share" * (ranks > 1)) for rank in range(ranks)]
