"""The documents say what the code does."""

import re
from pathlib import Path

import pytest

from liger_kernel.transformers.models import MODELS

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
READMES = ("README.md", "README.zh-CN.md")


def test_every_environment_variable_is_documented_and_every_documented_one_exists():
    source = "".join(p.read_text() for p in (ROOT / "src").rglob("*.py"))
    used = set(re.findall(r'"(LIGER_[A-Z0-9_]+)(?<!_ENV)"', source))
    named = set(re.findall(r"^\| `(LIGER_[A-Z0-9_]+)", (ROOT / "docs/environment.md").read_text(), re.MULTILINE))
    assert used == {name for name in named if "_TEST_" not in name}
    elsewhere = "".join(p.read_text() for p in [ROOT / "Makefile", *(ROOT / "test").rglob("*.py")])
    assert all(name in elsewhere for name in named - used)


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
