"""The two sides of a connector without a scheduler between them: requests are stored whole, and looked up."""

from __future__ import annotations

from types import SimpleNamespace

from harness import Options, Run
from rote import BLOCK

NO_CACHED = SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set())
NO_FORWARD = SimpleNamespace(attn_metadata=None)


class Direct:
    """Does what an engine would do with one request at a time, and nothing else."""

    def __init__(self, model, config=None, run=None):
        self.run = run or Run(model, Options(0), config)
        self.scheduler, self.worker = self.run.scheduler.connector, self.run.connector
        self.side = self.scheduler._scheduler

    def hit_tokens(self, request):
        """Tokens that it would be given, once they have come if they are on their way."""
        tokens = None
        while tokens is None:
            tokens, _ = self.scheduler.get_num_new_matched_tokens(request, 0)
        return tokens

    def serve(self, request):
        """Computes all of it, whatever could be loaded; returns what it would have been given, and what is answered."""
        name, count = request.request_id, len(request.block_hashes)
        hit = self.hit_tokens(request)
        self.scheduler.update_state_after_alloc(request, None, 0)
        blocks = list(range(1, count + 2))
        new = SimpleNamespace(req_id=name, block_ids=(blocks,), num_computed_tokens=0)
        scheduled = {name: request.num_tokens}
        self._step([new], scheduled)
        self._step([], {})
        return hit, self.scheduler.request_finished(request, blocks)[1]

    def _step(self, new, scheduled):
        output = SimpleNamespace(
            scheduled_new_reqs=new,
            scheduled_cached_reqs=NO_CACHED,
            num_scheduled_tokens=scheduled,
            total_num_scheduled_tokens=sum(scheduled.values()),
        )
        worker, plans = self.worker, self.scheduler.build_connector_meta(output)
        worker.handle_preemptions(plans)
        worker.bind_connector_metadata(plans)
        worker.start_load_kv(NO_FORWARD)
        worker.wait_for_save()
        self.run.device.wait_for_all()
        worker.get_finished(set())
        worker.clear_connector_metadata()

    def pass_time(self, seconds):
        """The clock of the connector goes on."""
        self.run.device.now += seconds


def whole_blocks(request):
    """Tokens of its blocks of which two tokens at least are not the last."""
    return max(0, request.num_tokens - 2) // BLOCK * BLOCK
