"""What one step costs the scheduler's thread: 256 requests that decode, one token each, 16 of them filling a block.

python benches/vllm_step.py      # where vLLM is installed
"""

import hashlib
import statistics
import time
import uuid
from types import SimpleNamespace

from kvortex import KVortexConfig, Namespace, PagedCache, RankMover, RankPlanner
from kvortex.vllm.layout import CacheLayout
from kvortex.vllm.scheduler import SchedulerSide
from kvortex.vllm.settings import LoadMode

REQUESTS, BLOCK, STEPS, START = 256, 16, 400, 2048
BYTES = 4096


def request(number):
    hashes = [hashlib.sha256(f"{number} {i}".encode()).digest() for i in range((START + STEPS) // BLOCK + 2)]
    name = f"r{number}"
    first = hashes[: START // BLOCK]
    return SimpleNamespace(request_id=name, num_tokens=START, block_hashes=first, all=hashes, lora_request=None)


def main():
    engine, pool = uuid.uuid4().hex, 1 << 28
    shape = {"cpu_pool_size_bytes": pool, "block_size_bytes": BYTES, "namespace": Namespace()}
    planner = RankPlanner(engine, 1, **shape)
    config = KVortexConfig(cpu_pool_size_bytes=pool, device="none")
    mover = RankMover(config, engine, 1, 0, block_size_bytes=BYTES, namespace=Namespace())
    cache = PagedCache([memoryview(bytearray(BYTES * 8)).cast("B", (8, BYTES))])
    layout = CacheLayout({}, 8, BLOCK, BYTES, False)
    side = SchedulerSide(planner, layout, LoadMode("sync"))
    requests = [request(number) for number in range(REQUESTS)]
    table = START // BLOCK
    for one in requests:
        side.matched(one, 0)
    # Their lengths differ, so that in each step one in sixteen fills a block.
    lengths = [START + number % BLOCK for number in range(REQUESTS)]
    names = [one.request_id for one in requests]
    scheduled = dict.fromkeys(names, 1)
    new = [
        SimpleNamespace(req_id=name, block_ids=(list(range(table)),), num_computed_tokens=length - 1)
        for name, length in zip(names, lengths, strict=True)
    ]
    empty = SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set())
    side.build(SimpleNamespace(scheduled_new_reqs=new, num_scheduled_tokens=scheduled, scheduled_cached_reqs=empty))
    times = []
    for _ in range(STEPS):
        for at, one in enumerate(requests):
            one.block_hashes = one.all[: (lengths[at] + 1) // BLOCK]
        cached = SimpleNamespace(
            req_ids=names,
            new_block_ids=[([3],) if length % BLOCK == 0 else None for length in lengths],
            num_computed_tokens=lengths,
            resumed_req_ids=set(),
        )
        output = SimpleNamespace(scheduled_new_reqs=[], num_scheduled_tokens=scheduled, scheduled_cached_reqs=cached)
        start = time.perf_counter()
        step = side.build(output)
        times.append(time.perf_counter() - start)
        if step.store is not None:
            blocks = cache.blocks([0] * len(step.store.blocks))
            mover.store(step.store.ticket, step.store.slots, blocks)
        lengths = [length + 1 for length in lengths]
    print(f"build of a step of {REQUESTS} decoding requests: {statistics.median(times) * 1e6:.0f} us median, ", end="")
    print(f"{statistics.quantiles(times, n=20)[-1] * 1e6:.0f} us p95; {planner.get_stats()['blocks']} blocks kept")


if __name__ == "__main__":
    main()
