"""The command line: exit codes, one-sentence errors, and nothing imported before it is needed."""

import subprocess
import sys

import pytest

import kvortex
from kvortex import cli


def test_info_says_what_a_bug_report_needs(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["kvortex", kvortex.__version__]
    for word in ("python", "cpus", "memory", "default pool", "huge pages"):
        assert f"\n{word}" in out


def test_the_version(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"kvortex {kvortex.__version__}\n"


@pytest.mark.parametrize("words", [[], ["nonsense"], ["info", "--nonsense"], ["info", "more"]])
def test_a_wrong_command_line_exits_with_2(words, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    assert left.value.code == 2
    assert "usage: kvortex" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (kvortex.ConfigError("a = 1:\n  no"), "kvortex: a = 1: no\n"),
        (FileNotFoundError(2, "No such file", "doc.txt"), "kvortex: [Errno 2] No such file: 'doc.txt'\n"),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            "kvortex: the module torch is not installed; pip install 'kvortex[demo]' brings it\n",
        ),
    ],
)
def test_a_failure_is_one_line_and_exit_code_1(error, said, capsys, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr(cli, "facts", fail)
    assert cli.main(["info"]) == 1
    assert capsys.readouterr().err == said


def test_a_defect_of_ours_is_not_hidden_behind_one_line(monkeypatch):
    monkeypatch.setattr(cli, "facts", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["info"])


def test_control_c_leaves_quietly(monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "facts", interrupt)
    assert cli.main(["info"]) == 130


def test_a_reader_that_has_seen_enough_is_no_error():
    run = f"{sys.executable} -c 'import sys; from kvortex.cli import main; sys.exit(main([\"info\"]))' | true"
    done = subprocess.run(["bash", "-c", run], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


def test_the_installed_command_runs():
    run = [sys.executable, "-c", "import sys; from kvortex.cli import main; sys.exit(main(['info']))"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_info_imports_nothing_that_the_demo_needs():
    probe = (
        "import sys; from kvortex.cli import main; main(['info']); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'transformers', 'kvortex.demo')))"
    )
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, timeout=60).returncode == 0


def test_the_demo_explains_its_options(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["demo", "--help"])
    assert left.value.code == 0
    assert "--model" in capsys.readouterr().out
