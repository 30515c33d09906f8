"""Runs one engine whose model has MLA, and prints what came out as engine_run.py does.

vLLM 0.32 caches no prefixes of such models on a CPU without AMX, where its decode kernel is the slow one. Both ways in
which a prefix is used, the decode of one token and a prefill behind cached blocks, are there all the same.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # functions of this file go to the workers

import torch
from engine_run import Engine
from vllm.platforms.cpu import CpuPlatform

updated = CpuPlatform.check_and_update_config.__func__


def updated_but_for_the_cache(cls, vllm_config):
    asked = vllm_config.cache_config.enable_prefix_caching
    updated(cls, vllm_config)
    vllm_config.cache_config.enable_prefix_caching = asked


CpuPlatform.check_and_update_config = classmethod(updated_but_for_the_cache)


def overwrite(worker):
    """Noise in every block of this rank's engine."""
    for cache in worker.model_runner.kv_caches:
        cache.normal_()


def spoil_last_rank(worker):
    """From now on noise is what the last rank loads."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from kvortex.vllm.metadata import block_ids

    if get_tensor_model_parallel_rank() + 1 < get_tensor_model_parallel_world_size():
        return
    side = get_kv_transfer_group()._worker
    load = side.load

    def spoiled(forward_context=None):
        ids = [block for one in side._step.loads for block in one.blocks]
        load(forward_context)
        # A load in the background must not come after the noise.
        side._mover.fence(side._cache.blocks(block_ids(ids)))
        for cache in worker.model_runner.kv_caches if ids else ():
            cache.index_fill_(0, torch.tensor(ids), 0.5)

    side.load = spoiled


def main(model, options):
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(6, 31000, (600,), generator=generator).tolist()
    other = prompt[:300] + prompt[:200]
    engine = Engine(model, options)

    def drop(**more):
        engine.drop(**more)
        engine.llm.collective_rpc(overwrite)

    found = {"cold": engine.ask(prompt), "warm": engine.ask(prompt), "partial warm": engine.ask(other)}
    drop()
    found["hit"] = engine.ask(prompt)
    drop(connector=True)
    engine.ask(prompt)
    drop()
    found["partial"] = engine.ask(other)
    drop(connector=True)
    found["after reset"] = engine.ask(prompt)
    drop()
    engine.llm.collective_rpc(spoil_last_rank)
    found["spoiled"] = engine.ask(prompt)
    print("\nFOUND " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
