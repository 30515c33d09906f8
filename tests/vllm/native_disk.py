"""vLLM's own file-system tier below its CPU tier, in an engine on a CPU: asks it, prints what came out, and waits to be
killed. vLLM 0.32.

python native_disk.py MODEL '{"folder": ..., "prompts": {"name": [...]}}'
"""

import json
import os
import sys
import time

from native_offload import HostCopies
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class RegionCopies(HostCopies):
    """Between the engine's blocks and the region that the tiers below read and write."""

    def __init__(self, caches, region):
        super().__init__(caches, 0)
        self._host = [region.create_next_worker_view(cache.page_size_bytes) for cache in caches.tensors]


class HostTieringSpec(TieringOffloadingSpec):
    """The native tiers, all of them but the copies of a GPU."""

    def get_worker(self, kv_caches):
        if not self._worker:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=0,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = RegionCopies(kv_caches, region)
        return self._worker


def main(model, options):
    from engine_run import Engine

    transfer = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "spec_name": "HostTieringSpec",
            "spec_module_path": "native_disk",
            "cpu_bytes_to_use": 64 << 20,
            "secondary_tiers": [{"type": "fs", "root_dir": options["folder"]}],
        },
    }
    engine = Engine(model, {"llm": {"kv_transfer_config": transfer}})
    found = {name: engine.ask(tokens) for name, tokens in options["prompts"].items()}
    for _ in range(4):
        engine.ask([5] * 40)
        time.sleep(0.5)
    print("\nFOUND " + json.dumps(found), flush=True)
    time.sleep(120)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    main(sys.argv[1], json.loads(sys.argv[2]))
