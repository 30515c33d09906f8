"""Sizes and modes: what is for one engine, what is for each rank, and what is said about it."""

import logging
import uuid

import harness
import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

import kvortex.config
from kvortex import ConfigError
from kvortex.vllm import KVortexConnector, settings


@pytest.fixture(scope="module")
def config(model_folder):
    return harness.vllm_config(model_folder, harness.Options(0))


def connector(config, monkeypatch, extra, **parallel):
    """The scheduler's connector of an engine."""
    transfer = config.kv_transfer_config
    monkeypatch.setattr(transfer, "engine_id", uuid.uuid4().hex)
    monkeypatch.setattr(transfer, "kv_connector_extra_config", extra)
    for name, value in parallel.items():
        monkeypatch.setattr(config.parallel_config, name, value)
    return KVortexConnector(config, KVConnectorRole.SCHEDULER, harness.kv_cache_config(40))


def test_the_size_is_for_one_engine_over_all_of_its_ranks(config, monkeypatch):
    one = connector(config, monkeypatch, {"cpu_pool_size_bytes": "64MiB"})
    assert one._config.cpu_pool_size_bytes == 64 << 20
    two = connector(config, monkeypatch, {"cpu_pool_size_bytes": "64MiB"}, tensor_parallel_size=2)
    assert two._config.cpu_pool_size_bytes == 32 << 20
    blocks = [side._scheduler.stats()["capacity_blocks"] for side in (one, two)]
    assert blocks[0] == 2 * blocks[1] > 0


def test_the_default_is_half_of_a_tight_limit_over_all_ranks(config, monkeypatch):
    monkeypatch.setattr(kvortex.config, "cgroup_limit", lambda: 64 << 20)
    two = connector(config, monkeypatch, {}, tensor_parallel_size=2)
    assert two._config.cpu_pool_size_bytes == 16 << 20


@pytest.mark.parametrize(("engines", "said"), [(1, []), (4, [f"4 engines (data parallelism) take {256 << 20} bytes"])])
def test_the_total_of_several_engines_is_said(config, monkeypatch, caplog, engines, said):
    logging.getLogger("kvortex").addHandler(caplog.handler)
    caplog.set_level(logging.INFO, "kvortex")
    size = {"cpu_pool_size_bytes": "64MiB"}
    connector(config, monkeypatch, size, data_parallel_size=engines, tensor_parallel_size=2)
    logging.getLogger("kvortex").removeHandler(caplog.handler)
    found = [record.getMessage() for record in caplog.records if "data parallelism" in record.getMessage()]
    assert [one.partition(" of host")[0] for one in dict.fromkeys(found)] == said


def test_a_name_keeps_blocks_apart(config, monkeypatch):
    plain, named = (connector(config, monkeypatch, extra) for extra in ({}, {"namespace": "the second weights"}))
    assert plain._namespace != named._namespace


def test_a_block_has_the_size_that_the_engine_gives_it(config, monkeypatch):
    size = connector(config, monkeypatch, {})._layout.block_size_bytes
    connector(config, monkeypatch, {"block_size_bytes": size})
    with pytest.raises(ConfigError, match=f"block_size_bytes = 4096: blocks of this engine have {size} on each rank"):
        connector(config, monkeypatch, {"block_size_bytes": 4096})


def test_modes():
    assert settings.read({}, None)[1].name == "auto"
    # Of a vLLM that reserves no room for what is loaded beside the steps.
    assert settings.read({}, 10)[1].name == "sync"
    assert settings.read({"load_mode": " Async "}, 10)[1] == settings.LoadMode("async", 10)
    with pytest.raises(ConfigError, match="load_mode = 'often': give one of auto, sync, async"):
        settings.read({"load_mode": "often"}, None)
    with pytest.raises(ConfigError, match="the nearest known one is cpu_pool_size_bytes"):
        settings.read({"cpu_pool_bytes": 1}, None)


def test_auto_loads_little_inside_the_step_and_much_beside_others():
    auto = settings.LoadMode("auto")
    much = settings.SMALL_LOAD_BYTES + 1
    assert [auto.is_background(size, running) for size, running in ((much - 1, 5), (much, 0), (much, 1))] == [
        False,
        False,
        True,
    ]


def test_a_disk_is_configured_as_for_an_engine(config, monkeypatch, tmp_path):
    made = connector(config, monkeypatch, {"disk_paths": [str(tmp_path)], "disk_size_bytes": "1GiB"})
    assert (made._config.disk_paths, made._config.disk_size_bytes) == ((str(tmp_path),), 1 << 30)
    with pytest.raises(ConfigError, match="the nearest known one is disk_paths"):
        connector(config, monkeypatch, {"disk_path": [str(tmp_path)]})
