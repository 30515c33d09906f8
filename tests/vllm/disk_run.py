"""Runs one engine with a disk below in a process of its own, asks it, prints what came out, and waits to be killed.

python disk_run.py MODEL '{"extra": {"disk_paths": [...]}, "llm": {...}, "prompts": {"name": [...]}}'
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from engine_run import Engine


def scheduler_of(engine):
    """The scheduler's side, where it is in this process."""
    core = getattr(engine.llm.llm_engine.engine_core, "engine_core", None)
    return None if core is None else core.scheduler.connector._scheduler


def main(model, options):
    engine = Engine(model, options)
    found = {}
    for name, tokens in options["prompts"].items():
        found[name] = engine.ask(tokens)
        if options.get("dies") == name:
            # What it has just computed is on its way to the disk.
            os.killpg(0, signal.SIGKILL)
    # What ended a moment ago is offered to the disk by the next step.
    engine.ask([5] * 40)
    side = scheduler_of(engine)
    if side is None:
        time.sleep(2)
    else:
        assert side._planner.flush(20_000)
        found["stats"] = side.stats()
        if options.get("reset"):
            assert engine.llm.reset_prefix_cache(reset_connector=True) is True
            found["after reset"] = engine.ask(next(iter(options["prompts"].values())))
            found["stats"] = side.stats()
    print("\nFOUND " + json.dumps(found), flush=True)
    time.sleep(120)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    main(sys.argv[1], json.loads(sys.argv[2]))
