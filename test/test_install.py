"""What installing and importing the package costs and needs."""

import importlib.metadata
import os
import statistics
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import liger_kernel

ROOT = Path(__file__).parent.parent

# Makes packages look as if they were not installed.
WITHOUT = """
import importlib.machinery as machinery
find = machinery.PathFinder.find_spec
def missing(name, path=None, target=None):
    return None if name.split(".")[0] in {names!r} else find(name, path, target)
machinery.PathFinder.find_spec = staticmethod(missing)
"""


def run(code, **environment):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["liger-kernel", "liger_kernel"])
def test_metadata_resolves_under_both_spellings(name):
    assert importlib.metadata.version(name) == liger_kernel.__version__ == "0.8.50"


def test_version_passes_the_gates_of_other_projects():
    assert Version("0.8.2") <= Version(liger_kernel.__version__) < Version("0.9")


def test_importing_brings_neither_triton_nor_transformers():
    code = "import sys, liger_kernel, liger_kernel.ops, liger_kernel.transformers\n"
    loaded = run(code + "print([m for m in ('triton', 'transformers') if m in sys.modules])")
    assert loaded == "[]"


def test_importing_starts_no_device():
    code = "import liger_kernel.ops, liger_kernel.transformers, torch; print(torch.cuda.is_initialized())"
    assert run(code) == "False"


def test_imports_without_triton_and_transformers():
    code = WITHOUT.format(names=["triton", "transformers", "rich", "matplotlib", "tokenizers"])
    code += "import liger_kernel, liger_kernel.ops, liger_kernel.transformers, liger_kernel.utils, liger_kernel.cli\n"
    code += "import torch, liger_kernel.transformers.functional as f\n"
    code += "y = f.liger_rms_norm(torch.ones(2, 4), torch.ones(4), 0.0)\n"
    code += "print(y.sum().item(), liger_kernel.cli.main(['env']))"
    said = run(code).splitlines()
    assert said[-1] == "8.0 0"


def test_import_takes_under_0_3_s_beyond_torch():
    code = "import time, torch; start = time.process_time(); import liger_kernel, liger_kernel.transformers;"
    code += "print(time.process_time() - start)"
    seconds = [float(run(code)) for _ in range(3)]
    assert statistics.median(seconds) < 0.3, seconds  # processor time: other processes do not count


def test_wheel_is_pure_python_and_needs_only_torch_and_packaging(tmp_path):
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    source = tmp_path / "source"  # a build leaves files beside its sources
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    (source / "src").mkdir()
    subprocess.run(["cp", "-r", str(ROOT / "src/liger_kernel"), str(source / "src")], check=True)
    subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=source, check=True, capture_output=True, timeout=120
    )
    [wheel] = tmp_path.glob("*.whl")
    assert wheel.name == "liger_kernel-0.8.50-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [metadata] = [n for n in names if n.endswith(".dist-info/METADATA")]
        fields = message_from_bytes(archive.read(metadata))
    needed = [Requirement(r) for r in fields.get_all("Requires-Dist")]
    assert {r.name for r in needed if r.marker is None} == {"torch", "packaging"}
    assert fields["Name"] == "liger-kernel" and fields["License-Expression"] == "Apache-2.0"
    for file in ("liger_kernel/py.typed", "liger_kernel/transformers/__init__.pyi", "liger_kernel/ops/rms_norm.py"):
        assert file in names
    sources = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src/liger_kernel").rglob("*.py")}
    assert sources == {n for n in names if n.endswith(".py")}
