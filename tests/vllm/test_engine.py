"""Real engines on the CPU: the same tokens from our blocks as computed, and none from anything else."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from conftest import OLD

RUN = Path(__file__).parent / "engine_run.py"
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
SEVERAL = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}

NGRAMS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}

KINDS = {"one process": ({}, ONE_PROCESS), "one process, async": ({"extra": {"load_mode": "async"}}, ONE_PROCESS)}
if not OLD:
    KINDS |= {
        "several processes": ({}, SEVERAL),
        "two ranks": ({"llm": {"tensor_parallel_size": 2}}, SEVERAL),
        "two ranks, async": ({"extra": {"load_mode": "async"}, "llm": {"tensor_parallel_size": 2}}, SEVERAL),
        "child of MultiConnector": ({"multi": True}, ONE_PROCESS),
        "fp8": ({"llm": {"kv_cache_dtype": "fp8"}}, ONE_PROCESS),
        "drafted tokens": ({"llm": {"speculative_config": NGRAMS}}, ONE_PROCESS),
    }


def run(model, options, environment):
    return run_file(RUN, model, options, environment)


def run_file(file, model, options, environment):
    """What an engine found in a process of its own, and what it said."""
    command = [sys.executable, str(file), str(model), json.dumps(options)]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(lines[0][6:]), done.stdout + done.stderr


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_that_were_computed(weights_folder, kind):
    found, log = run(weights_folder, *KINDS[kind])
    check(found)
    ranks = 2 if "two ranks" in kind else 1
    assert f"rank 0 of {ranks}: <kvortex.PagedCache of" in log
    assert f"bytes on each of {ranks} ranks (4 layers)" in log


@pytest.mark.skipif(OLD, reason="with a connector this vLLM has one group")
@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", ["one process", "two ranks, async"])
def test_tokens_of_a_model_with_sliding_windows_are_those_that_were_computed(gemma_folder, kind):
    found, log = run(gemma_folder, *KINDS[kind])
    check(found)
    assert "(12 layers in 6 groups, windows [100])" in log


def check(found):
    """What an engine found: the same tokens from wherever, as many from a cache as there are."""
    tokens = {name: answer[0] for name, answer in found.items()}
    cached = {name: answer[1] for name, answer in found.items()}
    assert len(set(tokens["cold"])) > 12, "a model that repeats itself proves nothing"
    assert tokens["warm"] == tokens["hit"] == tokens["after reset"] == tokens["cold"]
    assert tokens["partial"] == tokens["partial cold"] != tokens["cold"]
    assert tokens["salted"] == tokens["cold"]
    assert cached["cold"] == cached["partial cold"] == cached["after reset"] == 0
    assert cached["warm"] == cached["hit"] == 576
    assert cached["partial"] == 288
    assert cached["generated"] == 512, "blocks with generated tokens are kept too"
    assert cached["salted"] == 576
    assert cached["other salt"] == 0
    assert found["scored again"] == found["scored"], "all of a prompt that is scored is computed"
    if "after pause" in found:
        assert found["after pause"] == found["cold"], "a connector is told that the engine is about to sleep"
    if "corrupted" in found:
        assert cached["corrupted"] == 576
        assert tokens["corrupted"] != tokens["cold"]
        assert cached["last corrupted"] == 576
        assert tokens["last corrupted"] != tokens["cold"]


@pytest.mark.timeout(400)
def test_a_real_model_gives_a_real_answer_from_our_blocks(smollm):
    found, _ = run(smollm.folder, {"prompt": smollm.prompt}, ONE_PROCESS)
    answer = smollm.decode(found["cold"][0])
    assert "340" in answer or "three hundred" in answer, answer
    assert found["cold"][1] == 0
    whole = len(smollm.prompt) // 32 * 32
    assert found["warm"] == found["hit"] == [found["cold"][0], whole]
    assert found["corrupted"][1] == whole
    assert found["corrupted"][0] != found["cold"][0]


REFUSED = {
    "producer": ({"kv_role": "kv_producer"}, {}, "KVortex does not serve kv_role kv_producer: set kv_role to kv_both"),
    "consumer": ({"kv_role": "kv_consumer"}, {}, "KVortex does not serve kv_role kv_consumer: set kv_role to kv_both"),
    "prefix caching": ({}, {"enable_prefix_caching": False}, "prefix caching is off and KVortex needs its"),
    "hashes": ({}, {"prefix_caching_hash_algo": "xxhash"}, "use sha256 or sha256_cbor"),
    "knob": ({"kv_connector_extra_config": {"cpu_pool_size_byte": 1}}, {}, "cpu_pool_size_bytes"),
    "mode": ({"kv_connector_extra_config": {"load_mode": "often"}}, {}, "give one of auto, sync, async"),
}
REFUSED |= {
    "pipeline": ({}, {"pipeline_parallel_size": 2}, "KVortex does not serve pipeline parallelism"),
    "contexts": ({}, {"decode_context_parallel_size": 2}, "KVortex does not serve decode context parallelism"),
    "prompts": ({}, {"prefill_context_parallel_size": 2}, "KVortex does not serve prefill context parallelism"),
    "hosts": ({}, {"nnodes": 2}, "KVortex does not serve tensor parallelism over several hosts"),
    "groups": ({}, {}, "the KV-cache groups have blocks of 16 and 32 tokens, and KVortex keeps blocks of one size"),
}
if OLD:
    REFUSED["groups"] = ({}, {}, "the model has 2 KV-cache groups and KVortex keeps one of this vLLM: start it with")
    REFUSED["sleep"] = ({}, {"enable_sleep_mode": True}, "leave --enable-sleep-mode out, or use a later vLLM")
else:
    REFUSED["experts"] = ({}, {"enable_elastic_ep": True}, "KVortex does not serve elastic expert parallelism")

REFUSE = """
import copy, dataclasses, json, sys
sys.path.insert(0, sys.argv[1])
import vllm
if vllm.__version__.startswith("0.15"):
    import attention_in_torch
from harness import kv_cache_config
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from kvortex.vllm import KVortexConnector
served = EngineArgs(
    model=sys.argv[2], skip_tokenizer_init=True, dtype="float32", max_model_len=512, block_size=32
).create_engine_config()
for what, (transfer, args) in json.loads(sys.argv[3]).items():
    config = copy.deepcopy(served)
    transfer = {"kv_connector": "KVortexConnector", "kv_role": "kv_both", **transfer}
    config.kv_transfer_config = KVTransferConfig(**transfer)
    for name, value in args.items():
        place = next(one for one in vars(config).values() if hasattr(one, name))
        object.__setattr__(place, name, value)
    caches = kv_cache_config(40)
    if what == "groups":
        (group,) = caches.kv_cache_groups
        larger = dataclasses.replace(group.kv_cache_spec, block_size=32)
        caches.kv_cache_groups.append(dataclasses.replace(group, kv_cache_spec=larger))
    try:
        KVortexConnector(config, KVConnectorRole.SCHEDULER, caches)
    except Exception as error:
        print("REFUSED", json.dumps([what, type(error).__name__, str(error)]))
"""


@pytest.mark.timeout(200)
def test_what_is_not_served_is_refused_by_name(model_folder):
    cases = {what: [transfer, args] for what, (transfer, args, _) in REFUSED.items()}
    command = [sys.executable, "-c", REFUSE, str(RUN.parent), str(model_folder), json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    lines = [json.loads(line[8:]) for line in done.stdout.splitlines() if line.startswith("REFUSED ")]
    refused = {what: f"{kind}: {message}" for what, kind, message in lines}
    assert refused.keys() == REFUSED.keys(), done.stderr[-3000:]
    for what, (_, _, message) in REFUSED.items():
        assert message in refused[what]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def ask(port, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    method = "GET" if body is None else "POST"
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers, method=method)
    with urllib.request.urlopen(request, timeout=120) as answer:
        text = answer.read().decode()
    return json.loads(text) if text.startswith(("{", "[")) else text


@contextlib.contextmanager
def serving(weights_folder, tmp_path, *more):
    """A server of its own process: its port, the process, and its log."""
    port, log = free_port(), tmp_path / "serve.log"
    transfer = {
        "kv_connector": "KVortexConnector",
        "kv_connector_module_path": "kvortex.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_pool_size_bytes": "256MiB"},
    }
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(weights_folder), "--port", str(port),
        "--skip-tokenizer-init", "--enforce-eager", "--dtype", "float32", "--max-model-len", "1024",
        "--max-num-seqs", "4", "--block-size", "32", "--served-model-name", "small",
        "--kv-transfer-config", json.dumps(transfer), *more,
    ]  # fmt: skip
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        for _ in range(240):
            assert process.poll() is None, log.read_text()[-6000:]
            try:
                ask(port, "/health")
                break
            except OSError:
                time.sleep(0.5)
        yield port, process, log
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(60)


@pytest.fixture
def server(weights_folder, tmp_path):
    with serving(weights_folder, tmp_path) as served:
        yield served


def hung_up_in_the_middle(port, body):
    """Asks for a long answer to a prompt that is loaded, and leaves after its first words."""
    words = json.dumps({**body, "max_tokens": 600, "stream": True}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", words, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.readline()


@pytest.mark.timeout(300)
@pytest.mark.skipif(OLD, reason="without its C extension 0.15.1 runs in one process only")
def test_a_server_answers_from_our_blocks(server):
    port, process, log = server
    body = {"model": "small", "prompt": list(range(100, 500)), "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    body |= {"return_token_ids": True, "detokenize": False}

    def tokens():
        (choice,) = ask(port, "/v1/completions", body)["choices"]
        return choice["token_ids"]

    cold = tokens()
    ask(port, "/reset_prefix_cache", {})
    assert tokens() == cold
    metrics = ask(port, "/metrics")
    ask(port, "/reset_prefix_cache", {})
    hung_up_in_the_middle(port, body)
    ask(port, "/reset_prefix_cache", {})
    assert tokens() == cold
    (hits,) = [line for line in metrics.splitlines() if line.startswith("vllm:external_prefix_cache_hits_total")]
    assert float(hits.split()[-1]) == 384, hits
    served = log.read_text()
    assert "Traceback" not in served.split("Application startup complete")[1], served[-3000:]
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 0
    # The server of HTTP may tell of the engine's end as of an accident; the engine and its workers end in order.
    ended = log.read_text()[len(served) :].splitlines()
    assert not [line for line in ended if "Traceback" in line and "(APIServer" not in line], ended[-50:]
