"""Ours beside vLLM's own offloading, in real engines on the same requests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import OLD

RUN = Path(__file__).parent / "native_offload.py"


def run(connector):
    done = subprocess.run(
        [sys.executable, str(RUN), connector],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stdout[-3000:] + done.stderr[-6000:]
    print("\n" + lines[0][6:])
    return json.loads(lines[0][6:])["rounds"]


@pytest.mark.timeout(700)
@pytest.mark.skipif(OLD, reason="the native offloading of 0.15.1 needs a GPU")
def test_as_many_hits_as_the_native_offloading_for_half_of_its_time():
    ours, native = run("kvortex"), run("native")
    assert [one["hit_tokens"] for one in (ours[0], native[0])] == [0, 0]
    for mine, its in zip(ours[1:], native[1:], strict=True):
        assert mine["hit_tokens"] >= its["hit_tokens"] > 0
        assert mine["us_per_step"] <= its["us_per_step"] / 2
    assert ours[2]["hit_tokens"] > native[2]["hit_tokens"], "answers are kept as well"
