"""The documents say what the code does."""

import ast
import re
from pathlib import Path

import pytest

from liger_kernel.transformers.models import MODELS

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
READMES = ("README.md", "README.zh-CN.md")


def test_every_environment_variable_is_documented_and_every_documented_one_exists():
    source = "".join(p.read_text() for folder in ("src", "benchmark") for p in (ROOT / folder).rglob("*.py"))
    used = set(re.findall(r'"(LIGER_[A-Z0-9_]+)(?<!_ENV)"', source))
    used |= set(re.findall(r'environ(?:\.get\(|\[)"([A-Z0-9_]+)"', source))
    named = set(re.findall(r"^\| `([A-Z0-9_]+)", (ROOT / "docs/environment.md").read_text(), re.MULTILINE))
    assert used <= named, "describe it in docs/environment.md"
    elsewhere = "".join(p.read_text() for p in [ROOT / "Makefile", *(ROOT / "test").rglob("*.py")])
    assert all(name in elsewhere for name in named - used)


def arguments_without_effect():
    """(argument, function or class) for what a public signature takes and its body never mentions."""
    for path in sorted((ROOT / "src/liger_kernel").glob("*/*.py")):
        for node in ast.parse(path.read_text()).body:
            functions = []
            if isinstance(node, ast.ClassDef) and node.name.startswith("Liger"):
                functions = [f for f in node.body if getattr(f, "name", None) in ("__init__", "forward", "apply")]
            elif isinstance(node, ast.FunctionDef) and re.match(r"liger_|\w+_(?:forward|backward)", node.name):
                functions = [node] if not node.name.startswith("_") else []
            for function in functions:
                mentioned = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
                given = {a.arg for a in (*function.args.args, *function.args.kwonlyargs)} - {"self", "cls", "ctx"}
                yield from ((argument, node.name) for argument in given - mentioned)


def test_every_argument_without_effect_is_listed():
    rows = [line.split("|")[1:3] for line in (ROOT / "docs/accepted-without-effect.md").read_text().splitlines()
            if line.startswith("| `")]  # fmt: skip
    found = set(arguments_without_effect())
    assert ("row_mode", "LigerRMSNormFunction") in found
    for argument, owner in found:
        assert any(f"`{argument}`" in what and f"`{owner}`" in where for what, where in rows), (argument, owner)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_both_readmes_hold_the_same_code_and_figures():
    english, chinese = ((ROOT / name).read_text() for name in READMES)
    for what in (r"```.*?```", r"!\[.*?\]\((.*?)\)", r"\d[\d.,]*(?= (?:MB|GB|%))"):
        assert re.findall(what, english, re.DOTALL) == re.findall(what, chinese, re.DOTALL), what


@pytest.mark.parametrize("readme", READMES)
def test_readme_names_every_model(readme):
    text = (ROOT / readme).read_text()
    assert [name for name in MODELS if f"`{name}`" not in text] == []


@pytest.mark.parametrize("readme", READMES)
def test_python_in_the_readme_compiles(readme):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / readme).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, readme, "exec")
