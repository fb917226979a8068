"""A fake npu for this process, whose Triton lowers kernels as for an Ascend; skips where that cannot be had."""

import os
import tempfile

import pytest
import torch

import fake_device
from npu import ascend

WHY = ascend.cannot_lower() or fake_device.cannot_build() or ascend.cannot_run()

if WHY is None:
    if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share the folder of the process that started them
        CACHE = tempfile.TemporaryDirectory()
        os.environ["TRITON_CACHE_DIR"] = CACHE.name
    fake_device.install("npu", vector_core_num=ascend.CORES)
    ascend.install()


def pytest_collection_modifyitems(config, items):
    for item in items:
        if WHY is not None and "npu" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason=f"needs {WHY}"))


@pytest.fixture
def npu() -> torch.device:
    return torch.device("npu")
