"""What this installation is and which implementation runs each op; the text of `liger-kernel env`."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
from collections.abc import Iterator

import torch

from liger_kernel import backends
from liger_kernel._version import __version__
from liger_kernel.ops import EXPORTS, core

_PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "trl")


def print_env_report() -> None:
    """Print versions, devices, the implementation of each op and why, the variables in force, and warnings."""
    for title, lines in (
        ("Versions", versions()),
        ("Devices", devices()),
        ("Ops", ops()),
        ("Environment", variables()),
        ("Warnings", warnings()),
    ):
        print(title, *(f"  {line}" for line in lines), sep="\n")


def versions() -> Iterator[str]:
    yield f"liger_kernel  {__version__}  in {os.path.dirname(__file__)}"
    yield f"python        {platform.python_version()} on {platform.platform()}"
    for name in _PACKAGES:
        yield f"{name:12}  {_version(name) or 'not installed'}"


def devices() -> Iterator[str]:
    for backend in backends.all_backends().values():
        if not backend.is_available():
            yield f"{backend.name}: not here"
            continue
        count = getattr(torch.get_device_module(backend.device_type), "device_count", lambda: 1)()
        for index in range(count):
            device = torch.device(backend.device_type, index)
            yield f"{backend.name}: {device}, {backend.arch(device)}"


def ops() -> Iterator[str]:
    """One line per op: what runs it on this process's device, and why."""
    device_type = backends.current().device_type
    for op in EXPORTS:
        if not hasattr(importlib.import_module(f"liger_kernel.ops.{op}"), "TORCH"):
            continue  # a room of helpers that other rooms dispatch
        try:
            found = core.resolve(op, device_type)
        except (ImportError, RuntimeError, ValueError) as error:
            yield f"{op} on {device_type}: cannot run: {error}"
        else:
            yield f"{op} on {device_type}: {found.source} ({found.why})"


def variables() -> Iterator[str]:
    """The LIGER_* variables in force."""
    found = sorted(name for name in os.environ if name.startswith("LIGER_"))
    yield from (f"{name}={os.environ[name]}" for name in found)
    if not found:
        yield "no LIGER_* variable is set"


def warnings() -> Iterator[str]:
    found = [f"backend {module} could not be loaded: {why}" for module, why in backends.failures.items()]
    found += shadowing()
    yield from found or ["none"]


def shadowing() -> Iterator[str]:
    """Other distributions that install the import name `liger_kernel`: whichever came last overwrote the files."""
    names = importlib.metadata.packages_distributions().get("liger_kernel", [])
    for name in sorted({re.sub(r"[-_.]+", "-", n).lower() for n in names} - {"liger-kernel"}):
        yield f"the distribution {name} installs liger_kernel too: pip uninstall {name}, then reinstall liger-kernel"
    installed = _version("liger-kernel")
    if installed not in (None, __version__):
        yield f"the distribution liger-kernel is version {installed}, but the imported package is {__version__}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
