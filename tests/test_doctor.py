"""`kvortex doctor`: what it finds, what it says to do, and its exit status."""

import json
import os
from types import SimpleNamespace

import pytest

import kvortex
from kvortex import cli, doctor

GPU = {
    "ordinal": 0,
    "name": "a GPU",
    "bus_id": "0000:9B:00.0",
    "driver_cuda": "13.0",
    "compute_capability": "9.0",
    "memory_bytes": 80 << 30,
    "memory_free_bytes": 79 << 30,
    "numa_node": 1,
}


@pytest.fixture
def sys_folder(tmp_path, monkeypatch):
    """A /sys of the test's own: a dict of path to text is laid into it."""
    monkeypatch.setattr(doctor, "_SYS", tmp_path)

    def lay(files):
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text + "\n")

    return lay


@pytest.fixture
def no_gpu(monkeypatch):
    def none():
        raise kvortex.CudaUnavailableError("no CUDA device 0: the driver sleeps")

    monkeypatch.setattr(kvortex, "gpus", none)


def test_a_machine_without_a_gpu_has_nothing_to_change(capsys, no_gpu):
    assert cli.main(["doctor"]) == 0
    subjects = {line[9:27].strip(): line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:1] > " "}
    assert {"kvortex", "configuration", "memory", "huge pages", "shared memory", "GPU"} <= set(subjects)
    assert subjects["GPU"] == "ok"


def test_a_gpu_that_was_asked_for_and_is_not_there_is_a_problem(capsys, no_gpu):
    assert cli.main(["doctor", "--device", "cuda", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    (found,) = [found for found in told["findings"] if found["subject"] == "GPU"]
    assert (told["ok"], found["state"]) == (False, "problem")
    assert "the driver sleeps" in found["text"]
    assert found["remedy"]


def test_a_gpu_that_the_system_has_and_the_driver_refuses_is_a_problem(no_gpu, monkeypatch):
    monkeypatch.setattr(doctor.Path, "glob", lambda self, pattern: iter(["/dev/nvidia0"]))
    (found,) = doctor.graphics("auto")
    assert found.state == "problem"


def test_more_gpus_asked_for_than_there_are(monkeypatch):
    monkeypatch.setattr(kvortex, "gpus", lambda: [GPU])
    (found,) = doctor.graphics("cuda:2")
    assert (found.state, found.remedy) == ("problem", "look at CUDA_VISIBLE_DEVICES")


def test_settings_that_cannot_work_are_named(monkeypatch, capsys):
    monkeypatch.setenv("KVORTEX_EVICTION_WATERMARK", "7")
    assert cli.main(["doctor", "--device", "none"]) == 1
    out = capsys.readouterr().out
    assert "problem  configuration" in out
    assert "eviction_watermark" in out
    assert "1 problems" in out


def test_a_pool_beyond_the_memory_is_a_problem(monkeypatch):
    monkeypatch.setenv("KVORTEX_CPU_POOL_SIZE_BYTES", "900TiB")
    assert [found.state for found in doctor.configuration()] == ["ok", "problem"]


def test_huge_pages(sys_folder):
    for setting, state in {"always [madvise] never": "ok", "always madvise [never]": "note"}.items():
        sys_folder({"kernel/mm/transparent_hugepage/enabled": setting})
        assert doctor.huge_pages().state == state
    assert "madvise" in doctor.huge_pages().remedy


def test_a_small_shared_memory_is_noted(monkeypatch):
    for size, state in {64 << 20: "note", 8 << 30: "ok"}.items():
        monkeypatch.setattr(
            os, "statvfs", lambda _path, size=size: SimpleNamespace(f_frsize=4096, f_blocks=size // 4096)
        )
        assert doctor.shared_memory().state == state


def link(now, most, widths=("16", "16")):
    folder = "bus/pci/devices/0000:9b:00.0"
    return {
        f"{folder}/current_link_speed": now,
        f"{folder}/max_link_speed": most,
        f"{folder}/current_link_width": widths[0],
        f"{folder}/max_link_width": widths[1],
    }


@pytest.mark.parametrize(
    ("files", "measured", "state", "text"),
    [
        (link("32.0 GT/s PCIe", "32.0 GT/s PCIe"), 54e9, "ok", "PCIe 5 x16, 63 GB/s"),
        (link("16.0 GT/s PCIe", "32.0 GT/s PCIe"), 26e9, "note", "PCIe 4 x16, 32 GB/s, of PCIe 5 x16, 63 GB/s"),
        (link("32.0 GT/s PCIe", "32.0 GT/s PCIe", ("8", "16")), 26e9, "note", "PCIe 5 x8, 32 GB/s, of PCIe 5 x16"),
        (link("32.0 GT/s PCIe", "32.0 GT/s PCIe"), 20e9, "note", "of which 20 are reached"),
        (link("Unknown", "Unknown"), 20e9, "ok", "does not say"),
        ({}, 20e9, "ok", "does not say"),
    ],
)
def test_the_link(sys_folder, files, measured, state, text):
    sys_folder(files)
    found = doctor.lanes(GPU, measured)
    assert (found.state, bool(found.remedy)) == (state, state == "note")
    assert text in found.text


def test_the_node_of_the_gpu(sys_folder, monkeypatch):
    assert doctor.numa(GPU).text == "one node"
    sys_folder({"devices/system/node/node0/cpulist": "0-3", "devices/system/node/node1/cpulist": "4-5,9"})
    for allowed, state in [({0, 1}, "note"), ({3, 5}, "ok"), ({9}, "ok")]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _pid, allowed=allowed: allowed)
        assert doctor.numa(GPU).state == state
    assert doctor.numa(GPU | {"numa_node": None}).state == "ok"


def test_the_ways_to_copy_by_size():
    methods = {4096: "kernel", 8192: "staged", 16384: "staged", 1 << 20: "dma"}
    assert doctor._methods(methods) == "kernel, staged from 8 KiB, dma from 1 MiB"
