"""Runs one engine with our connector, and prints what it tells of itself as one line of JSON.

python metrics_run.py MODEL '{"llm": {...}}'
"""

import json
import sys

from engine_run import Engine
from prometheus_client import REGISTRY

from vllm import SamplingParams

PROMPT = list(range(100, 500))


def ask(engine, tokens, **asks):
    """The report of an answer."""
    asks = {f"kvortex_{name}": value for name, value in asks.items()}
    params = SamplingParams(
        temperature=0, ignore_eos=True, detokenize=False, max_tokens=8, extra_args={"kv_transfer_params": asks}
    )
    (answer,) = engine.llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)
    return answer.kv_transfer_params


def numbers():
    """Our series, by name and the values of our labels."""
    samples = [sample for metric in REGISTRY.collect() for sample in metric.samples]
    ours = [one for one in samples if one.name.startswith("kvortex_") and not one.name.endswith("_created")]
    values = [[one.labels[label] for label in ("tier", "direction", "reason") if label in one.labels] for one in ours]
    return {"|".join([one.name, *labels]): one.value for one, labels in zip(ours, values, strict=True)}


def main(model, options):
    options["llm"] = {"disable_log_stats": False, **options.get("llm", {})}
    engine = Engine(model, options)
    reports = [ask(engine, PROMPT, report=True)]
    engine.drop()
    reports += [ask(engine, PROMPT, report=True), ask(engine, PROMPT, ttl_s="soon", stored=False)]
    engine.drop()
    reports.append(ask(engine, PROMPT, report=True, load=False))
    # What the last step began is counted in a later one.
    ask(engine, [5] * 5)
    print("\nFOUND " + json.dumps([reports, numbers()]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
