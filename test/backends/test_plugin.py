"""A backend in a distribution of its own, built from the blocks of docs/backends.md and installed like any other."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fake_device

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/backends.md").read_text()

START = """
import torch, fake_device
fake_device.install("acme")
"""


def blocks() -> dict[str, str]:
    """File name -> contents, of every block that begins with its own name."""
    found = re.findall(r"```(?:python|toml)\n# (\S+)\n(.*?)```", PAGE, re.DOTALL)
    assert len(found) == PAGE.count("```python") + PAGE.count("```toml")
    return dict(found)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds the plug-in as pip installs it."""
    if why := fake_device.cannot_build():
        pytest.skip(why)
    fake_device.build()
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name, text in blocks().items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    wheel = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", wheel, str(target)],
        cwd=source / "acme-liger",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(target.glob("*.whl"))) as archive:
        archive.extractall(target)
    return source, target


def run(code, target, **environment):
    path = os.pathsep.join(map(str, (target, ROOT / "src", ROOT / "test")))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_plugin_runs_its_op_and_no_change_is_needed(installed):
    source, target = installed
    code = START + (source / "user.py").read_text()
    code += """
import acme_liger.relu_squared as own
from liger_kernel import backends
from liger_kernel.ops import core

assert core.kernels("relu_squared", x) is own.KERNELS
assert backends.current().name == "acme"
assert backends.available_impls("relu_squared") == ["acme", "triton", "torch"]
X = x.detach().cpu().double().requires_grad_()
h = X.relu() ** 2
(h * (h.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()).sum().backward()
print((x.grad.cpu() - X.grad).abs().max().item() < 1e-5)
"""
    assert run(code, target).strip() == "True"


def test_env_shows_the_plugin(installed):
    said = run(START + "from liger_kernel.cli import main; main(['env'])", installed[1])
    assert "acme: acme:0" in said and "relu_squared on acme: acme (the backend's own kernels)" in said


def test_the_plugin_passes_the_selftest(installed, tmp_path):
    code = START + "from liger_kernel.cli import main; main(['selftest', '--ops', 'relu_squared', 'softmax'])"
    said = run(code, installed[1], XDG_CACHE_HOME=str(tmp_path))
    assert re.search(r"relu_squared +acme .* passed", said) and "2 of 2 ops passed" in said


def test_a_plugin_that_cannot_be_imported_is_reported(installed, tmp_path):
    """The library works on, and says what is wrong."""
    broken = tmp_path / "site"
    shutil.copytree(installed[1], broken)
    (broken / "acme_liger/__init__.py").write_text("import no_such_package\n")
    said = run(START + "from liger_kernel.cli import main; main(['env'])", broken)
    assert "backend acme_liger could not be loaded: ModuleNotFoundError: No module named 'no_such_package'" in said


def test_a_backend_that_is_named_and_broken_raises(installed):
    code = (
        START
        + """
from liger_kernel.ops import core
core.set_impl("acme")
try:
    core.resolve("softmax", "cpu")
except RuntimeError as error:
    print(error)
"""
    )
    assert "runs on 'acme' devices and cannot run softmax on 'cpu'" in run(code, installed[1])
