"""Numbers on their way: from ranks and steps to vLLM's /metrics, and what a dashboard makes of them."""

import json
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import zmq
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVEventBatch

from conftest import OLD
from kvortex.vllm import KVortexConnector
from kvortex.vllm.stats import METRICS, KVortexStats, key
from test_engine import ask, free_port, serving

DASHBOARD = Path(__file__).parents[2] / "docs/grafana.json"
GUIDE = Path(__file__).parents[2] / "docs/vllm.md"

BLOCK_BYTES = 4 * 2 * 2 * 64 * 4 * 32
"""Of 32 tokens, on all ranks together."""

EXPORTED = {name + "_total" if metric.kind is Counter else name: metric for name, metric in METRICS.items()}


def prometheus():
    """The metrics of two engines in a registry of their own."""
    registry = CollectorRegistry()
    kinds = {kind: partial(kind, registry=registry) for kind in (Counter, Gauge, Histogram)}
    config = SimpleNamespace(kv_transfer_config=None)
    engines = {0: ["small", "0"], 1: ["small", "1"]}
    return registry, KVortexConnector.build_prom_metrics(config, kinds, ["model_name", "engine"], engines)


def test_numbers_of_ranks_and_steps_add_up():
    loaded, used = key("kvortex_transferred_bytes", "host", "load"), key("kvortex_used_blocks", "host")
    first, second = KVortexStats(), KVortexStats()
    first.add(loaded, 3)
    second.add(loaded, 4)
    first.data[used], second.data[used] = 10, 8
    # As between processes.
    travelled = KVortexConnector.build_kv_connector_stats(msgspec.msgpack.decode(msgspec.msgpack.encode(second.data)))
    both = first.aggregate(travelled)
    assert both.data == {loaded: 7, used: 8}
    assert both.reduce() == {"transferred_bytes host load": 7, "used_blocks host": 8}
    assert not both.is_empty()
    both.reset()
    assert both.is_empty()


def test_every_series_is_there_from_the_start_and_counts():
    registry, metrics = prometheus()
    labels = {"model_name": "small", "engine": "1"}
    for name, metric in EXPORTED.items():
        assert metric.values
        for values in metric.values:
            series = labels | dict(zip(metric.labels, values, strict=True))
            assert registry.get_sample_value(name, series) == 0
            metrics.observe({key(metric.name, *values): 5}, 1)
            metrics.observe({key(metric.name, *values): 2}, 1)
            assert registry.get_sample_value(name, series) == (2 if metric.kind is Gauge else 7)
            assert registry.get_sample_value(name, series | {"engine": "0"}) == 0


def test_the_dashboard_shows_every_metric_and_no_other():
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    shown, boxes = set(), set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        boxes |= {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            names = set(re.findall(r"\b(?:kvortex|vllm)[a-z_:]*", target["expr"]))
            shown |= names
            known = {"model_name", "engine"}.union(*(EXPORTED[name].labels for name in names))
            used = re.findall(r"by \(([^)]*)\)|\{\{(\w+)\}\}", target["expr"] + target["legendFormat"])
            assert {label for pair in used for group in pair for label in group.split(", ") if label} <= known
    assert shown == EXPORTED.keys()
    assert len(boxes) == sum(panel["gridPos"]["w"] * panel["gridPos"]["h"] for panel in dashboard["panels"]), "overlap"
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_guide_names_every_metric():
    text = GUIDE.read_text(encoding="utf-8")
    named = set(re.findall(r"`(kvortex_[a-z_]+)`", text.partition("## Metrics and events")[2].partition("\n## ")[0]))
    assert named == EXPORTED.keys()


RUN = Path(__file__).parent / "metrics_run.py"
KINDS = {"one process": (1, "0")}
if not OLD:
    KINDS |= {"several processes": (1, "1"), "two ranks": (2, "1")}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_tells_what_happened_on_all_ranks(weights_folder, kind):
    ranks, several = KINDS[kind]
    options = {"llm": {"tensor_parallel_size": ranks}}
    command = [sys.executable, str(RUN), str(weights_folder), json.dumps(options)]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": several}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stdout[-3000:] + done.stderr[-6000:]
    reports, numbers = json.loads(lines[0][6:])
    loaded = [report and report["kvortex_loaded_tokens"] for report in reports]
    assert loaded == [{"host": 0}, {"host": 384}, None, {"host": 0}]
    assert {name.partition("|")[0] for name in numbers} == EXPORTED.keys()
    # Twice a prompt of one block comes between, so that the engine frees its own.
    for direction in ("load", "store"):
        assert numbers[f"kvortex_transferred_tokens_total|host|{direction}"] == 384 + 32
        assert numbers[f"kvortex_transferred_bytes_total|host|{direction}"] == 13 * BLOCK_BYTES
    assert numbers["kvortex_ignored_params_total|value"] == numbers["kvortex_ignored_params_total|key"] == 1
    assert numbers["kvortex_capacity_bytes|host"] == 256 << 20
    assert numbers["kvortex_hit_tokens_total|host"] == 384 + 32


class Subscriber:
    """Hears what a server publishes."""

    def __init__(self, port):
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.connect(f"tcp://127.0.0.1:{port}")
        self._socket.subscribe("")
        self._decoder = msgspec.msgpack.Decoder(type=KVEventBatch)

    def hear(self):
        """Events that have come, of host memory."""
        events = []
        while self._socket.poll(500):
            _, _, payload = self._socket.recv_multipart()
            events += self._decoder.decode(payload).events
        return [event for event in events if getattr(event, "medium", None) == "CPU"]


@pytest.fixture
def server(weights_folder, tmp_path):
    port = free_port()
    events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"tcp://*:{port}"}
    with serving(weights_folder, tmp_path, "--kv-events-config", json.dumps(events)) as (served, _, log):
        yield served, Subscriber(port), log


def numbers_of(port):
    """Our series in /metrics: by name, then by the values of our labels. There is no disk, and its numbers are 0."""
    found = {}
    for line in ask(port, "/metrics").splitlines():
        if match := re.fullmatch(r"(kvortex_\w+)\{(.*)\} (\S+)", line):
            name, labels, value = match.groups()
            if not name.endswith("_created"):
                labels = dict(re.findall(r'(\w+)="([^"]*)"', labels))
                assert labels.pop("model_name") == "small"
                assert labels.pop("engine") == "0"
                assert labels.get("tier") != "disk" or float(value) == 0
                if labels.get("tier") != "disk":
                    values = tuple(labels[name] for name in sorted(labels, reverse=True))
                    found.setdefault(name, {})[values] = float(value)
    return found


TIER = ("host",)
EXPECTED = {
    "kvortex_transferred_tokens_total": {("host", "load"): 384, ("host", "store"): 384},
    "kvortex_transferred_blocks_total": {("host", "load"): 12, ("host", "store"): 12},
    "kvortex_transferred_bytes_total": {("host", "load"): 12 * BLOCK_BYTES, ("host", "store"): 12 * BLOCK_BYTES},
    "kvortex_failed_transfers_total": {("host", "load"): 0, ("host", "store"): 0},
    "kvortex_refused_blocks_total": {TIER: 0},
    "kvortex_evicted_blocks_total": {TIER: 0},
    "kvortex_expired_blocks_total": {TIER: 0},
    "kvortex_lookups_total": {(): 3},
    "kvortex_lookup_tokens_total": {(): 3 * 384},
    "kvortex_hit_tokens_total": {TIER: 384},
    "kvortex_promotions_total": {("started",): 0, ("late",): 0, ("declined",): 0},
    "kvortex_promotion_bytes_per_second": {(): 0},
    "kvortex_prefill_tokens_per_second": {(): 0},
    "kvortex_disk_faults_total": {("error",): 0, ("corrupt",): 0, ("late",): 0},
    "kvortex_ignored_params_total": {("value",): 1, ("key",): 1},
    "kvortex_capacity_blocks": {TIER: (256 << 20) // BLOCK_BYTES},
    "kvortex_used_blocks": {TIER: 12},
    "kvortex_capacity_bytes": {TIER: 256 << 20},
    "kvortex_used_bytes": {TIER: 12 * BLOCK_BYTES},
}


@pytest.mark.timeout(300)
@pytest.mark.skipif(OLD, reason="without its C extension 0.15.1 runs in one process only")
def test_a_server_tells_what_happened(server):
    port, subscriber, log = server
    body = {"model": "small", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    body |= {"return_token_ids": True, "detokenize": False}

    def loaded(first, length=400, **asks):
        """Tokens that the answer says were loaded."""
        asks = {"kvortex_report": True} | {f"kvortex_{name}": value for name, value in asks.items()}
        prompt = {"prompt": list(range(first, first + length)), "kv_transfer_params": asks}
        answer = ask(port, "/v1/completions", body | prompt)
        return answer["kv_transfer_params"]["kvortex_loaded_tokens"]

    def forget():
        """The engine's own blocks; what has just ended is freed by the next step."""
        loaded(20_000, 5)
        ask(port, "/reset_prefix_cache", {})

    assert loaded(100) == {"host": 0}
    forget()
    assert loaded(100) == {"host": 384}
    forget()
    assert loaded(100, load=False) == {"host": 0}
    assert loaded(5000, store=False) == {"host": 0}
    assert loaded(10_000, 5, ttl_s="soon", stores=True) == {"host": 0}
    # Numbers come with a step, those of what a step began with a later one.
    end = time.monotonic() + 60
    while (numbers := numbers_of(port)) != EXPECTED and time.monotonic() < end:
        loaded(20_000, 5)
    assert numbers == EXPECTED, log.read_text()[-2000:]
    (cached,) = re.findall(r'by_source_total\{.*source="host".*\} (\S+)', ask(port, "/metrics"))
    assert float(cached) == 384
    events = subscriber.hear()
    assert all(isinstance(event, BlockStored) for event in events)
    assert [token for event in events for token in event.token_ids] == list(range(100, 484))
    stored = [name for event in events for name in event.block_hashes]
    assert len(set(stored)) == 12
    ask(port, "/reset_prefix_cache?reset_external=true", {})
    loaded(20_000, 5)
    (event,) = subscriber.hear()
    assert isinstance(event, BlockRemoved)
    assert set(event.block_hashes) == set(stored)
