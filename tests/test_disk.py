"""The disk tier from Python: what one engine saved, the next one loads, and nobody else."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import kvortex
from blocks import keys_of
from kvortex.cli import main

BLOCK = 6000


def engine_at(folder, namespace="a model, revision 1", **knobs):
    config = {
        "cpu_pool_size_bytes": "1MiB",
        "disk_paths": [folder],
        "disk_size_bytes": "8MiB",
        "disk_read_deadline_ms": 20_000,
        "namespace": namespace,
        "device": "none",
    }
    engine = kvortex.KVortexEngine.create(config, **knobs)
    engine.bind(BLOCK)
    assert engine.flush(20_000)
    return engine


def data_of(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, BLOCK), dtype=np.uint8)


def test_a_new_engine_loads_what_an_earlier_one_saved(tmp_path):
    keys, data = keys_of(20), data_of(20)
    with engine_at(tmp_path / "kv") as engine:
        engine.save_blocks(keys, data)
    with engine_at(tmp_path / "kv") as engine:
        assert engine.match_prefix(keys) == 20
        out = np.zeros_like(data)
        assert engine.load_blocks(keys, out).blocks == 20
        assert np.array_equal(out, data)
        disk = engine.get_stats()["disk"]
        assert disk["recovered_blocks"] == disk["hits"] == 20
    with engine_at(tmp_path / "kv", namespace="a model, revision 2") as engine:
        assert engine.match_prefix(keys) == 0


def test_more_than_memory_holds_comes_back(tmp_path):
    with engine_at(tmp_path / "kv") as engine:
        runs = [(keys_of(20, run), data_of(20, run)) for run in range(12)]
        for keys, data in runs:
            engine.save_blocks(keys, data)
            assert engine.flush(20_000)
        for keys, data in runs:
            out = np.zeros_like(data)
            assert engine.load_blocks(keys, out).blocks == 20
            assert np.array_equal(out, data)


def test_an_asynchronous_load_brings_blocks_up(tmp_path):
    keys, data = keys_of(20), data_of(20)
    with engine_at(tmp_path / "kv") as engine:
        engine.save_blocks(keys, data)
    with engine_at(tmp_path / "kv") as engine:
        out = np.zeros_like(data)
        ticket = engine.load_blocks_async(keys, out)
        assert engine.wait(ticket, 20_000).blocks == 20
        assert np.array_equal(out, data)


def test_damage_is_a_miss(tmp_path):
    keys, data = keys_of(8), data_of(8)
    with engine_at(tmp_path / "kv") as engine:
        engine.save_blocks(keys, data)
    file = tmp_path / "kv/v1/blocks"
    damaged = bytearray(file.read_bytes())
    at = damaged.find(data[3].tobytes())
    damaged[at : at + 100] = bytes(100)
    file.write_bytes(damaged)
    with engine_at(tmp_path / "kv") as engine:
        assert engine.match_prefix(keys) == 3
        assert engine.get_stats()["disk"]["corrupt"] == 1


def test_a_folder_has_one_engine_and_the_next_one_takes_over(tmp_path, caplog):
    keys, data = keys_of(8), data_of(8)
    with engine_at(tmp_path / "kv") as first, engine_at(tmp_path / "kv") as second:
        assert "the disk tier is not there yet" in caplog.text
        assert "another process uses it" in caplog.text
        first.save_blocks(keys, data)
        assert second.get_stats()["disk"]["failing"]
        assert second.match_prefix(keys) == 0
        assert first.shutdown()
        end = time.monotonic() + 10
        while second.get_stats()["disk"]["failing"] and time.monotonic() < end:
            time.sleep(0.05)
        assert second.flush(20_000)
        assert second.match_prefix(keys) == 8


@pytest.mark.parametrize("namespace", [""])
def test_without_a_namespace_it_stays_off(tmp_path, caplog, namespace):
    with engine_at(tmp_path / "kv", namespace=namespace) as engine:
        assert engine.get_stats()["disk"] is None
    assert "bind a namespace" in caplog.text
    assert not (tmp_path / "kv").exists()


def test_the_command_shows_checks_and_trims(tmp_path, capsys):
    folder = tmp_path / "kv"
    keys, data = keys_of(8), data_of(8)
    with engine_at(folder) as engine:
        engine.save_blocks(keys, data)
        assert main(["disk", "ls", str(folder)]) == 1
        assert "another process uses it" in capsys.readouterr().err
    assert main(["disk", "ls", str(folder)]) == 0
    assert "0/1" in capsys.readouterr().out
    assert main(["disk", "fsck", str(folder)]) == 0
    assert "8 blocks sound, 0 damaged" in capsys.readouterr().out
    file = folder / "v1/blocks"
    damaged = bytearray(file.read_bytes())
    at = damaged.find(data[3].tobytes())
    damaged[at : at + 100] = bytes(100)
    file.write_bytes(damaged)
    assert main(["disk", "fsck", str(folder)]) == 1
    assert "7 blocks sound, 1 damaged (0 headers, 1 blocks)" in capsys.readouterr().out
    assert main(["disk", "fsck", "--wipe", str(folder)]) == 0
    assert main(["disk", "fsck", str(folder)]) == 0
    length = file.stat().st_size
    assert main(["disk", "trim", str(folder)]) == 0
    assert file.stat().st_size < length
    before, after = f"{length / 2**20:.1f} MiB", f"{file.stat().st_size / 2**10:.1f} KiB"
    assert f"{before} before, {after} now" in capsys.readouterr().out
    assert main(["disk", "stat", str(folder)]) == 0
    assert "blocks          7" in capsys.readouterr().out
    with engine_at(folder) as engine:
        assert engine.get_stats()["disk"]["recovered_blocks"] == 7
    assert main(["disk", "trim", "--size", "64KiB", str(folder)]) == 0
    assert file.stat().st_size <= 64 << 10
    assert main(["disk", "ls", str(tmp_path)]) == 1
    assert "give a folder of disk_paths" in capsys.readouterr().err


def test_the_command_names_the_folders_of_ranks_and_refuses_links(tmp_path, capsys):
    (tmp_path / "rank-0-of-2").mkdir()
    (tmp_path / "rank-notes").mkdir()
    assert main(["disk", "ls", str(tmp_path)]) == 1
    assert f"give one of its folders, {tmp_path}/rank-0-of-2 say" in capsys.readouterr().err
    folder, link = tmp_path / "kv", tmp_path / "link"
    with engine_at(folder) as engine:
        engine.save_blocks(keys_of(1), data_of(1))
    link.symlink_to(folder)
    assert main(["disk", "ls", str(link)]) == 1
    assert "it is a link or a file" in capsys.readouterr().err


def test_the_command_can_be_interrupted(tmp_path):
    folder = tmp_path / "kv"
    with engine_at(folder) as engine:
        engine.save_blocks(keys_of(1), data_of(1))
    # Holes, which take minutes to look at.
    os.truncate(folder / "v1/blocks", 1 << 40)
    process = subprocess.Popen(
        [sys.executable, "-c", "from kvortex.cli import main; main()", "disk", "stat", str(folder)]
    )
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        process.send_signal(signal.SIGINT)
        assert process.wait(3) == -signal.SIGINT
    finally:
        process.kill()
