"""The Python code in the README and the guide runs as it stands, each document as one program from top to bottom."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def blocks(document, language):
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("document", ["README.md", "docs/guide.md"])
def test_the_code_runs(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = blocks(document, "python")
    assert code
    names = {"__name__": "__main__"}
    for number, block in enumerate(code, start=1):
        exec(compile(block, f"{document}, block {number}", "exec"), names)


def test_the_example_of_the_readme_is_short():
    [example] = blocks("README.md", "python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 20


def test_the_readme_names_every_developer_command_that_exists():
    usage = set(re.findall(r"^#   \.ci/dev (\w+)", (ROOT / ".ci/dev").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"`\.ci/dev (\w+)`", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert usage == named


@pytest.mark.parametrize(
    "document", ["README.md", "CHANGELOG.md", *sorted(p.name for p in (ROOT / "docs").rglob("*.md"))]
)
def test_every_link_to_a_file_leads_somewhere(document):
    [path] = [p for p in (ROOT / document, *(ROOT / "docs").rglob(document)) if p.exists()][:1]
    links = re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8"))
    places = [link.partition("#") for link in links if "://" not in link]
    found = [((path.parent / file if file else path), anchor) for file, _, anchor in places]
    assert not [file for file, _ in found if not file.exists()]
    assert not [(file, anchor) for file, anchor in found if anchor and anchor not in anchors(file)]


def anchors(path):
    """What the headings of a document are called in links."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_message_the_guide_explains_is_one_that_is_said():
    guide = (ROOT / "docs/guide.md").read_text(encoding="utf-8").split("## When something is wrong")[1]
    messages = re.findall(r"^\| `([^`]+)` \|", guide, re.MULTILINE)
    sources = [*(ROOT / "crates").rglob("*.rs"), *(ROOT / "python").rglob("*.py")]
    said = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    assert len(messages) > 10
    assert not [message for message in messages if message not in said]
