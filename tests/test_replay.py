"""`kvortex bench replay`: on the trace that ships with it, it finds what a simple model of the same tiers finds."""

import collections
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

import kvortex
from kvortex import replay
from kvortex.cli import main

BENCHES = Path(__file__).parent.parent / "benches"
SHIPPED = BENCHES / "trace.jsonl"


class Lru:
    """Blocks in the order of their last use; of one prompt the tail is the older."""

    def __init__(self, capacity):
        self.capacity, self.kept, self.written = capacity, collections.OrderedDict(), 0

    def holds(self, block):
        return block in self.kept

    def use(self, blocks, admitted):
        for block in reversed(blocks):
            if block in self.kept:
                self.kept.move_to_end(block)
        for block in reversed([block for block in blocks if block not in self.kept and block in admitted]):
            if len(self.kept) == self.capacity:
                self.kept.popitem(last=False)
            self.kept[block] = None
            self.written += 1
        for block in reversed(blocks):
            if block in self.kept:
                self.kept.move_to_end(block)


class Ghosts:
    """Second touch: the last so many blocks that were offered once."""

    def __init__(self, most):
        self.most, self.seen, self.order = most, set(), collections.deque()

    def admits(self, block):
        if block in self.seen:
            self.seen.discard(block)
            return True
        self.seen.add(block)
        self.order.append(block)
        if len(self.order) > self.most:
            self.seen.discard(self.order.popleft())
        return False


def modelled(trace, host_blocks, disk_blocks=0, second_touch=False):
    """Blocks found and blocks written to the disk."""
    host, disk, ghosts, found = Lru(host_blocks), Lru(disk_blocks), Ghosts(2 * disk_blocks), 0
    for blocks in trace.requests:
        hit = len(list(itertools.takewhile(lambda block: host.holds(block) or disk.holds(block), blocks)))
        found += hit
        offered = [block for block in blocks if not disk.holds(block)] if disk_blocks else []
        admitted = {block for block in offered if not second_touch or ghosts.admits(block)}
        host.use(blocks, set(blocks))
        disk.use(blocks, admitted)
    return found, disk.written


@pytest.fixture(scope="module")
def trace():
    return replay.read(SHIPPED)


def test_the_shipped_trace_is_what_its_generator_writes():
    done = subprocess.run([sys.executable, BENCHES / "make_trace.py"], capture_output=True, check=True)
    assert done.stdout == SHIPPED.read_bytes()
    for line in map(json.loads, SHIPPED.read_text().splitlines()):
        assert set(line) == {"timestamp", "input_length", "output_length", "hash_ids"}
        assert 0 < line["input_length"] <= 512 * len(line["hash_ids"])


@pytest.mark.parametrize("host", [70, 200, 1000])
def test_host_memory_alone_finds_what_an_lru_finds(trace, host):
    row = replay.replay(trace, "host", host, 1, None)
    assert (row.host_blocks, row.disk_blocks, row.written) == (host, 0, 0)
    assert (row.found, 0) == modelled(trace, host)
    assert 0 < row.found < trace.ideal()


@pytest.mark.parametrize("admission", ["all", "second_touch"])
@pytest.mark.parametrize("disk", [160, 480, 1600])
def test_a_disk_finds_and_writes_what_an_lru_does(trace, disk, admission):
    row = replay.replay(trace, "host, disk", 80, disk, admission)
    assert (row.host_blocks, row.disk_blocks) == (80, disk)
    found, written = modelled(trace, 80, disk, admission == "second_touch")
    assert (row.found, row.written) == (found, written)
    assert 0 < row.from_disk < row.found


def test_the_command_prints_a_table(trace, capsys, tmp_path):
    words = ["--host", "80", "--disk", "10%", "--block-bytes", "1GiB", "--json", str(tmp_path / "out.json")]
    assert main(["bench", "replay", str(SHIPPED), *words]) == 0
    printed = capsys.readouterr().out
    assert f"{len(trace.requests):,} requests for {trace.asked:,} blocks" in printed
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["asked"], found["different"], found["ideal"]) == (trace.asked, trace.different, trace.ideal())
    host, plain, touched = found["rows"]
    assert host["found"] < plain["found"] <= trace.ideal()
    assert touched["written"] < plain["written"]
    assert plain["disk_blocks"] - trace.different // 10 in range(16)
    for row in found["rows"]:
        assert f"{row['found'] / trace.asked:.1%}" in printed
        assert f"{row['written'] / 1024:.2f} TiB" in printed
    assert max(map(len, printed.splitlines())) <= 120


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{}", "line 2: no request"),
        ("nonsense", "line 2: no request"),
        ('{"hash_ids": [1, "2"]}', "line 2: no request"),
        ('{"hash_ids": [true]}', "line 2: no request"),
    ],
)
def test_another_format_is_refused(tmp_path, line, reason):
    file = tmp_path / "trace.jsonl"
    file.write_text(f'{{"hash_ids": [1, 2]}}\n{line}\n')
    with pytest.raises(kvortex.ConfigError, match=reason):
        replay.read(file)


def test_what_cannot_be_replayed_is_refused(tmp_path, capsys):
    (tmp_path / "empty").write_text("\n")
    assert main(["bench", "replay", str(tmp_path / "empty")]) == 1
    assert "has no request" in capsys.readouterr().err
    assert main(["bench", "replay", str(tmp_path / "missing")]) == 1
    assert "No such file" in capsys.readouterr().err
    (tmp_path / "noise").write_bytes(b"\xff\xfe\n")
    assert main(["bench", "replay", str(tmp_path / "noise")]) == 1
    assert "line 1: no request" in capsys.readouterr().err
    for words in (["--host", "0"], ["--disk", "x%"], ["--host", "0%"], ["--disk", "1e400%"]):
        assert main(["bench", "replay", str(SHIPPED), *words]) == 1
        assert f"{words[0]} {words[1]}: give a number of blocks" in capsys.readouterr().err


def test_a_tiny_trace_with_any_numbers_is_replayed(tmp_path, capsys):
    file = tmp_path / "trace.jsonl"
    file.write_text(f'{{"hash_ids": [-1, {10**30}]}}\n' * 2)
    assert main(["bench", "replay", str(file), "--disk", "1000000000"]) == 0
    host, disk, _ = capsys.readouterr().out.splitlines()[3:]
    assert host.split()[1:4] == ["1", "0", "25.0%"], "a share is a block at least"
    assert disk.split()[2:4] == ["1", "16"], "more than all is all"
