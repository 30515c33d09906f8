"""The model runners of several vLLM versions, as far as a connector sees them: which hook is called when, with what.

Read in 0.15.1, 0.25.1 and 0.32.0. What a runner gives to the GPU is enqueued, and runs when the stream comes to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
from rote import BLOCK, HEADS, NEW, SIZE, Tracked, Wrong, words_of
from vllm.config import CUDAGraphMode
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

WORDS = 2 * HEADS * SIZE
METADATA = {"each layer": "how its attention is computed"}


@dataclass(frozen=True)
class Order:
    """What differs between model runners."""

    fences_every_step: bool = True
    """``handle_preemptions`` comes in every step with the metadata, or only when something was preempted."""
    loads_late: bool = True
    """Loads start after the forward pass unless it needs them."""
    saves_when_empty: bool = True
    """``wait_for_save`` comes also when nothing is computed."""
    is_v2: bool = False
    """Model Runner V2: a full graph is replayed outside any forward context."""
    tells_of_the_batch: bool = False
    """``start_load_kv`` is, and ``finish_forward`` comes after the pass."""
    ahead: int = 0
    """Steps that the scheduler is ahead of what it knows."""


OLD = Order(fences_every_step=False, loads_late=False, saves_when_empty=False)
ORDERS = {
    "0.15-v1": OLD,
    "0.15-v1-ahead": replace(OLD, ahead=1),
    "0.25-v2": Order(loads_late=False, saves_when_empty=False, is_v2=True, ahead=1),
    "0.32-v1": Order(),
    "0.32-v1-ahead": Order(ahead=1),
    "0.32-v2": Order(is_v2=True, tells_of_the_batch=True, ahead=1),
}
FITTING = [name for name in ORDERS if name.startswith("0.15") != NEW]
"""Those that the scheduler which is installed works with."""


@dataclass
class Row:
    """One request in a step: it has all positions up to ``start``, and computes up to ``end``."""

    name: str
    tracked: Tracked
    start: int
    end: int
    tables: list[np.ndarray]
    """The blocks that it has of each group."""
    drafted: bool
    """Whether its last position was computed with a drafted token behind it, and is again with the right one."""
    again: bool
    """Whether that was so one step before."""

    def places(self, group, start):
        """Where its positions from ``start`` lie: blocks, and offsets in them."""
        at = np.arange(start, self.end)
        return self.tables[group][at // BLOCK], at % BLOCK

    def first_read(self, window):
        """The first position that is read."""
        return max(0, self.start + 1 - window) if window else 0


class ModelRunner:
    """Calls the hooks in an order, and computes by rote."""

    def __init__(self, connector, shape, mover, order, counts, requests):
        self.connector, self.shape, self.views, self.order = connector, shape, mover.views, order
        self.device, self.compute, self.counts, self.requests = mover.device, mover.compute, counts, requests
        self.tables: dict[str, list[list[int]]] = {}
        self.drafts_late = shape.drafter is not None and not order.is_v2
        """Whether the drafter computes when only ``wait_for_save`` is still to come."""
        self.drafted: dict[str, int] = {}
        """The position of each request that was computed with a drafted token behind it."""
        # One engine in four has a layer that never calls its hook, as a drafter's.
        self.hooked = shape.layers if self.device.rng.random() < 0.75 else shape.layers[:-1]

    def _update(self, out):
        for name in out.finished_req_ids:
            self.tables.pop(name, None)
        for new in out.scheduled_new_reqs:
            self.tables[new.req_id] = [list(ids) for ids in new.block_ids]
        cached = out.scheduled_cached_reqs
        for name, new in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if name in cached.resumed_req_ids:
                self.counts.preempted += 1
                self.tables[name] = [list(ids) for ids in new]
            elif new is not None:
                for table, ids in zip(self.tables[name], new, strict=True):
                    table.extend(ids)

    def execute(self, out):
        """One step: what the scheduler's output asks for."""
        if self.order.is_v2:
            self._update(out)
            self._fence(out)
        else:
            self._fence(out)
            self._update(out)
        self.device.pass_time()
        connector, order, is_step = self.connector, self.order, out.total_num_scheduled_tokens > 0
        connector.bind_connector_metadata(out.kv_connector_metadata)
        context, has_hooks = self._context() if is_step else (forward_context(None), False)
        more = {"scheduler_output": out} if order.tells_of_the_batch else {}
        loads_late = order.loads_late and not out.has_sync_kv_loads
        if not loads_late:
            connector.start_load_kv(context, **more)
        self.device.pass_time()
        sampled = self._forward(out, context, has_hooks) if is_step else {}
        if order.tells_of_the_batch:
            connector.finish_forward()
        if loads_late:
            connector.start_load_kv(context, **more)
        self.device.pass_time()
        drafts_late = is_step and self.drafts_late
        if (is_step or order.saves_when_empty) and not drafts_late:
            connector.wait_for_save()
        self.device.pass_time()
        output = self._output(out, sampled)
        if drafts_late:
            self._compute([layer for layer in self.shape.layers if layer.group == self.shape.drafter])
            connector.wait_for_save()
        connector.clear_connector_metadata()
        return output

    def _fence(self, out):
        if self.order.fences_every_step:
            self.connector.handle_preemptions(out.kv_connector_metadata)
        elif out.preempted_req_ids:
            self.connector.handle_preemptions(out.preempted_req_ids)

    def _context(self):
        """A forward context, and whether the hooks of layers run: not in a full graph."""
        kind = self.device.rng.choice(("eager", "piecewise", "piecewise", "full"))
        if kind == "full":
            self.counts.full_graphs += 1
            return (forward_context(None) if self.order.is_v2 else forward_context(METADATA, CUDAGraphMode.FULL)), False
        return forward_context(METADATA, CUDAGraphMode.NONE if kind == "eager" else CUDAGraphMode.PIECEWISE), True

    def _output(self, out, sampled):
        connector = self.connector
        output = KVConnectorOutput()
        if self.order.saves_when_empty:
            results = connector.get_transfer_results(out.finished_req_ids)
            output.finished_sending = results.finished_sending or None
            output.finished_recving = results.finished_recving or None
            output.failed_recving = results.failed_recving
        else:
            output.finished_sending, output.finished_recving = connector.get_finished(out.finished_req_ids)
        output.invalid_block_ids = connector.get_block_ids_with_load_errors()
        output.kv_connector_stats = connector.get_kv_connector_stats()
        output.kv_cache_events = connector.get_kv_connector_kv_cache_events()
        if NEW:
            output.kv_connector_worker_meta = connector.build_connector_worker_meta()
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

    def _forward(self, out, context, has_hooks):
        rows, sampled = self._rows(out), {}
        for row in rows:
            sampled[row.name] = [row.tracked.token(row.end)] if out.samples[row.name] else []
        drafter = self.shape.drafter
        batches = [Batch(rows, group, window, group == drafter) for group, window in enumerate(self.shape.windows)]
        self.counts.passed += sum(bool(batch.first.any()) for batch in batches)
        self.batches = batches
        now = [layer for layer in self.shape.layers if not (self.drafts_late and layer.group == drafter)]
        self._compute(now, context if has_hooks else None)
        return sampled

    def _compute(self, layers, context=None):
        """Enqueues layers, with their hooks if there is a context."""
        for layer in layers:
            hooks = context is not None and layer in self.hooked
            if hooks:
                self.connector.wait_for_layer_load(layer.name)
            self.compute.put(partial(self._attend, layer, self.batches[layer.group]))
            if hooks:
                self.connector.save_kv_layer(layer.name, None, context.attn_metadata)
            self.device.pass_time()
        self.counts.furthest_behind = max(self.counts.furthest_behind, len(self.compute))

    def _rows(self, out):
        computed = {new.req_id: new.num_computed_tokens for new in out.scheduled_new_reqs}
        cached = out.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        rows = []
        for name, count in out.num_scheduled_tokens.items():
            start, end = computed[name], computed[name] + count
            tables, tracked = [np.asarray(table) for table in self.tables[name]], self.requests[name]
            drafted = out.samples[name] and end > tracked.request.num_prompt_tokens
            again = self.drafted.pop(name, -1) == start - 1
            rows.append(Row(name, tracked, start, end, tables, drafted, again))
            if drafted:
                self.drafted[name] = end - 1
        return rows

    def _attend(self, layer, batch):
        """One layer, when its turn comes: all write what they compute, then all read what they need."""
        self._write(layer, batch)
        self._check(layer, batch)

    def _write(self, layer, batch):
        view, words = self.views[layer.place], words_of(batch.chain[batch.is_new], layer.number)
        view[batch.blocks[batch.is_new], batch.offsets[batch.is_new]] = words.reshape(-1, *view.shape[2:])
        view[batch.blocks[batch.is_drafted], batch.offsets[batch.is_drafted]] = -1

    def _check(self, layer, batch):
        found = self.views[layer.place][batch.blocks, batch.offsets].reshape(-1, WORDS)
        expected = words_of(batch.chain, layer.number)
        is_wrong = (found != expected).any(axis=1) & batch.is_certain
        if is_wrong.any():
            raise Wrong(batch.complaint(is_wrong, layer))
        if layer.number == 0:
            self.counts.checked += len(found)


class Batch:
    """All positions that a step reads in one group, of all its requests, and which of them it writes.

    A drafter keeps of each position what depends on the next token. It is not certain which that was at the end of a
    block, which others may have stored, and at the last position of a request.
    """

    def __init__(self, rows, group, window, drafter):
        self.rows, self.group = rows, group
        self.first = np.array([row.first_read(window) for row in rows])
        starts = list(zip(rows, self.first, strict=True))
        places = [row.places(group, first) for row, first in starts]
        self.blocks, self.offsets = (np.concatenate(parts) for parts in zip(*places, strict=True))
        at = [(row, np.arange(first, row.end)) for row, first in starts]
        ahead = int(drafter)
        self.chain = np.concatenate([row.tracked.chain(row.end + ahead)[first + ahead :] for row, first in starts])
        self.is_new = np.concatenate([one >= row.start - (drafter and row.again) for row, one in at])
        self.is_drafted = np.concatenate([(one == row.end - 1) & (drafter and row.drafted) for row, one in at])
        self.is_certain = ~self.is_drafted
        if drafter:
            self.is_certain &= self.offsets != BLOCK - 1

    def complaint(self, is_wrong, layer):
        """Whose positions are wrong."""
        for row, first in zip(self.rows, self.first, strict=True):
            wrong, is_wrong = np.flatnonzero(is_wrong[: row.end - first]) + first, is_wrong[row.end - first :]
            if len(wrong):
                return f"{row.name} reads wrong KV at positions {wrong[:8]} of {row.end}, {layer}"
        raise AssertionError("nothing is wrong")


def forward_context(attn_metadata, mode=CUDAGraphMode.NONE):
    """What a connector is shown of the pass to come."""
    return SimpleNamespace(attn_metadata=attn_metadata, cudagraph_runtime_mode=mode)
