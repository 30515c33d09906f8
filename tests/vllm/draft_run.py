"""Runs one engine whose drafter has layers of its own; prints how many drafted tokens were accepted, as a line of JSON.

python draft_run.py MODEL '{}'
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from engine_run import Engine

ACCEPTED = "vllm:spec_decode_num_accepted_tokens"


def accepted(engine):
    return sum(metric.value for metric in engine.llm.get_metrics() if metric.name == ACCEPTED)


def main(model, options):
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(6, 31000, (600,), generator=generator).tolist()
    # The model drafts for itself: all that it drafts from the right keys and values is accepted.
    drafter = {"method": "draft_model", "model": model, "num_speculative_tokens": 3}
    engine = Engine(model, {"llm": {"speculative_config": drafter, "disable_log_stats": False}, **options})
    found, before = {}, 0
    for name in ("cold", "hit"):
        tokens, cached = engine.ask(prompt)
        found[name] = {"tokens": tokens, "cached": cached, "accepted": accepted(engine) - before}
        engine.drop()
        before = accepted(engine)
    print("\nFOUND " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
