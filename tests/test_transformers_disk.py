"""The prefix cache of transformers on a disk: a new process finds what its own model kept, and no other model's."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch

import kvortex
from kvortex.transformers import attach
from tiny_models import PAD, new_model, shared_model, text

GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
PROMPT = text(100)
WHOLE = 96
# One process of a user: the folder, the model's dtype and the seed of its weights come by the command line.
PROCESS = f"""
import json, sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_transformers_disk as own
folder, dtype, seed = sys.argv[1:]
model = own.new_model(dtype=getattr(torch, dtype), seed=int(seed))
print(json.dumps(own.life(folder, model)))
"""


def engine_at(folder, **knobs):
    settings = {"cpu_pool_size_bytes": "4MiB", "disk_paths": [folder], "disk_size_bytes": "4MiB", "device": "none"}
    return kvortex.KVortexEngine.create(settings, disk_read_deadline_ms=20_000, **knobs)


def life(folder, model):
    """What a model says to the prompt with an engine of its own, and how much of it came from the disk."""
    with engine_at(folder) as engine, attach(model, engine) as attachment:
        assert engine.flush(20_000)
        said = model.generate(PROMPT, **GREEDY)[0].tolist()
        assert engine.flush(20_000)
        disk = engine.get_stats()["disk"]
        reused = attachment.stats.last.reused_tokens
        return {"said": said, "reused": reused, "kept": disk["blocks"], "corrupt": disk["corrupt"]}


def process(folder, dtype="float32", seed=0):
    words = [sys.executable, "-c", PROCESS, str(folder), dtype, str(seed)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def plain(model):
    return type(model).generate(model, PROMPT, **GREEDY)[0].tolist()


def test_a_new_process_finds_the_prefix_and_says_the_same(tmp_path):
    first, second = process(tmp_path / "kv"), process(tmp_path / "kv")
    assert (first["reused"], second["reused"]) == (0, WHOLE)
    assert first["said"] == second["said"] == plain(new_model())
    assert first["kept"] == second["kept"] == WHOLE // 16


@pytest.mark.parametrize("other", [("float32", 1), ("bfloat16", 0)], ids=["weights", "dtype"])
def test_another_model_finds_nothing(tmp_path, other):
    assert process(tmp_path / "kv")["reused"] == 0
    dtype, seed = other
    found = process(tmp_path / "kv", dtype, seed)
    assert found["reused"] == 0
    assert found["said"] == plain(new_model(dtype=getattr(torch, dtype), seed=seed))


def test_two_dtypes_of_one_size_do_not_meet(tmp_path):
    life(tmp_path / "kv", new_model(dtype=torch.bfloat16))
    half = new_model(dtype=torch.float16)
    assert life(tmp_path / "kv", half)["reused"] == 0
    assert life(tmp_path / "kv", half)["reused"] == WHOLE
    assert life(tmp_path / "kv", new_model(dtype=torch.bfloat16))["reused"] == WHOLE


def test_the_folder_says_whose_blocks_it_keeps(tmp_path):
    model = shared_model()
    with engine_at(tmp_path / "kv") as engine, attach(model, engine) as attachment:
        namespace = attachment.namespace.digest.hex()
        model.generate(PROMPT, **GREEDY)
    [owner] = kvortex._core.inspect_disk(str(tmp_path / "kv"))["owners"]
    assert owner["namespace"] == namespace


def places(content):
    """(offset of the first header, of the first block, bytes that a block takes), read as docs/disk.md has them."""
    taken, slots = struct.unpack_from("<QI", content, 48)
    return 8192, 8192 + slots * 4096, taken


def zeroed(content):
    _, first, taken = places(content)
    content[first : first + 6 * taken] = bytes(6 * taken)
    return content


def truncated(content):
    _, first, taken = places(content)
    return content[: first + 100 + taken]


def swapped(content):
    """The bytes of neighbours change places; their headers stay."""
    _, first, taken = places(content)
    for at in range(first, first + 6 * taken, 2 * taken):
        one, two = content[at : at + taken], content[at + taken : at + 2 * taken]
        content[at : at + 2 * taken] = two + one
    return content


def swapped_with_headers(content):
    """Whole entries change places."""
    header, _, _ = places(content)
    for at in range(header, header + 6 * 4096, 8192):
        content[at : at + 8192] = content[at + 4096 : at + 8192] + content[at : at + 4096]
    return swapped(content)


@pytest.mark.parametrize(
    "damage", [zeroed, truncated, swapped, swapped_with_headers], ids=lambda damage: damage.__name__
)
def test_damage_is_a_miss_and_changes_no_token(tmp_path, damage):
    model = shared_model()
    assert life(tmp_path / "kv", model)["kept"] == WHOLE // 16
    file = tmp_path / "kv/v1/blocks"
    file.write_bytes(damage(bytearray(file.read_bytes())))
    after = life(tmp_path / "kv", model)
    assert after["reused"] == 0
    assert after["said"] == plain(model)
    assert life(tmp_path / "kv", model)["reused"] == WHOLE


def test_control_undamaged_is_found(tmp_path):
    model = shared_model()
    life(tmp_path / "kv", model)
    file = tmp_path / "kv/v1/blocks"
    file.write_bytes(bytearray(file.read_bytes()))
    assert life(tmp_path / "kv", model)["reused"] == WHOLE
