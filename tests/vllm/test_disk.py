"""Real engines on the CPU with a disk below: killed and started anew, they serve what they had, and nothing else."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import disk_files
import pytest

from conftest import OLD

RUN = Path(__file__).parent / "disk_run.py"
NATIVE = Path(__file__).parent / "native_disk.py"
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONHASHSEED": "0"}
SEVERAL = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONHASHSEED": "0"}

rng = random.Random(3)
PROMPTS = {name: [rng.randrange(6, 31000) for _ in range(length)] for name, length in (("long", 600), ("short", 170))}
CACHED = {"long": 576, "short": 160}
ALL_TOKENS = 576 + 160 + 32
"""With the block of the request that each life ends with."""


def life(model, folder, tmp_path, environment=ONE_PROCESS, **options):
    """One engine from its start until it is killed: what it found, and what it said."""
    extra = {"disk_paths": [str(folder)], "disk_size_bytes": "64MiB", "disk_read_deadline_ms": 20_000}
    return live(RUN, model, tmp_path, environment, {**options, "extra": {**extra, **options.get("extra", {})}})


def live(script, model, tmp_path, environment, options):
    """Runs a script until it has said what it found, and kills it then."""
    given = {"prompts": PROMPTS, **options}
    log = tmp_path / f"life-{time.monotonic_ns()}.log"
    with open(log, "w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, str(script), str(model), json.dumps(given)],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        said, found = [], None
        try:
            for line in process.stdout:
                said.append(line)
                if line.startswith("FOUND "):
                    found = json.loads(line[6:])
                    break
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
            process.stdout.close()
    text = "".join(said) + log.read_text(encoding="utf-8")
    if "dies" in options:
        assert found is None
        assert process.returncode == -signal.SIGKILL, text[-6000:]
        return None, text
    assert found is not None, text[-6000:]
    return found, text


def answers(found):
    return {name: found[name][0] for name in PROMPTS}


def cached(found):
    return {name: found[name][1] for name in PROMPTS}


@pytest.mark.timeout(600)
def test_an_engine_that_was_killed_serves_its_old_prefixes_from_the_disk(weights_folder, tmp_path):
    first, said = life(weights_folder, tmp_path / "kv", tmp_path)
    assert len(set(first["long"][0])) > 12, "a model that repeats itself proves nothing"
    assert cached(first) == {"long": 0, "short": 0}
    assert said.count(f"KVortex keeps blocks in {tmp_path}/kv as well") == 1
    again, _ = life(weights_folder, tmp_path / "kv", tmp_path)
    assert answers(again) == answers(first)
    assert cached(again) == CACHED
    stats = again["stats"]
    assert stats["disk_hit_tokens"] == stats["hit_tokens"] == ALL_TOKENS
    assert stats["disk"]["promoted_blocks"] == ALL_TOKENS // 32
    assert stats["disk"]["corrupt"] == stats["disk"]["lost_blocks"] == 0
    assert stats["promotions"]["started"] == 3


@pytest.mark.skipif(OLD, reason="with a connector this vLLM has one group")
@pytest.mark.timeout(600)
def test_blocks_of_sliding_windows_come_back_from_the_disk(gemma_folder, tmp_path):
    first, _ = life(gemma_folder, tmp_path / "kv", tmp_path)
    again, _ = life(gemma_folder, tmp_path / "kv", tmp_path)
    assert (answers(again), cached(again)) == (answers(first), CACHED)
    stats = again["stats"]
    assert stats["disk_hit_tokens"] == stats["hit_tokens"] == ALL_TOKENS
    # Of 18, 5 and 1 blocks of tokens all in the group that sees everything, and in each of five the last four.
    assert stats["disk"]["promoted_blocks"] == (18 + 5 * 4) + (5 + 5 * 4) + (1 + 5 * 1)
    assert stats["disk"]["corrupt"] == stats["disk"]["lost_blocks"] == 0


@pytest.mark.timeout(900)
def test_an_engine_that_dies_while_it_writes_leaves_nothing_wrong(weights_folder, tmp_path):
    for name in PROMPTS:
        life(weights_folder, tmp_path / "kv", tmp_path, dies=name)
    again, _ = life(weights_folder, tmp_path / "kv", tmp_path)
    last, _ = life(weights_folder, tmp_path / "kv", tmp_path)
    elsewhere, _ = life(weights_folder, tmp_path / "other", tmp_path)
    assert cached(elsewhere) == {"long": 0, "short": 0}
    assert answers(again) == answers(last) == answers(elsewhere)
    assert cached(last) == CACHED
    assert again["stats"]["disk"]["corrupt"] == last["stats"]["disk"]["corrupt"] == 0


@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", disk_files.SPOILED)
def test_spoiled_files_are_misses(weights_folder, tmp_path, how):
    first, _ = life(weights_folder, tmp_path / "kv", tmp_path)
    disk_files.SPOILED[how](tmp_path / "kv")
    again, _ = life(weights_folder, tmp_path / "kv", tmp_path)
    assert answers(again) == answers(first)
    assert cached(again) == {"long": 0, "short": 0}
    if how != "truncated":
        assert again["stats"]["disk"]["corrupt"] > 0
    # What was computed anew is kept anew.
    last, _ = life(weights_folder, tmp_path / "kv", tmp_path)
    assert (answers(last), cached(last)) == (answers(first), CACHED)


@pytest.mark.timeout(900)
@pytest.mark.skipif(OLD, reason="0.15.1 has no tier below its host memory")
def test_the_native_tier_serves_zeroes_where_ours_misses(weights_folder, tmp_path):
    """On the same prompts, each with every byte of its blocks zeroed between two lives of the engine."""
    ours, _ = life(weights_folder, tmp_path / "ours", tmp_path)
    native, _ = live(NATIVE, weights_folder, tmp_path, ONE_PROCESS, {"folder": str(tmp_path / "native")})
    assert answers(native) == answers(ours)
    disk_files.zero(tmp_path / "ours")
    blocks = list((tmp_path / "native").rglob("*.bin"))
    assert len(blocks) >= sum(CACHED.values()) // 32
    for path in blocks:
        path.write_bytes(bytes(path.stat().st_size))
    ours_again, _ = life(weights_folder, tmp_path / "ours", tmp_path)
    native_again, _ = live(NATIVE, weights_folder, tmp_path, ONE_PROCESS, {"folder": str(tmp_path / "native")})
    print("\nours:", cached(ours_again), answers(ours_again) == answers(ours))
    print("native:", cached(native_again), answers(native_again) == answers(native))
    assert (answers(ours_again), cached(ours_again)) == (answers(ours), {"long": 0, "short": 0})
    assert cached(native_again)["long"] > 0
    assert answers(native_again)["long"] != answers(native)["long"], "wrong tokens, and nobody was told"


@pytest.mark.timeout(600)
@pytest.mark.skipif(OLD, reason="without its C extension 0.15.1 runs in one process only")
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_in_processes_of_their_own_are_served_from_the_disk(weights_folder, tmp_path, ranks):
    options = {"llm": {"tensor_parallel_size": ranks}}
    first, _ = life(weights_folder, tmp_path / "kv", tmp_path, SEVERAL, **options)
    assert len(disk_files.files(tmp_path / "kv")) == ranks
    again, said = life(weights_folder, tmp_path / "kv", tmp_path, SEVERAL, **options)
    assert (answers(again), cached(again)) == (answers(first), CACHED)
    assert said.count(f"KVortex keeps blocks in {tmp_path}/kv as well") == 1
    if ranks == 2:
        # One rank's part is gone: nothing is served from half of a block.
        disk_files.files(tmp_path / "kv")[1].unlink()
        half, _ = life(weights_folder, tmp_path / "kv", tmp_path, SEVERAL, **options)
        assert (answers(half), cached(half)) == (answers(first), {"long": 0, "short": 0})


@pytest.mark.timeout(600)
def test_a_reset_empties_the_disk_and_leaves_it(weights_folder, tmp_path):
    first, said = life(weights_folder, tmp_path / "kv", tmp_path, reset=True)
    assert first["after reset"][1] == 0
    assert first["stats"]["disk"] is None
    assert said.count("no block goes to the disk any more: everything was forgotten") == 1
    again, _ = life(weights_folder, tmp_path / "kv", tmp_path)
    assert (answers(again), cached(again)) == (answers(first), {"long": 0, "short": 0})


@pytest.mark.timeout(600)
def test_names_that_do_not_survive_keep_the_disk_off(weights_folder, model_folder, tmp_path):
    reasons = {"dummies": (model_folder, {"llm": {"load_format": "dummy"}}, ONE_PROCESS, "serve the model from files")}
    if OLD:
        unset = {**ONE_PROCESS, "PYTHONHASHSEED": ""}
        reasons["root"] = (weights_folder, {}, unset, "set PYTHONHASHSEED to the same number for every start")
    for model, options, environment, remedy in reasons.values():
        found, said = life(model, tmp_path / "kv", tmp_path, environment, **options)
        assert said.count("the disk tier stays off") == 1
        assert remedy in said
        assert found["stats"]["disk"] is None
        assert not (tmp_path / "kv").exists()
