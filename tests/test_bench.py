"""`kvortex bench transfer`: the table, its files, and what it refuses."""

import io
import json

import pytest

import kvortex
from kvortex import bench, cli


def test_the_table_has_a_row_for_each_size_and_way(tmp_path, capsys):
    told, drawn = tmp_path / "table.json", tmp_path / "table.png"
    words = ["--size", "8MiB", "--fragments", "4KiB,2MiB", "--runs", "1", "--json", str(told), "--plot", str(drawn)]
    assert cli.main(["bench", "transfer", "--device", "none", *words]) == 0
    out = capsys.readouterr().out
    table = json.loads(told.read_text())
    assert [(row["fragment_bytes"], row["method"]) for row in table["rows"]] == [(4096, "host"), (2 << 20, "host")]
    assert (table["blocks"], table["block_bytes"]) == (4, 2 << 20)
    for rates in [table["contiguous"], *(row["rates"] for row in table["rows"])]:
        assert all(1e6 < rates[name] < 1e12 for name in ("save", "load", "both"))
    lines = [line.split() for line in out.splitlines()]
    assert ["4", "KiB", "host"] in [words[:3] for words in lines]
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_blocks_are_copied_whole_and_in_their_place():
    with bench.Rig("none", 4, 1) as rig, rig.engines("host") as (saving, _):
        memory = memoryview(rig._memory)
        memory[:] = bytes(number % 251 for number in range(len(memory)))
        keys = [number.to_bytes(32, "big") for number in range(4)]
        saving.save_blocks(keys, rig.pages(64 << 10)[0])
        ids = rig.pages(64 << 10)[0].block_ids
        tensor = 8 * (64 << 10)
        for block, kept in zip(ids, saving.load_blocks(keys), strict=True):
            starts = [part * tensor + block * (64 << 10) for part in range(32)]
            assert bytes(kept) == b"".join(bytes(memory[at : at + (64 << 10)]) for at in starts)
        memory.release()
        del kept


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--size", "1MiB"], "--size 1MiB: give a multiple of 2MiB"),
        (["--size", "much"], "--size = 'much'"),
        (["--fragments", "3KiB"], "--fragments 3072: give sizes that divide 2MiB"),
        (["--fragments", ""], "--fragments = ''"),
        (["--device", "gpu"], "device = 'gpu'"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(words, said, capsys):
    assert cli.main(["bench", "transfer", *words]) == 1
    assert said in capsys.readouterr().err


def test_a_gpu_that_is_named_must_be_there(monkeypatch, capsys):
    def none():
        raise kvortex.CudaUnavailableError("no CUDA device 0: nothing")

    monkeypatch.setattr(kvortex, "gpus", none)
    assert bench.find_device("auto") == ("none", "the host's own memory")
    assert cli.main(["bench", "transfer", "--device", "cuda"]) == 1
    assert "no CUDA device 0: nothing" in capsys.readouterr().err
    monkeypatch.setattr(kvortex, "gpus", lambda: [{"name": "one"}])
    assert bench.find_device("auto") == ("cuda:0", "one")
    with pytest.raises(kvortex.CudaUnavailableError, match="there is no cuda:3: this process sees 1"):
        bench.find_device("cuda:3")


def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_measured(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["bench", "transfer", "--plot", "table.txt"])
    assert left.value.code == 2
    assert "ends in none of .png, .svg, .pdf" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_is_drawn_on_a_terminal_only():
    for stream in (io.StringIO(), Terminal()):
        progress = bench.Progress(stream)
        progress.start(2)
        progress.step("one")
        progress.step("two")
        progress.end()
        shown = stream.getvalue()
        assert bool(shown) == stream.isatty()
    assert f"\r[{'#' * 15}{'.' * 15}] 1/2 two" in shown
    assert shown.endswith("\r")
