"""vLLM's real scheduler and block manager with our connector, around a worker that computes nothing: where a model
would write keys and values it writes a function of the whole prefix, and it looks at every position that a model would
read.

Copies happen in virtual time: each waits until a fence asks for its blocks or a random moment comes, so a run is
replayed from its seed.
"""

from __future__ import annotations

import contextlib
import os
import random
from array import array
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

import vllm
from kvortex import InvalidArgumentError, PagedCache
from kvortex.vllm import KVortexConnector, settings
from kvortex.vllm import connector as connectors

NEW = not vllm.__version__.startswith("0.15")
LAYERS = ["model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn"]
HEADS, SIZE, BLOCK = 2, 4, 16
HASH = get_hash_fn_by_name("sha256")


class Wrong(AssertionError):
    """A model would have read, or a request would be given, wrong bytes."""


@dataclass
class Options:
    """One run. Everything random follows from ``seed``."""

    seed: int
    order: str = "v1"
    """Which model runner calls the connector: v1, or v2, which the scheduler runs one step ahead of."""
    load_mode: str = "sync"
    steps: int = 300
    blocks: int = 40
    slots: int = 60
    load_failures: float = 0.0
    store_failures: float = 0.0
    layout: str = "NHD"


@dataclass
class Counts:
    """What a run did, so that a test sees that it did something."""

    requests: int = 0
    finished: int = 0
    aborted: int = 0
    preempted: int = 0
    resets: int = 0
    hit_tokens: int = 0
    background: int = 0
    checked: int = 0
    stored: int = 0
    read_back: int = 0
    failed_loads: int = 0


# What the KV of a position is.

CHAIN, MASK = 1000003, 0x7FFFFFFF


def chain_of(tokens, before=0):
    """A number for each position that depends on all tokens up to it."""
    out = np.empty(len(tokens), np.int64)
    for i, token in enumerate(tokens):
        before = (before * CHAIN + token + 7) & MASK
        out[i] = before
    return out


SALTS = [
    np.random.default_rng(layer).integers(1, 1 << 30, 2 * HEADS * SIZE, dtype=np.int32) for layer in range(len(LAYERS))
]


def token_after(number):
    """The token that the model samples after a prefix."""
    return int(number % 50000)


def words_of(chain, layer):
    """The words of each position in a layer, shape (positions, 2 * HEADS * SIZE)."""
    return chain.astype(np.int32)[:, None] ^ SALTS[layer][None, :]


# vLLM, as small as it gets.


def vllm_config(model, options):
    """The configuration of an engine with our connector."""
    transfer = KVTransferConfig(
        kv_connector="KVortexConnector",
        kv_connector_module_path="kvortex.vllm",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={
            "cpu_pool_size_bytes": options.slots * 4096,
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
        max_model_len=512,
        max_num_seqs=8,
        max_num_batched_tokens=96,
        enable_chunked_prefill=True,
        block_size=BLOCK if not NEW else 32,
        kv_transfer_config=transfer,
        async_scheduling=False,
    )
    config = args.create_engine_config()
    config.cache_config.block_size = BLOCK
    config.cache_config.num_gpu_blocks = options.blocks
    return config


def kv_cache_config(options):
    """One group of two layers."""
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=HEADS, head_size=SIZE, dtype=torch.float32)
    page = spec.page_size_bytes
    if NEW:
        size = page * options.blocks
        tensors = [KVCacheTensor(size=size * len(LAYERS), layers=list(LAYERS), layer_stride=size, block_stride=page)]
    else:
        tensors = [KVCacheTensor(size=page * options.blocks, shared_by=[layer]) for layer in LAYERS]
    return KVCacheConfig(
        num_blocks=options.blocks, kv_cache_tensors=tensors, kv_cache_groups=[KVCacheGroupSpec(list(LAYERS), spec)]
    )


def kv_tensors(options):
    """The registered tensors, and a view of each with shape (block, offset, words...)."""
    registered, views = {}, []
    for layer in LAYERS:
        if NEW and options.layout == "NHD":
            tensor = torch.zeros(options.blocks, BLOCK, HEADS, 2 * SIZE).transpose(1, 2)
        elif NEW:
            tensor = torch.zeros(options.blocks, HEADS, BLOCK, 2 * SIZE)
        elif options.layout == "NHD":
            tensor = torch.zeros(2, options.blocks, BLOCK, HEADS, SIZE)
        else:
            tensor = torch.zeros(options.blocks, 2, BLOCK, HEADS, SIZE)
        registered[layer] = tensor
        words = tensor.view(torch.int32).numpy()
        if NEW:
            views.append(words.transpose(0, 2, 1, 3))
        else:
            views.append(words.transpose(1, 2, 0, 3, 4) if options.layout == "NHD" else words.transpose(0, 2, 1, 3, 4))
    return registered, views


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


# Copies in virtual time.


@dataclass
class Waiting:
    """A copy that has not happened."""

    lane: str
    run: object
    blocks: frozenset


class DelayedMover:
    """A real mover whose copies wait for a random moment or for a fence. Those of a lane stay in order."""

    def __init__(self, real, rng, options, counts):
        self.real, self.rng, self.options, self.counts = real, rng, options, counts
        self.waiting: list[Waiting] = []
        self.all_blocks = None

    def store(self, ticket, slots, blocks):
        fails = self.rng.random() < self.options.store_failures
        self.counts.stored += len(blocks)
        self._enter("store", lambda: self._carry_out(self.real.store, ticket, slots, blocks, fails), blocks)

    def load_later(self, ticket, slots, blocks):
        fails = self.rng.random() < self.options.load_failures
        self.counts.failed_loads += fails
        self.counts.background += 1
        self._enter("later", lambda: self._carry_out(self.real.load_later, ticket, slots, blocks, fails), blocks)

    def load(self, ticket, slots, blocks, *, parts=None):
        self.real.load(ticket, slots, blocks)

    def fence(self, blocks):
        """What unfinished copies read or write of ``blocks`` comes first, with all that their lane has before them."""
        wanted = frozenset(blocks.block_ids)
        while any(waiting.blocks & wanted for waiting in self.waiting):
            last = max(i for i, waiting in enumerate(self.waiting) if waiting.blocks & wanted)
            self._release(next(i for i, w in enumerate(self.waiting) if w.lane == self.waiting[last].lane))
        self.real.fence(blocks)

    def ended_loads(self):
        return self.real.ended_loads()

    def ended_later(self):
        return self.real.ended_later()

    def shutdown(self, timeout_ms=5000):
        self.advance(len(self.waiting))
        return self.real.shutdown()

    def advance(self, count):
        """Time passes: ``count`` copies happen, of random lanes."""
        for _ in range(min(count, len(self.waiting))):
            lane = self.rng.choice(sorted({waiting.lane for waiting in self.waiting}))
            self._release(next(i for i, waiting in enumerate(self.waiting) if waiting.lane == lane))

    def _enter(self, lane, run, blocks):
        self.waiting.append(Waiting(lane, run, frozenset(blocks.block_ids)))

    def _release(self, index):
        self.waiting.pop(index).run()

    def _carry_out(self, method, ticket, slots, blocks, fails):
        if fails:
            # A plan with a slot too few: the real mover refuses it and tells the planner.
            with contextlib.suppress(InvalidArgumentError):
                method(ticket, slots[4:], blocks)
            return
        method(ticket, slots, blocks)
        self.real.fence(blocks)


class Worker:
    """The model runner: calls the hooks in a version's order, and computes by rote."""

    def __init__(self, connector, views, options, counts, requests):
        self.connector, self.views, self.options, self.counts = connector, views, options, counts
        self.requests = requests
        self.tables: dict[str, list[int]] = {}

    def _update(self, out):
        for name in out.finished_req_ids:
            self.tables.pop(name, None)
        for new in out.scheduled_new_reqs:
            self.tables[new.req_id] = list(new.block_ids[0])
        cached = out.scheduled_cached_reqs
        for name, new in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if name in cached.resumed_req_ids:
                self.counts.preempted += 1
                self.tables[name] = list(new[0])
            elif new is not None:
                self.tables[name].extend(new[0])

    def execute(self, out):
        """One step: what the scheduler's output asks for."""
        step, meta = out.total_num_scheduled_tokens > 0, out.kv_connector_metadata
        connector = self.connector
        if NEW or self.options.order == "v2":
            connector.handle_preemptions(meta)
        elif getattr(out, "preempted_req_ids", None):
            connector.handle_preemptions(out.preempted_req_ids)
        self._update(out)
        connector.bind_connector_metadata(meta)
        early = getattr(out, "has_sync_kv_loads", True) or not NEW
        if early:
            connector.start_load_kv(SimpleNamespace(attn_metadata=None))
        sampled = self._forward(out) if step else {}
        if not early:
            connector.start_load_kv(SimpleNamespace(attn_metadata=None))
        if step or NEW:
            connector.wait_for_save()
        output = KVConnectorOutput()
        sent, received = connector.get_finished(out.finished_req_ids)
        output.finished_sending, output.finished_recving = sent, received
        output.invalid_block_ids = connector.get_block_ids_with_load_errors()
        connector.clear_connector_metadata()
        names = list(out.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=[sampled[name] for name in names],
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
            kv_connector_output=output,
        )

    def _forward(self, out):
        computed = {new.req_id: new.num_computed_tokens for new in out.scheduled_new_reqs}
        cached = out.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for layer in LAYERS:
            self.connector.wait_for_layer_load(layer)
        # All read what was there before; then all write, as a layer of a model does.
        sampled = {}
        plans = []
        for name, count in out.num_scheduled_tokens.items():
            start, request = computed[name], self.requests[name]
            chain = request.chain(start + count)
            plans.append((name, start, start + count, chain))
            sampled[name] = [token_after(chain[-1])] if out.samples[name] else []
        for name, start, end, chain in plans:
            self._write(self.tables[name], start, end, chain)
        for name, start, _, chain in plans:
            self._check(name, self.tables[name], start, chain)
        return sampled

    def _write(self, table, start, end, chain):
        at = np.arange(start, end)
        blocks, offsets = np.asarray(table)[at // BLOCK], at % BLOCK
        for layer, view in enumerate(self.views):
            view[blocks, offsets] = words_of(chain[start:end], layer).reshape(-1, *view.shape[2:])

    def _check(self, name, table, end, chain):
        at = np.arange(end)
        blocks, offsets = np.asarray(table)[at // BLOCK], at % BLOCK
        for layer, view in enumerate(self.views):
            found = view[blocks, offsets].reshape(end, 2 * HEADS * SIZE)
            wrong = np.flatnonzero((found != words_of(chain[:end], layer)).any(axis=1))
            if len(wrong):
                raise Wrong(f"{name} reads wrong KV at positions {wrong[:8]} of {end}, layer {layer}")
        self.counts.checked += end


@dataclass
class Tracked:
    """A request and the chain of its tokens: those of the prompt, then what follows from them."""

    request: Request
    known: list[int] = field(default_factory=list)

    def chain(self, count):
        prompt = self.request.prompt_token_ids
        while len(self.known) < count:
            at, before = len(self.known), self.known[-1] if self.known else 0
            token = prompt[at] if at < len(prompt) else token_after(before)
            self.known.append((before * CHAIN + token + 7) & MASK)
        return np.asarray(self.known[:count], np.int64)


class Run:
    """One random schedule."""

    def __init__(self, model, options, config=None):
        self.options, self.counts = options, Counts()
        self.rng = random.Random(options.seed)
        init_none_hash(HASH)
        self.config = config or vllm_config(model, options)
        self.config.kv_transfer_config.engine_id = f"harness-{os.getpid()}-{id(self)}"
        extra = self.config.kv_transfer_config.kv_connector_extra_config
        extra.update(load_mode=options.load_mode, cpu_pool_size_bytes=options.slots * 4096)
        settings.SMALL_LOAD_BYTES = 3 * 2 * 2 * HEADS * SIZE * BLOCK * 4
        self.config.cache_config.num_gpu_blocks = options.blocks
        caches = kv_cache_config(options)
        self.lag, self.unread = (1 if options.order == "v2" else 0), []
        self.scheduler = (AsyncScheduler if self.lag else Scheduler)(
            vllm_config=self.config,
            kv_cache_config=caches,
            structured_output_manager=StructuredOutputManager(self.config),
            block_size=BLOCK,
        )
        connector = KVortexConnector(self.config, KVConnectorRole.WORKER, caches)
        registered, views = kv_tensors(options)
        with mock.patch.object(connectors, "_rank", return_value=0):
            connector.register_kv_caches(registered)
        self.side = connector._worker
        self.mover = self.side._mover = DelayedMover(self.side._mover, self.rng, options, self.counts)
        self.planner = self.scheduler.connector._scheduler._planner
        self.requests: dict[str, Tracked] = {}
        self.everything: dict[bytes, tuple[np.ndarray, int]] = {}
        self.worker = Worker(connector, views, options, self.counts, self.requests)
        self.connector = connector
        documents = np.random.default_rng(options.seed)
        self.documents = [documents.integers(0, 50000, 320).tolist() for _ in range(4)]

    def go(self):
        """Runs the schedule to its end; raises Wrong or AssertionError with the seed in it."""
        try:
            for step in range(self.options.steps):
                self._disturb()
                self._step()
                if step % 50 == 49:
                    self.read_back()
            self._drain()
        except Exception as error:
            raise type(error)(f"{self.options}: {error}") from error
        return self.counts

    def _disturb(self):
        rng = self.rng
        if rng.random() < 0.3 and len(self.scheduler.requests) < 12:
            self._add()
        if rng.random() < 0.03 and self.scheduler.requests:
            self._abort(rng.choice(sorted(self.scheduler.requests)))
        if rng.random() < 0.01:
            self._reset(rng.random() < 0.3)
        elif rng.random() < 0.06:
            self.scheduler.reset_prefix_cache()
        if rng.random() < 0.7:
            self.mover.advance(rng.randrange(4))

    def _reset(self, reset_connector):
        if any(request.status == RequestStatus.WAITING_FOR_REMOTE_KVS for request in self.scheduler.requests.values()):
            return
        self.counts.resets += 1
        # vLLM itself does not do it while blocks are held for a load.
        with contextlib.suppress(RuntimeError):
            self.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=reset_connector)

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

    def _abort(self, name):
        if not self.scheduler.requests[name].is_finished():
            self.counts.aborted += 1
            self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def _step(self):
        out = self.scheduler.schedule()
        requests = self.scheduler.requests
        if NEW:
            out.samples = {name: not requests[name].is_prefill_chunk for name in out.num_scheduled_tokens}
        else:
            # The number of computed tokens has been advanced.
            ends = {name: requests[name].num_computed_tokens for name in out.num_scheduled_tokens}
            out.samples = {name: end >= requests[name].num_tokens for name, end in ends.items()}
        self.unread.append((out, self.worker.execute(out)))
        while len(self.unread) > self.lag:
            self.scheduler.update_from_output(*self.unread.pop(0))
        self._note()

    def _note(self):
        """Remembers what the bytes of every named block must be."""
        for name, tracked in list(self.requests.items()):
            request = tracked.request
            chain = tracked.chain(len(request.block_hashes) * BLOCK)
            assert request.all_token_ids[-1] == self._last_token(tracked), f"{name} was given a wrong token"
            for i, key in enumerate(request.block_hashes):
                self.everything.setdefault(bytes(key), (chain, i))
            if request.is_finished() and name not in self.scheduler.requests:
                self.counts.finished += 1
                del self.requests[name]

    @staticmethod
    def _last_token(tracked):
        prompt, count = tracked.request.prompt_token_ids, tracked.request.num_tokens
        return prompt[-1] if count == len(prompt) else token_after(tracked.chain(count - 1)[-1])

    def _drain(self):
        for _ in range(3000):
            if not self.scheduler.requests:
                break
            self.mover.advance(2)
            self._step()
        assert not self.scheduler.requests, f"requests never end: {sorted(self.scheduler.requests)}"
        self.lag = 0
        self._step()
        self.mover.advance(len(self.mover.waiting))
        self._step()
        self.read_back()
        free = self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        assert free == self.options.blocks - 1, f"{self.options.blocks - 1 - free} pages leaked"
        stats = self.planner.get_stats()
        assert (stats["in_flight"], stats["leased_blocks"]) == (0, 0), stats
        self.counts.hit_tokens = self.scheduler.connector._scheduler.hit_tokens
        self.side.shutdown()

    def read_back(self):
        """Reads every block that a lookup can see out of the arena."""
        self.planner.poll()
        for key, (chain, i) in self.everything.items():
            lease = self.planner.lease_prefix(key)
            if not len(lease):
                continue
            targets, views = kv_tensors(Options(0, blocks=1, layout=self.options.layout))
            cache = self._scratch(targets)
            ticket, slots = self.planner.plan_load(lease)
            self.mover.real.load(ticket, slots, cache.blocks(array("I", [0])))
            self.mover.real.ended_loads()
            self.planner.poll()
            for layer, view in enumerate(views):
                found = view[0].reshape(BLOCK, -1)
                if (found != words_of(chain[i * BLOCK : (i + 1) * BLOCK], layer)).any():
                    raise Wrong(f"a stored block holds wrong bytes: block {i} of a request, layer {layer}")
            self.counts.read_back += 1

    def _scratch(self, targets):
        layout = self.connector._layout
        views = [tensor if NEW or self.options.layout != "NHD" else tensor.movedim(1, 0) for tensor in targets.values()]
        assert layout.block_size_bytes == sum(view.numel() * 4 for view in views)
        return PagedCache(views)
