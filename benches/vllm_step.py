"""What the connector costs the scheduler's thread: a step of 256 requests that decode, one token each, of which one in
sixteen fills a block, and the lookup of a prompt. With several groups, all but the first have a window.

python benches/vllm_step.py [--groups 1 2 6] [--ahead] [--tokens 2048] [--window 1024]     # where vLLM is installed

With --ahead a step is scheduled before the tokens of the one before it are known, as vLLM does by default: then a block
has its name one step after it was filled.
"""

import argparse
import hashlib
import statistics
import time
import uuid
from types import SimpleNamespace

from kvortex import KVortexConfig, Namespace, PagedCache, RankMover, RankPlanner
from kvortex.vllm.groups import LayerGroup
from kvortex.vllm.layout import CacheLayout
from kvortex.vllm.scheduler import SchedulerSide
from kvortex.vllm.settings import LoadMode

REQUESTS, PROMPTS, BLOCK, STEPS, BYTES = 256, 16, 16, 320, 4096
NOTHING = SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set())


class Engine:
    """What vLLM's scheduler tells the connector, and a rank that stores."""

    def __init__(self, args, groups):
        self.args, self.groups = args, groups
        pool = 2 * BYTES * groups * (PROMPTS * args.tokens + REQUESTS * STEPS) // BLOCK
        engine, shape = uuid.uuid4().hex, {"block_size_bytes": BYTES, "namespace": Namespace()}
        self.planner = RankPlanner(engine, 1, cpu_pool_size_bytes=pool, **shape)
        config = KVortexConfig(cpu_pool_size_bytes=pool, device="none")
        self.mover = RankMover(config, engine, 1, 0, **shape)
        self.cache = PagedCache([memoryview(bytearray(BYTES * 8)).cast("B", (8, BYTES))])
        kinds = tuple(LayerGroup((f"layer {group}",), args.window if group else 0) for group in range(groups))
        self.side = SchedulerSide(self.planner, CacheLayout({}, {}, 8, BLOCK, BYTES, False, kinds), LoadMode("sync"))
        # Their lengths differ, so that in each step one in sixteen fills a block.
        self.lengths = [args.tokens + number % BLOCK for number in range(REQUESTS)]
        self.requests = [self.request(f"r{number}", number % PROMPTS, f"r{number}") for number in range(REQUESTS)]
        self.names = [one.request_id for one in self.requests]

    def request(self, name, prompt, own=""):
        """A request with one of the prompts, and ``own`` tokens behind it."""
        tokens, whole = self.args.tokens, self.args.tokens // BLOCK
        places = [f"{prompt} {block}" for block in range(whole)] + [
            f"{own} {block}" for block in range(STEPS // BLOCK + 2)
        ]
        hashes = [hashlib.sha256(place.encode()).digest() for place in places]
        known = {"block_hashes": hashes[:whole], "num_tokens": tokens, "num_prompt_tokens": tokens}
        return SimpleNamespace(request_id=name, all=hashes, lora_request=None, **known)

    def begin(self):
        """All prompts are computed in one step, but for their last token."""
        table = [-(-length // BLOCK) for length in self.lengths]
        new = [
            SimpleNamespace(req_id=name, block_ids=([*range(1, 1 + blocks)],) * self.groups, num_computed_tokens=0)
            for name, blocks in zip(self.names, table, strict=True)
        ]
        scheduled = dict(zip(self.names, self.lengths, strict=True))
        self.build(
            SimpleNamespace(scheduled_new_reqs=new, num_scheduled_tokens=scheduled, scheduled_cached_reqs=NOTHING)
        )

    def step(self):
        """Each request computes one token more. Seconds in the connector."""
        for length, one in zip(self.lengths, self.requests, strict=True):
            known = len(one.block_hashes)
            one.block_hashes += one.all[known : (length + (not self.args.ahead)) // BLOCK]
        block = ([3],) * self.groups
        cached = SimpleNamespace(
            req_ids=self.names,
            new_block_ids=[block if length % BLOCK == 0 else None for length in self.lengths],
            num_computed_tokens=self.lengths,
            resumed_req_ids=set(),
        )
        scheduled = dict.fromkeys(self.names, 1)
        self.lengths = [length + 1 for length in self.lengths]
        return self.build(
            SimpleNamespace(scheduled_new_reqs=[], num_scheduled_tokens=scheduled, scheduled_cached_reqs=cached)
        )

    def build(self, output):
        start = time.perf_counter()
        plans = self.side.build(output)
        seconds = time.perf_counter() - start
        if plans.store is not None:
            blocks = self.cache.blocks([1] * len(plans.store.blocks))
            self.mover.store(plans.store.ticket, plans.store.slots, blocks)
        return seconds

    def look_up(self, prompts):
        """Seconds of the lookup of each prompt, and the tokens that they are given in the mean."""
        seconds, found = [], 0
        for prompt in prompts:
            one = self.request("new", prompt)
            start = time.perf_counter()
            tokens, _ = self.side.matched(one, 0)
            seconds.append(time.perf_counter() - start)
            found += tokens
            self.side.finished(one)
        return seconds, found // len(seconds)


def microseconds(seconds):
    """Median, and what the shortest tenth stays below."""
    return (
        f"{statistics.median(seconds) * 1e6:.0f} us, shortest tenth {statistics.quantiles(seconds, n=10)[0] * 1e6:.0f}"
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2, 6])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--ahead", action="store_true")
    args = parser.parse_args()
    for groups in args.groups:
        engine = Engine(args, groups)
        for one in engine.requests:
            engine.side.matched(one, 0)
        engine.begin()
        while engine.planner.get_stats()["in_flight"]:
            engine.planner.poll()
        steps = [engine.step() for _ in range(STEPS)]
        known, unknown = [*range(PROMPTS)] * 20, range(PROMPTS, 20 * PROMPTS)
        (hits, given), (misses, _) = engine.look_up(known), engine.look_up(unknown)
        print(f"groups: {groups}; a step: {microseconds(steps)}; ", end="")
        print(f"a hit of {given} tokens: {microseconds(hits)}; a miss: {microseconds(misses)}; ", end="")
        print(f"{engine.planner.get_stats()['blocks']} blocks kept")


if __name__ == "__main__":
    main()
