"""README, the pages of docs/ and the quickstart: their code runs, and they say what is so."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.S | re.M)


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def promised(code: str) -> list[str]:
    """What the comments say that the code prints: behind each print, or in the lines below it."""
    lines = []
    for printed in re.finditer(r"^ *print\(.*?\)(?:  # (.*))?\n((?:# .*\n)*)", code, re.M):
        behind, below = printed.groups()
        lines += [behind] if behind else [line[2:] for line in below.splitlines()]
    return lines


# Of a page, block after block; the README's stand alone and have a test of their own.
CODE = [(p.name, "\n".join(blocks(p, "python"))) for p in PAGES[1:] if blocks(p, "python")]


@pytest.mark.parametrize("code", [c for _, c in CODE], ids=[name for name, _ in CODE])
def test_code_runs_and_prints_what_it_says(code):
    assert run("-c", code).splitlines() == promised(code)


def test_readme_before_and_after_differ_by_two_lines_and_nothing_else():
    before, after = blocks(README, "python")
    added = [line for line in after.splitlines() if line not in before.splitlines()]
    assert added == ["import fusedcnn", "model = fusedcnn.fuse(model)"]
    assert [line for line in after.splitlines() if line not in added] == before.splitlines()
    seeded = "import torch\ntorch.manual_seed(0)\n{}\nprint(loss.item())"
    losses = [float(run("-c", seeded.format(code))) for code in (before, after)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_commands_of_the_readme():
    of_ci = re.findall(r'^README_\w+="(.*)"$', (ROOT / ".ci" / "run").read_text(), re.M)
    assert len(of_ci) == 2
    commands = "".join(blocks(README, "sh")).splitlines()
    for command in commands:
        if command not in of_ci:  # which runs those two
            python, *arguments = shlex.split(command)
            assert python == "python"
            assert run(*arguments)
    assert set(of_ci) < set(commands)


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 110


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name
)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```$|`[^`\n]+`", "", page.read_text(), flags=re.S | re.M)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not link.startswith("https://"):
            assert (page.parent / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_page_of_kernels_is_the_list(backend):
    # The tiles' list stands before the list of their base.
    sources = (ROOT / "csrc" / backend).glob("registry*.cpp")
    source = "".join(path.read_text() for path in sorted(sources, reverse=True))
    snake = {"Forward": "forward", "GradWeight": "grad_weight", "GradInput": "grad_input"}
    listed = [(snake[p], n) for n, p in re.findall(r'\{"(\w+)", Pass::k(\w+),', source)]
    listed.sort(key=lambda row: list(snake.values()).index(row[0]))
    section = (ROOT / "docs" / "kernels.md").read_text().partition(f"### {backend.upper()}\n")[2]
    shown, pass_name = [], ""
    for cell, name in re.findall(r"^\| (\w*) ?\| `(\w+)`.* \|$", section.split("\n#")[0], re.M):
        pass_name = cell or pass_name
        if pass_name in snake.values():
            shown.append((pass_name, name))
    assert listed
    assert shown == listed


def test_quickstart_shows_both_side_by_side():
    rows = dict(re.findall(r"^(.+?)  +(.+)$", run("examples/quickstart.py"), re.M))
    assert rows["output shape"].split("  ") == ["[4, 10]", " [4, 10]"]
    stock, fused = map(float, rows["loss of the first step"].split())
    assert fused == pytest.approx(stock, abs=2e-4)
    assert len(rows["training step, batch 64"].split("ms")) == 3
