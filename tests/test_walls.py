"""The walls that no compiler keeps: which module may name which, where `unsafe` lives, how long things are."""

import ast
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = ROOT / "crates/kvortex/src"

# The floors of the core, lowest first. A module names its own floor and those below; a new one must choose its floor.
FLOORS = [
    {"error", "sync"},
    {"mask", "namespace", "layout", "fork", "eviction", "terms"},
    {"key", "config", "tier"},
    {"index", "lease", "plan"},
    {"planner", "mover", "metrics", "ticket"},
    {"copies", "engine", "flight", "lower", "profile", "ranks", "stats"},
]
FLOOR = {name: height for height, floor in enumerate(FLOORS) for name in floor}
# Walls within a floor: who decides does not touch bytes, who moves does not see what was decided.
UNSEEN = {
    "index": {"kvortex_mem", "plan"},
    "lease": {"kvortex_mem", "plan"},
    "eviction": {"kvortex_mem"},
    "planner": {"kvortex_mem", "mover"},
    "mover": {"index", "lease", "eviction", "planner"},
    "plan": {"kvortex_mem", "index", "lease"},
}
UNSAFE_ALLOWED = ("crates/kvortex-mem/src/", "crates/kvortex-mem/tests/", "crates/kvortex-py/src/dlpack.rs")
FILE_LIMIT = 800


def rust_files(folder):
    return sorted(path for path in (ROOT / folder).rglob("*.rs") if path.name != "tests.rs")


def python_files():
    return sorted(path for folder in ("python", "tests", ".ci") for path in (ROOT / folder).rglob("*.py"))


def code_of(path):
    """A Rust file without comments, strings and its unit tests."""
    text = path.read_text(encoding="utf-8").split("#[cfg(test)]\nmod ")[0]
    return re.sub(r'//[^\n]*|"(?:\\.|[^"\\])*"', "", text)


def split_top(text):
    """The comma-separated parts of a `use` group, whose own groups stay whole."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "{") - (letter == "}")
        if depth < 0:
            break
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def named_modules(code):
    """First words of every `crate::` path, and `kvortex_mem` where it is named."""
    names = {"kvortex_mem"} if re.search(r"\bkvortex_mem\b", code) else set()
    for found in re.finditer(r"\bcrate::(\{)?", code):
        rest = code[found.end() :]
        parts = split_top(rest) if found[1] else [rest]
        names |= {re.match(r"\w*", part)[0] for part in parts}
    return names


def test_the_reader_of_use_lines_sees_every_form():
    code = "use crate::{index::{Index, x}, key::Key,\n mask};\ncrate::plan::go(); crate::engine::X; kvortex_mem::x()"
    assert named_modules(code) == {"index", "key", "mask", "plan", "engine", "kvortex_mem"}
    assert named_modules("use kvortex_memory::x; use crate::error::Error;") == {"error"}


def core_modules():
    return {path.stem: [path] if path.suffix == ".rs" else rust_files(path) for path in sorted(CORE.iterdir())}


@pytest.mark.parametrize("module", FLOOR)
def test_arrows_inside_the_core_go_down(module):
    above = {name for name in FLOOR if FLOOR[name] > FLOOR[module]}
    forbidden = above | UNSEEN.get(module, set())
    files = core_modules()[module]
    assert {f"{path.name}: {name}" for path in files for name in named_modules(code_of(path)) & forbidden} == set()


def test_every_module_of_the_core_has_its_floor():
    assert core_modules().keys() - {"lib"} == FLOOR.keys()


def test_the_architecture_shows_these_floors():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| (`.+?`) \|", text, re.MULTILINE)
    shown = [set(re.findall(r"`(\w+)`", modules)) for _, modules in sorted(rows)]
    assert shown == FLOORS


@pytest.mark.parametrize(("crate", "above"), [("kvortex-mem", ["kvortex", "pyo3"]), ("kvortex", ["pyo3", "cudarc"])])
def test_a_crate_depends_on_nothing_above_it(crate, above):
    manifest = (ROOT / "crates" / crate / "Cargo.toml").read_text(encoding="utf-8")
    assert not [name for name in above if re.search(rf"^{name}\b(?!-)", manifest, re.MULTILINE)]


def test_unsafe_stays_in_its_yard():
    strays = [
        str(path.relative_to(ROOT))
        for path in rust_files("crates")
        if not str(path.relative_to(ROOT)).startswith(UNSAFE_ALLOWED) and re.search(r"\bunsafe\b", code_of(path))
    ]
    assert not strays
    assert "#![forbid(unsafe_code)]" in (CORE / "lib.rs").read_text(encoding="utf-8")


def test_the_seam_talks_to_the_engine_and_not_to_what_is_behind_it():
    inner = re.compile(r"\bkvortex::(index|eviction|planner|mover|tier)\b")
    strays = [
        str(path.relative_to(ROOT)) for path in rust_files("crates/kvortex-py/src") if inner.search(code_of(path))
    ]
    assert not strays


def rust_function_lengths(text):
    """Lines of each function; rustfmt closes one at the indentation it opened with."""
    lines, lengths = text.splitlines(), []
    for number, line in enumerate(lines):
        opened = re.match(r"( *)(?:pub(?:\([a-z]+\))? )?(?:const |unsafe |extern \S+ )*fn \w", line)
        if not opened or line.rstrip().endswith(("}", ";")):
            lengths += [1] if opened and line.rstrip().endswith("}") else []
            continue
        end = next((n for n in range(number, len(lines)) if lines[n] in (opened[1] + "}", opened[1] + ");")), number)
        lengths.append(end - number + 1)
    return lengths


def python_function_lengths(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return [node.end_lineno - node.lineno + 1 for node in functions]


@pytest.mark.parametrize("language", ["rust", "python"])
def test_functions_are_small(language, record_property):
    if language == "rust":
        lengths = [
            n for path in rust_files("crates") if "src" in path.parts for n in rust_function_lengths(code_of(path))
        ]
    else:
        lengths = [n for path in (ROOT / "python").rglob("*.py") for n in python_function_lengths(path)]
    deciles = statistics.quantiles(lengths, n=10)
    record_property("lengths", f"{len(lengths)} functions, median {deciles[4]}, nine in ten under {deciles[8]}")
    assert deciles[4] < 10
    assert deciles[8] < 30


def test_files_are_short_and_leave_nothing_for_later():
    for path in [*rust_files("crates"), *rust_files("benches"), *python_files()]:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= FILE_LIMIT, path
        assert not re.search(r"\b(T[O]DO|F[I]XME)\b", text), path
