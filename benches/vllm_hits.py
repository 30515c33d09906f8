"""Hits and misses of vLLM on one GPU, through any connector, side by side: Llama-3.1-8B's shape in bfloat16 with random
weights, CUDA graphs on. Before each hit the engine forgets its blocks and all of its memory for them is noise.

    VLLM_USE_FLASHINFER_SAMPLER=0 python benches/vllm_hits.py hits CONNECTOR...   # none, native, lmcache, kvortex
    VLLM_USE_FLASHINFER_SAMPLER=0 python benches/vllm_hits.py misses CONNECTOR    # against none, both engines at once

`hits` prints a row for each length of a prompt, one for 24 prompts at once, and what a load does to others that decode.
`misses` alternates the two engines: the first token of 30,000 tokens that nobody knows, and throughput.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336,
    "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}  # fmt: skip
TOKEN_BYTES = 2 * 32 * 8 * 128 * 2
LENGTHS = (2048, 8192, 30000, 30001)
TOKENS = 16
REPEATS = 9
CONNECTORS = ("none", "native", "lmcache", "kvortex")


def transfer_config(name, pool_gib):
    both = {"kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
    extra = {
        "native": {"cpu_bytes_to_use": pool_gib << 30},
        "lmcache": {},
        "kvortex": {"cpu_pool_size_bytes": pool_gib << 30},
    }
    of = {
        "native": {"kv_connector": "OffloadingConnector"},
        "lmcache": {"kv_connector": "LMCacheConnectorV1"},
        "kvortex": {"kv_connector": "KVortexConnector", "kv_connector_module_path": "kvortex.vllm"},
    }
    return None if name == "none" else {**both, **of[name], "kv_connector_extra_config": extra[name]}


def prompt_of(seed, length):
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 128000, (length,), generator=generator).tolist()


class Clock:
    """When a load starts, and what the connector's hooks before it took."""

    BEFORE = ("get_num_new_matched_tokens", "update_state_after_alloc", "build_connector_meta")

    def __init__(self, scheduler_side, worker_side):
        import torch

        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self.reset()
        for name in self.BEFORE:
            self._wrap(scheduler_side, name)
        for name in ("handle_preemptions", "bind_connector_metadata"):
            self._wrap(worker_side, name)
        start, save = worker_side.start_load_kv, worker_side.wait_for_save

        def start_load_kv(*args, **kwargs):
            first = self.started is None
            self.started = self.started or time.perf_counter()
            if first:
                self.events[0].record()
            start(*args, **kwargs)
            self.submitting = self.submitting or time.perf_counter() - self.started

        def wait_for_save():
            if self.enqueued is None and self.started is not None:
                self.events[1].record()
                self.enqueued = time.perf_counter() - self.started
            save()

        worker_side.start_load_kv, worker_side.wait_for_save = start_load_kv, wait_for_save

    def _wrap(self, side, name):
        method = getattr(side, name)

        def timed(*args, **kwargs):
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                if self.started is None:
                    self.own += time.perf_counter() - start

        setattr(side, name, timed)

    def reset(self):
        self.own, self.started, self.submitting, self.enqueued = 0.0, None, None, None

    def timeline(self):
        """Milliseconds of the first step: hooks before the load, submitting it, all of the host's work, the GPU's."""
        on_gpu = self.events[0].elapsed_time(self.events[1])
        return [round(ms, 2) for ms in (self.own * 1e3, self.submitting * 1e3, self.enqueued * 1e3, on_gpu)]


class Engine:
    def __init__(self, name, pool_gib, memory):
        import torch

        from vllm import LLM

        self.name = name
        folder = Path(tempfile.mkdtemp())
        (folder / "config.json").write_text(json.dumps(LLAMA_8B))
        start = time.perf_counter()
        self.llm = LLM(
            model=str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=40000,
            gpu_memory_utilization=memory,
            disable_log_stats=True,
            enable_prefix_caching=True,
            compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24, 32]},
            kv_transfer_config=transfer_config(name, pool_gib),
        )
        self.start_s = time.perf_counter() - start
        self.llm.apply_model(real_weights)
        assert self.llm.reset_prefix_cache()
        core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.tables = {}
        self._note_tables(self.scheduler.kv_cache_manager)
        self.clock = None
        if name != "none":
            from vllm.distributed.kv_transfer import get_kv_transfer_group

            self.clock = Clock(self.scheduler.connector, get_kv_transfer_group())
        self.torch = torch

    def _note_tables(self, manager):
        free = manager.free

        def noting(request):
            self.tables[request.request_id] = list(manager.get_block_ids(request.request_id)[0])
            return free(request)

        manager.free = noting

    def ask(self, prompts, count):
        """Tokens, seconds until the last of them, and how many tokens were cached."""
        params = sampling(count)
        self.tables.clear()
        if self.clock is not None:
            self.clock.reset()
        start = time.perf_counter()
        answers = self.llm.generate([{"prompt_token_ids": tokens} for tokens in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        self.until_load = None
        if self.clock is not None and self.clock.started is not None:
            self.until_load = self.clock.started - start - self.clock.own
        tokens = [list(answer.outputs[0].token_ids) for answer in answers]
        return tokens, seconds, [answer.num_cached_tokens for answer in answers]

    def digests(self, tokens):
        """A number for each layer and block of the first ``tokens`` tokens of what was asked last."""
        torch = self.torch
        tables = [
            self.tables[name][: tokens // 16] for name in sorted(self.tables, key=lambda name: int(name.split("-")[0]))
        ]
        out = []
        for cache in self.runner.kv_caches:
            # Blocks are outermost; inside, in the order of their addresses whatever the layout.
            order = sorted(range(1, cache.dim()), key=lambda dim: -cache.stride(dim))
            words = cache.permute(0, *order).flatten(1).view(torch.int64)
            weights = torch.arange(1, 2 * words.shape[1], 2, device=words.device) * 0x1E3779B97F4A7C15
            for table in tables:
                ids = torch.tensor(table, device=words.device)
                out.append(torch.cat([(words[part] * weights).sum(1) for part in ids.split(64)]))
        return torch.cat(out).cpu()

    def drop(self):
        """The engine forgets its blocks, and all of its memory for them is noise."""
        self.settle()
        self.ask([[7] * 40], 1)
        for _ in range(200):
            if self.llm.reset_prefix_cache():
                break
            time.sleep(0.01)
            self.ask([[7] * 40], 1)
        else:
            raise AssertionError("the prefix cache was not reset")
        for cache in self.runner.kv_caches:
            cache.normal_()
        self.torch.cuda.synchronize()

    def pause(self):
        """What a drop does to host and GPU, but nothing is forgotten: a pass right behind another has a faster host."""
        self.settle()
        self.ask([[7] * 40], 1)
        spare = self.torch.empty_like(self.runner.kv_caches[0])
        for _ in self.runner.kv_caches:
            spare.normal_()
        self.torch.cuda.synchronize()

    def settle(self):
        """Waits for what is being stored."""
        if self.name != "kvortex":
            time.sleep(0.5)
            return
        planner, deadline = self.scheduler.connector._scheduler._planner, time.monotonic() + 30
        while planner.get_stats()["in_flight"]:
            planner.poll()
            assert time.monotonic() < deadline, planner.get_stats()


def real_weights(model):
    """Values so large that tokens depend on keys and values; dummy ones hardly do."""
    import torch

    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weight.data.normal_(0, 1.0 if "embed" in name else 0.03)


def link_bytes_per_s():
    """One long copy from pinned memory."""
    import torch

    here, there = (
        torch.empty(1 << 29, dtype=torch.uint8, pin_memory=True),
        torch.empty(1 << 29, dtype=torch.uint8, device="cuda"),
    )
    best = 0.0
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        there.copy_(here, non_blocking=True)
        torch.cuda.synchronize()
        best = max(best, (1 << 29) / (time.perf_counter() - start))
    return best


def hit_row(engine, length, link):
    """Cold, warm and loaded first tokens of one prompt; then 16 tokens and a partial hit, compared."""
    prompt = prompt_of(length, length)
    colds = [engine.ask([prompt_of(length + 7919 * (n + 1), length)], 1)[1] for n in range(2)]
    _, cold, _ = engine.ask([prompt], 1)
    # What a hit leaves to be computed is computed in another batch, and may differ in its last bits.
    kept = max(0, length - 2) // 16 * 16
    digests = engine.digests(kept)
    warms, forwards = [], []
    for _ in range(REPEATS):
        engine.pause()
        warms.append(engine.ask([prompt], 1)[1])
        forwards.append(warms[-1] - (engine.until_load or 0.0))
    warm_line = None if engine.clock is None else engine.clock.timeline()
    wanted = engine.ask([prompt], TOKENS)[0]
    row = {
        "tokens": length,
        "cold_ms": statistics.median([*colds, cold]) * 1e3,
        "warm_ms": statistics.median(warms) * 1e3,
    }
    if engine.name == "none":
        return row
    hits, until, cached, same_bytes = [], [], set(), True
    for _ in range(REPEATS):
        engine.drop()
        _, seconds, (loaded,) = engine.ask([prompt], 1)
        hits.append(seconds)
        until.append(engine.until_load)
        timeline = engine.clock.timeline()
        cached.add(loaded)
        same_bytes &= bool((engine.digests(kept) == digests).all())
    engine.drop()
    found = engine.ask([prompt], TOKENS)[0]
    engine.drop()
    part = prompt[: length // 2 + 5] + prompt[:100]
    partial, _, (partial_hit,) = engine.ask([part], TOKENS)
    engine.drop()
    engine.llm.reset_prefix_cache(reset_connector=True)
    computed, _, (none,) = engine.ask([part], TOKENS)
    t0 = statistics.median(until)
    forward = statistics.median(forwards)
    limit = max(length * TOKEN_BYTES / link, forward)
    row |= {
        "hit_ms": statistics.median(hits) * 1e3, "hit_min_ms": min(hits) * 1e3, "hit_max_ms": max(hits) * 1e3,
        "t0_ms": t0 * 1e3, "forward_ms": forward * 1e3, "limit_ms": limit * 1e3,
        "over_limit": (statistics.median(hits) - t0) / limit,
        "timeline": timeline, "warm_timeline": warm_line, "loaded": sorted(cached),
        "same_tokens": found == wanted, "same_bytes": same_bytes,
        "partial_loaded": partial_hit, "partial_without": none, "partial_same": partial == computed,
    }  # fmt: skip
    return row


def batch_row(engine, link, count=24, length=6000, new=8):
    """Many hits at once."""
    prompts = [prompt_of(1000 + n, length) for n in range(count)]
    _, cold, _ = engine.ask(prompts, new)
    wanted, _, _ = engine.ask(prompts, new)
    kept = (length - 2) // 16 * 16
    digests = engine.digests(kept)
    warms = []
    for _ in range(5):
        engine.pause()
        warms.append(engine.ask(prompts, new)[1])
    warm = statistics.median(warms)
    row = {"tokens": f"{count} x {length}", "cold_ms": cold * 1e3, "warm_ms": warm * 1e3}
    if engine.name == "none":
        return row
    hits, same = [], True
    for _ in range(5):
        engine.drop()
        found, seconds, cached = engine.ask(prompts, new)
        hits.append(seconds)
        same &= bool((engine.digests(kept) == digests).all())
    limit = count * length * TOKEN_BYTES / link + warm
    row |= {
        "hit_ms": statistics.median(hits) * 1e3, "limit_ms": limit * 1e3, "over_limit": statistics.median(hits) / limit,
        "loaded": sum(cached), "same_bytes": same,
        "same_tokens": sum(a == b for a, b in zip(found, wanted, strict=True)),
    }  # fmt: skip
    return row


def corrupted(engine, length=8192):
    """The control: noise instead of what was loaded must give other tokens and other bytes."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    prompt = prompt_of(length + 1, length)
    wanted = engine.ask([prompt], TOKENS)[0]
    kept = (length - 2) // 16 * 16
    digests = engine.digests(kept)
    side = get_kv_transfer_group()
    start = side.start_load_kv

    def spoiled(*args, **kwargs):
        loads = side._worker._step.loads
        start(*args, **kwargs)
        engine.torch.cuda.synchronize()
        for load in loads:
            ids = engine.torch.tensor(list(load.blocks), device="cuda")
            for cache in engine.runner.kv_caches:
                cache.index_fill_(0, ids, 0.5)

    engine.drop()
    side.start_load_kv = spoiled
    found, _, (loaded,) = engine.ask([prompt], TOKENS)
    side.start_load_kv = start
    return {
        "loaded": loaded,
        "other_tokens": found != wanted,
        "other_bytes": bool((engine.digests(kept) != digests).any()),
    }


def decode_row(engine, running=32, length=30000, count=4):
    """Milliseconds between tokens of requests that decode, without and with loads of ``length`` tokens beside them."""
    prompts = [prompt_of(7000 + n, length) for n in range(count)]
    for prompt in prompts:
        engine.ask([prompt], 1)
    engine.drop()
    core, loading = engine.llm.llm_engine, engine.scheduler.connector._scheduler._loading
    for n in range(running):
        core.add_request(f"9{n:03}", {"prompt_token_ids": prompt_of(5000 + n, 512)}, sampling(900))
    for _ in range(40):
        core.step()
    alone, beside = [], []
    for n, prompt in enumerate(prompts):
        alone += [timed_step(core, loading)[0] for _ in range(50)]
        core.add_request(f"8{n:03}", {"prompt_token_ids": prompt}, sampling(1))
        beside += [seconds for seconds, loads in (timed_step(core, loading) for _ in range(50)) if loads]
        for _ in range(10):
            core.step()
    core.abort_request([f"9{n:03}" for n in range(running)])
    while core.has_unfinished_requests():
        core.step()
    row = {}
    for name, times in (("alone", alone), ("beside", beside)):
        row |= {f"{name}_tokens": len(times) * running, f"{name}_p50_ms": statistics.median(times) * 1e3}
        row[f"{name}_p99_ms"] = statistics.quantiles(times, n=100)[98] * 1e3
    return row | {"ratio": row["beside_p99_ms"] / row["alone_p99_ms"]}


def timed_step(core, loading):
    """Seconds of one step, and whether something was being loaded from its begin to its end."""
    before, start = bool(loading), time.perf_counter()
    core.step()
    return time.perf_counter() - start, before and bool(loading)


def sampling(count):
    from vllm import SamplingParams

    return SamplingParams(temperature=0, ignore_eos=True, detokenize=False, max_tokens=count)


def hits(name, arguments):
    engine = Engine(name, arguments.pool_gib, 0.85)
    link = link_bytes_per_s()
    found = {"connector": name, "start_s": engine.start_s, "link_gb_per_s": link / 1e9}
    show(found)
    engine.ask([prompt_of(1, 3000)], 4)
    if name != "none":
        # The first load is awaited as a whole, whatever follows.
        engine.drop()
        engine.ask([prompt_of(1, 3000)], 4)
    for length in arguments.lengths:
        show(hit_row(engine, length, link))
    show(batch_row(engine, link))
    if name == "kvortex":
        show({"corrupted": corrupted(engine)})
        show({"decode": decode_row(engine)})


def show(row):
    print(
        "ROW "
        + json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}),
        flush=True,
    )


# Two engines at once.


def serve(name, arguments):
    """One engine that does what lines on its input ask for."""
    engine = Engine(name, arguments.pool_gib, 0.42)
    print("READY", flush=True)
    for line in sys.stdin:
        words = line.split()
        if words[0] == "first":
            seconds = engine.ask([prompt_of(int(words[1]), 30000)], 1)[1]
        else:
            # As many as the largest graph takes: beyond it decoding would measure the host.
            prompts = [prompt_of(int(words[1]) * 1000 + n, 1024) for n in range(32)]
            seconds = engine.ask(prompts, 128)[1]
        print(f"TOOK {seconds}", flush=True)


class Other:
    """An engine in a process of its own."""

    def __init__(self, name, arguments):
        command = [sys.executable, __file__, "serve", name, "--pool-gib", str(arguments.pool_gib)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._line("READY")

    def _line(self, start):
        for line in self.process.stdout:
            if line.startswith(start):
                return line
        raise RuntimeError("the engine ended")

    def ask(self, what, seed):
        self.process.stdin.write(f"{what} {seed}\n")
        self.process.stdin.flush()
        return float(self._line("TOOK").split()[1])


def misses(name, arguments):
    import random

    sides = [Other("none", arguments), Other(name, arguments)]
    for what, count in (("first", 20), ("throughput", 40)):
        if arguments.only not in (None, what):
            continue
        pairs = []
        for round_ in range(2 + (arguments.pairs or count)):
            order = [0, 1] if round_ % 2 else [1, 0]
            took = {side: sides[side].ask(what, 100 + round_) for side in order}
            pairs.append((took[0], took[1]))
        pairs = pairs[2:]
        ratios = [ours / none for none, ours in pairs]
        draw = random.Random(0)
        medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(4000))
        show(
            {
                what: name, "pairs": len(pairs), "none_ms": statistics.median(none for none, _ in pairs) * 1e3,
                "ours_ms": statistics.median(ours for _, ours in pairs) * 1e3, "ratio": statistics.median(ratios),
                "interval": [round(medians[100], 4), round(medians[-101], 4)],
                "quartiles": [round(cut, 4) for cut in statistics.quantiles(ratios)],
            }
        )  # fmt: skip
    for side in sides:
        side.process.stdin.close()
        side.process.wait(60)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["hits", "misses", "serve"])
    parser.add_argument("connectors", nargs="+", choices=CONNECTORS)
    parser.add_argument("--pool-gib", type=int, default=40)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--only", choices=["first", "throughput"], help="one of the measurements of misses")
    parser.add_argument("--pairs", type=int, help="of each measurement of misses, at least 2; otherwise 20 and 40")
    arguments = parser.parse_args()
    if arguments.pairs is not None and arguments.pairs < 2:
        parser.error(f"--pairs {arguments.pairs}: give 2 or more")
    if arguments.what == "hits" and len(arguments.connectors) > 1:
        same = ["--pool-gib", str(arguments.pool_gib), "--lengths", *map(str, arguments.lengths)]
        for name in arguments.connectors:
            subprocess.run([sys.executable, __file__, "hits", name, *same], check=True)
        return
    {"hits": hits, "misses": misses, "serve": serve}[arguments.what](arguments.connectors[0], arguments)


if __name__ == "__main__":
    main()
