"""vLLM's real scheduler and block manager with our connector, around a worker that computes nothing: where a model
would write keys and values it writes a function of the whole prefix, and it looks at every position that a model would
read.

The host and the streams of the device go on in virtual time, so a run is replayed from its seed.
"""

from __future__ import annotations

import contextlib
import os
import random
from array import array
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from rote import BLOCK, HEADS, LAYER_BYTES, LONGEST, NEW, SHAPES, SIZE, Tracked, Wrong, kv_tensors, words_of
from runner import FITTING, ORDERS, ModelRunner
from streams import LOAD, Device, Faults, Parts, StreamMover
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    SlidingWindowSpec,
)
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from kvortex.vllm import KVortexConnector, layers, settings
from kvortex.vllm import connector as connectors
from kvortex.vllm import layout as layouts
from kvortex.vllm import scheduler as schedulers
from kvortex.vllm import worker as workers

HASH = get_hash_fn_by_name("sha256")


@dataclass
class Options:
    """One run. Everything random follows from ``seed``."""

    seed: int
    order: str = FITTING[0]
    """Which model runner calls the connector."""
    load_mode: str = "sync"
    steps: int = 300
    load_failures: float = 0.0
    store_failures: float = 0.0
    layout: str = "NHD"
    shape: str = "one group"
    late: float = 0.0
    """How often nothing is kept in a step, as before all ranks are there."""


@dataclass
class Counts:
    """What a run did, so that a test sees that it did something."""

    requests: int = 0
    finished: int = 0
    aborted: int = 0
    preempted: int = 0
    resets: int = 0
    hit_tokens: int = 0
    in_step: int = 0
    """Loads that a step waits for."""
    layerwise: int = 0
    """Those of them that it waits for layer by layer."""
    background: int = 0
    failed_loads: int = 0
    full_graphs: int = 0
    passed: int = 0
    """Steps and groups in which a window had left positions behind."""
    waited: int = 0
    """Copies that were enqueued before what they must come after had happened."""
    furthest_behind: int = 0
    """The most operations that the engine's stream had before it."""
    checked: int = 0
    stored: int = 0
    read_back: int = 0


# vLLM, as small as it gets.


def vllm_config(model, options):
    """The configuration of an engine with our connector."""
    transfer = KVTransferConfig(
        kv_connector="KVortexConnector",
        kv_connector_module_path="kvortex.vllm",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={
            "load_mode": options.load_mode,
            "num_transfer_streams": 1,
            "huge_pages": False,
        },
    )
    args = EngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=LONGEST,
        max_num_seqs=8,
        max_num_batched_tokens=96,
        enable_chunked_prefill=True,
        block_size=BLOCK if not NEW else 32,
        kv_transfer_config=transfer,
        async_scheduling=False,
    )
    config = args.create_engine_config()
    config.cache_config.block_size = BLOCK
    return config


def kv_cache_config(blocks, shape=SHAPES["one group"]):
    """The groups of a shape."""
    page, groups = LAYER_BYTES, []
    for group, window in enumerate(shape.windows):
        names = [layer.name for layer in shape.layers if layer.group == group]
        kind, more = (SlidingWindowSpec, {"sliding_window": window}) if window else (FullAttentionSpec, {})
        spec = kind(block_size=BLOCK, num_kv_heads=HEADS, head_size=SIZE, dtype=torch.float32, **more)
        groups.append(KVCacheGroupSpec(names, spec, **({"is_eagle_group": True} if group == shape.drafter else {})))
    size = page * blocks
    if NEW:
        more = {"size": size * shape.places, "layer_stride": size, "block_stride": page}
        tensors = [KVCacheTensor(layers=list(group.layer_names), **more) for group in groups]
    else:
        tensors = [KVCacheTensor(size=size, shared_by=[layer.name]) for layer in shape.layers]
    return KVCacheConfig(num_blocks=blocks, kv_cache_tensors=tensors, kv_cache_groups=groups)


def make_request(name, tokens, new_tokens, salt=None):
    """A request as the engine makes it."""
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True, temperature=0)
    more = {} if NEW else {"eos_token_id": None}
    return Request(
        request_id=name,
        prompt_token_ids=list(tokens),
        sampling_params=params,
        pooling_params=None,
        cache_salt=salt,
        block_hasher=get_request_block_hasher(BLOCK, HASH),
        **more,
    )


class Run:
    """One random schedule."""

    def __init__(self, model, options, config=None):
        self.options, self.counts = options, Counts()
        self.order = ORDERS[options.order]
        self.rng = random.Random(str(options))
        self.shape = SHAPES[options.shape]
        self.blocks, self.slots = self.rng.choice(self.shape.pools), self.rng.choice((30, 60, 120))
        self.part_bytes = self.rng.choice(((1, 1), (4 * LAYER_BYTES, 4 * LAYER_BYTES), (1, 12 * LAYER_BYTES)))
        """The least and the most of a part: each layer in one of its own, several together, or more and then fewer."""
        self.device = Device(self.rng)
        self.lag, self.unread = self.order.ahead, []
        self.requests: dict[str, Tracked] = {}
        self.everything: dict[bytes, tuple[np.ndarray, set[int]]] = {}
        """The numbers of every named block's positions, and of those that have come behind it."""
        documents = np.random.default_rng(options.seed)
        self.documents = [documents.integers(0, 50000, 320).tolist() for _ in range(4)]
        self._configure(config or vllm_config(model, options))
        caches = kv_cache_config(self.blocks, self.shape)
        self.scheduler = (AsyncScheduler if self.lag else Scheduler)(
            vllm_config=self.config,
            kv_cache_config=caches,
            structured_output_manager=StructuredOutputManager(self.config),
            block_size=BLOCK,
        )
        self._watch(self.scheduler.connector._scheduler)
        self.forgotten: dict[str, set[int]] = {}
        """The blocks that each request has had since the connector was made to forget everything."""
        self._watch_pool(self.scheduler.kv_cache_manager.block_pool)
        self.refused = ""
        """The last request that vLLM had no blocks for."""
        self._watch_manager(self.scheduler.kv_cache_manager)
        self._make_worker(caches)

    def _configure(self, config):
        options, self.config = self.options, config
        # The root of the names must not be random, or a run could not be replayed.
        with mock.patch.dict(os.environ, PYTHONHASHSEED="0"):
            init_none_hash(HASH)
        config.kv_transfer_config.engine_id = f"harness-{os.getpid()}-{id(self)}"
        extra = config.kv_transfer_config.kv_connector_extra_config
        slots = self.slots * len(self.shape.windows)
        extra.update(load_mode=options.load_mode, cpu_pool_size_bytes=slots * 4096)
        settings.SMALL_LOAD_BYTES = 3 * LAYER_BYTES * self.shape.places * len(self.shape.windows)
        config.cache_config.num_gpu_blocks = self.blocks

    def _watch(self, side):
        """Reaches into the scheduler's side."""
        self.planner, self.tables, self.groups = side._planner, side._tables, side._tables._groups
        plan = side._plan_store

        def plan_store(full):
            if self.options.late and self.rng.random() < self.options.late:
                return None
            before = [(tracked, tracked.offered) for tracked, *_ in full]
            store = plan(full)
            for tracked, offered in before:
                if tracked.offered != offered:
                    self._check_age(tracked.request.request_id, tracked.local)
            return store

        side._plan_store = plan_store

    def _check_age(self, name, own):
        """Of a request whose blocks are stored. The first ``own`` are from the engine's cache, which is its affair."""
        if self.forgotten.get(name, set()) & self._blocks_of(name, own):
            raise Wrong(f"{name} was computed or loaded before everything was forgotten, and is stored")

    def _watch_pool(self, pool):
        """A block that is given out anew holds nothing from before."""
        give = pool.get_new_blocks

        def given(count):
            blocks = give(count)
            for before in self.forgotten.values():
                before.difference_update(block.block_id for block in blocks)
            return blocks

        pool.get_new_blocks = given

    def _watch_manager(self, manager):
        allocate = manager.allocate_slots

        def allocated(request, *args, **kwargs):
            blocks = allocate(request, *args, **kwargs)
            self.refused = request.request_id if blocks is None else ""
            return blocks

        manager.allocate_slots = allocated

    def _make_worker(self, caches):
        options = self.options
        self.connector = KVortexConnector(self.config, KVConnectorRole.WORKER, caches)
        registered, views = kv_tensors(self.blocks, options.layout, self.shape)
        with mock.patch.object(connectors, "_rank", return_value=0):
            self.connector.register_kv_caches(registered)
        self.side = self.connector._worker
        # As on a GPU: the memory of this test is the host's, whose loads have no parts.
        self.side._hooks = layouts.layer_hooks(self.connector._layout, registered, self.side._cache)
        self.scratch, self.scratch_views = self._make_scratch()
        faults = Faults(options.store_failures, options.load_failures)
        scratch = (self.scratch, self.scratch_views)
        self.mover = StreamMover(self.side._mover, self.device, views, scratch, faults, self.counts)
        self.side._mover = self.mover
        self.worker = ModelRunner(self.connector, self.shape, self.mover, self.order, self.counts, self.requests)
        if self.worker.drafts_late:
            # The second is right wherever there is a drafter.
            counted_on = self.rng.choice((workers.Drafter.BEFORE_SAVING, workers.Drafter.AFTER_HOOKS))
            self.side._hooks, self.side._drafter = None, counted_on

    def _make_scratch(self):
        """As many blocks in host memory that no engine uses, of the same layout."""
        registered, views = kv_tensors(self.blocks, self.options.layout, self.shape)
        return layouts.paged_cache(self.connector._layout, registered, self.config), views

    def go(self):
        """Runs the schedule to its end; raises Wrong or AssertionError with the seed in it."""
        try:
            with self.virtual():
                self._go()
        except Exception as error:
            raise type(error)(f"{self.options}: {error}") from error
        return self.counts

    @contextlib.contextmanager
    def virtual(self):
        """While the connector sees the time and the streams of the device."""
        clock = SimpleNamespace(monotonic=lambda: self.device.now)
        with contextlib.ExitStack() as stack:
            for module in (connectors, schedulers, workers):
                if hasattr(module, "time"):
                    stack.enter_context(mock.patch.object(module, "time", clock))
            stack.enter_context(mock.patch.object(workers, "Parts", partial(Parts, self.mover)))
            for name, size in zip(("LEAST_PART_BYTES", "MOST_PART_BYTES"), self.part_bytes, strict=True):
                stack.enter_context(mock.patch.object(layers, name, size))
            yield

    def _go(self):
        for step in range(self.options.steps):
            self.disturb()
            self.step()
            if step % 50 == 49:
                self.read_back()
        self._drain()

    def disturb(self):
        """Whatever may happen between two steps."""
        rng = self.rng
        if rng.random() < 0.3 and len(self.scheduler.requests) < 12:
            self._add()
        if rng.random() < 0.03:
            names = sorted(self.scheduler.requests)
            self._abort(rng.sample(names, min(len(names), rng.randrange(1, 4))))
        if rng.random() < 0.03:
            self._reset(rng.random() < 0.3)
        elif rng.random() < 0.06:
            self.scheduler.reset_prefix_cache()
        elif rng.random() < 0.01:
            self._forget()
        self.device.pass_time()

    def _forget(self):
        """Everything is forgotten while requests go on with what they have, as when weights change under them."""
        self.counts.resets += 1
        self.scheduler.reset_prefix_cache(reset_connector=True)
        self.scheduler.kv_cache_manager.block_pool.evict_blocks(set(range(1, self.blocks)))
        self.forgotten = {name: self._blocks_of(name) for name in self.scheduler.requests}

    def _blocks_of(self, name, first=0):
        tables = self.scheduler.kv_cache_manager.get_block_ids(name)
        return {block for table in tables for block in table[first:] if block}

    def _reset(self, reset_connector):
        self.counts.resets += 1
        # While blocks are held for a load vLLM preempts all that runs and then fails.
        with contextlib.suppress(RuntimeError):
            self.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=reset_connector)
        if self.lag and not NEW:
            self._keep_tokens()

    def _keep_tokens(self):
        """0.15.1, one step ahead, drops the next token of all requests that a reset preempts, whether or not it is one
        of those under way that it means to drop.
        """
        for name, request in self.scheduler.requests.items():
            request.discard_latest_async_tokens &= any(out.samples.get(name) for out, *_ in self.unread)

    def _add(self):
        rng = self.rng
        self.counts.requests += 1
        name = f"r{self.counts.requests}"
        document = rng.choice(self.documents)
        tokens = document[: rng.randrange(1, 260)]
        if rng.random() < 0.4:
            tokens = tokens + [rng.randrange(50000) for _ in range(rng.randrange(1, 40))]
        salt = rng.choice([None, None, None, "a", "b"])
        request = make_request(name, tokens, rng.randrange(1, 40), salt)
        self.requests[name] = Tracked(request)
        self.scheduler.add_request(request)

    def _abort(self, names):
        for name in names:
            if not self.scheduler.requests[name].is_finished():
                self.counts.aborted += 1
                self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def step(self):
        """The scheduler schedules, the worker executes, the scheduler learns what came of it."""
        out = self.scheduler.schedule()
        self._check_plans(out.kv_connector_metadata)
        requests = self.scheduler.requests
        if NEW:
            out.samples = {name: not requests[name].is_prefill_chunk for name in out.num_scheduled_tokens}
        else:
            out.has_sync_kv_loads = True
            # The number of computed tokens has been advanced.
            ends = {name: requests[name].num_computed_tokens for name in out.num_scheduled_tokens}
            out.samples = {name: end >= requests[name].num_tokens for name, end in ends.items()}
        self.device.pass_time()
        self.unread.append((out, self.worker.execute(out), self.mover.compute.mark()))
        while len(self.unread) > self.lag:
            self._read(*self.unread.pop(0))
        self._note()

    @staticmethod
    def _check_plans(plans):
        copies = [*plans.loads, *([plans.store] if plans.store else [])]
        if any(0 in copy.blocks for copy in copies):
            raise Wrong("the null block, which is nobody's, is in a plan")

    def _read(self, out, output, computed):
        """The scheduler learns what came of a step. An engine waits for its tokens; here they are known, so that the
        device may fall further behind than it could.
        """
        if self.rng.random() < 0.6:
            self.device.wait(computed)
        self.scheduler.update_from_output(out, output)

    def _note(self):
        for name, tracked in list(self.requests.items()):
            request = tracked.request
            assert request.all_token_ids[-1] == tracked.token(request.num_tokens - 1), f"{name} was given a wrong token"
            for i in range(tracked.named, len(request.block_hashes)):
                *chain, behind = tracked.chain((i + 1) * BLOCK + 1)[i * BLOCK :]
                _, seen = self.everything.setdefault(bytes(request.block_hashes[i]), (np.array(chain), set()))
                seen.add(int(behind))
            tracked.named = len(request.block_hashes)
            if request.is_finished() and name not in self.scheduler.requests:
                self.counts.finished += 1
                del self.requests[name]

    def _drain(self):
        for step in range(3000):
            if not self.scheduler.requests:
                break
            self.device.pass_time()
            self.step()
            if NEW and step % 200 == 199:
                self._end_deadlock()
        assert not self.scheduler.requests, f"requests never end: {sorted(self.scheduler.requests)}"
        self.lag = 0
        self.step()
        self.device.wait_for_all()
        self.step()
        self.read_back()
        free = self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        assert free == self.blocks - 1, f"{self.blocks - 1 - free} pages leaked"
        stats = self.planner.get_stats()
        assert (stats["in_flight"], stats["leased_blocks"]) == (0, 0), stats
        self.counts.hit_tokens = self.scheduler.connector._scheduler.hit_tokens
        self.side.shutdown()

    def _end_deadlock(self):
        """After a failed load 0.32 may need more for the first request that waits than is left beside those behind it.
        Then nothing runs any more, whatever a connector does: it has nothing under way, and vLLM refuses the blocks.
        """
        scheduler = self.scheduler
        waiting = [request.request_id for request in scheduler.kv_holding_waiting]
        under_way = scheduler.connector._scheduler._under_way
        if waiting and waiting[0] == self.refused and not scheduler.running and not under_way:
            self._abort(waiting[:1])

    def read_back(self):
        """Reads every block that a lookup can see out of the arena."""
        # The real mover takes the loads of a lane in their order.
        self.device.wait(self.device.streams[LOAD].mark())
        self.planner.poll()
        for name in self.everything:
            for group in range(len(self.shape.windows)):
                self._read_block_back(name, group)
        assert all(ok for _, ok in self.mover.real.ended_loads())

    def _read_block_back(self, name, group):
        lease = self.planner.lease_prefix(self.groups.keys(group, name) if self.groups else name)
        if not len(lease):
            return
        ticket, slots = self.planner.plan_load(lease)
        self.mover.real.load(ticket, slots, self.scratch.blocks(array("I", [0])))
        self.planner.poll()
        chain, behind = self.everything[name]
        expected = [chain]
        if group == self.shape.drafter:
            expected = [np.append(chain[1:], number) for number in behind]
        for layer in [layer for layer in self.shape.layers if layer.group == group]:
            found = self.scratch_views[layer.place][0].reshape(BLOCK, -1)
            if not any(np.array_equal(found, words_of(one, layer.number)) for one in expected):
                raise Wrong(f"a stored block holds wrong bytes: {name.hex()[:8]}, {layer}")
        self.counts.read_back += 1
