"""liger_kernel.functional, and the small modules beside the ops."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import liger_kernel
from liger_kernel import functional as ours
from liger_kernel.ops import core
from liger_kernel.transformers import functional as named


def calls():
    x, y = (torch.randn(6, 8) for _ in range(2))
    w, b, big = torch.randn(8), torch.randn(8), torch.randn(10, 8)
    target = torch.tensor([1, 2, -100, 0, 9, 4])
    q = torch.randn(1, 2, 6, 8)
    p, log_q = torch.softmax(y, -1), torch.log_softmax(x, -1)
    log_p = torch.log_softmax(y, -1)
    return {
        "rms_norm": ((x, w), named.liger_rms_norm(x, w, 1e-6)),
        "layer_norm": ((x, w, b), named.liger_layer_norm(x, w, b, 1e-6)),
        "fused_add_rms_norm": ((x, y, w), named.liger_fused_add_rms_norm(x, y, w, 1e-6)),
        "softmax": ((x,), named.liger_softmax(x)),
        "swiglu": ((x, y), named.liger_swiglu(x, y)),
        "geglu": ((x, y), named.liger_geglu(x, y)),
        "rope": ((q, q, x[None], y[None]), named.liger_rope(q, q, x[None], y[None])),
        "kl_div": ((log_q, p), named.liger_kl_div(log_q, p, reduction="batchmean")),
        "jsd": ((log_q, log_p), named.liger_jsd(log_q, log_p)),
        "fused_linear_jsd": ((x, big, y, big), named.liger_fused_linear_jsd(x, big, y, big)),
        "cross_entropy": ((x @ big.t(), target), named.liger_cross_entropy(x @ big.t(), target)),
        "fused_linear_cross_entropy": ((x, big, target), named.liger_fused_linear_cross_entropy(x, big, target)),
    }


@pytest.mark.parametrize("name", ours.__all__)
def test_a_function_is_the_named_op_and_knows_its_implementations(name, monkeypatch):
    args, wanted = calls()[name]
    function = getattr(ours, name)
    keyword = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert keyword[-3:] == ["impl", "mode", "backend"]
    runs = core.resolve("rms_norm", args[0].device.type).source
    for chosen in ({}, dict(impl="auto"), dict(impl=runs), dict(backend=runs), dict(mode="auto")):
        torch.testing.assert_close(function(*args, **chosen), wanted)
    for bad, message in (
        (dict(impl="no_such_impl"), "'no_such_impl' is not one of"),
        (dict(mode="fast"), "mode must be"),
        (dict(impl="torch", backend="triton"), "two implementations"),
    ):
        with pytest.raises(ValueError, match=message):
            function(*args, **bad)


def test_an_implementation_that_a_call_cannot_choose_is_refused(device):
    x, w = torch.randn(2, 4, device=device), torch.ones(4, device=device)
    runs, other = ("torch", "triton") if device.type == "cpu" else ("triton", "torch")
    with pytest.raises(ValueError, match=rf"rms_norm runs on '{runs}' here: set_impl\('{other}'\)"):
        ours.rms_norm(x, w, impl=other)
    core.set_impl(other)
    try:
        ours.rms_norm(x, w, impl=other)
    finally:
        core.set_impl(None)


def test_older_names_of_the_dispatch():
    assert liger_kernel.functional is ours
    assert liger_kernel.get_backend is liger_kernel.get_impl and liger_kernel.set_backend is liger_kernel.set_impl
    assert liger_kernel.available_backends("rms_norm", "cpu") == liger_kernel.available_impls("rms_norm", "cpu")


def test_dispatch_names_what_runs_and_runs_it(device):
    from liger_kernel.backends import all_backends, dispatch, failures

    x, runs = torch.randn(3, 5, device=device), "torch" if device.type == "cpu" else "triton"
    assert torch.equal(dispatch.dispatch("softmax", x, impl=runs), named.liger_softmax(x))
    with pytest.raises(ValueError, match="'no_such_impl' is not one of"):
        dispatch.dispatch("softmax", x, backend="no_such_impl")
    with pytest.raises(ValueError, match="op_name must be one of"):
        dispatch.dispatch("no_such_op", x)
    assert dispatch.resolve_impl("softmax", device="cpu") == "torch"
    assert dispatch.resolve_impl("softmax", "triton", device.type) == "triton"
    assert {"torch", "triton"} <= set(dispatch.all_impls("softmax"))
    assert dispatch.available_impls("softmax", "cpu") == core.available_impls("softmax", "cpu")
    core.kernels("softmax", x)
    dispatch.clear_available_cache()
    assert not core._resolved
    with pytest.warns(UserWarning, match="softmax runs on 'torch' instead of 'cute': no such device"):
        dispatch.emit_fallback_warning("softmax", "cute", "torch", "no such device")
    assert "dispatch" not in all_backends() and not any("dispatch" in name for name in failures)


def test_kernels_are_cached_in_files_that_are_whole_or_absent(tmp_path, monkeypatch):
    from liger_kernel.triton import monkey_patch

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_MANAGER", "")
    monkey_patch.apply_liger_triton_cache_manager()
    from triton.runtime.cache import get_cache_manager

    cache = get_cache_manager("ABCD")
    assert type(cache) is monkey_patch.LigerTritonFileCacheManager
    assert cache.get_file("kernel.bin") is None
    path = cache.put(b"\0binary", "kernel.bin")
    assert path == cache.get_file("kernel.bin") and Path(path).read_bytes() == b"\0binary"
    cache.put("text", "kernel.bin", binary=False)
    assert Path(path).read_bytes() == b"text"
    child = cache.put_group("kernel", {"kernel.bin": path})
    assert cache.get_group("kernel") == {"kernel.bin": path} and child.endswith("__grp__kernel")

    def broken(*args):
        raise OSError("disk full")

    monkeypatch.setattr(monkey_patch.os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        cache.put(b"more", "other.bin")
    assert sorted(p.name for p in Path(path).parent.iterdir()) == ["__grp__kernel", "kernel.bin"]


def test_the_packages_import_no_triton():
    code = "import sys, liger_kernel.triton, liger_kernel.functional; print('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_redirection_is_where_older_axolotl_looks():
    from liger_kernel.transformers.fsdp import _FSDPForwardRedirection
    from liger_kernel.transformers.trainer import orpo_trainer

    assert orpo_trainer._FSDPForwardRedirection is _FSDPForwardRedirection


def test_without_trl_the_trainer_says_what_to_install(monkeypatch):
    from liger_kernel.transformers import trainer
    from liger_kernel.transformers.trainer import orpo_trainer

    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "liger_kernel.transformers.trainer.orpo", raising=False)
    for module in (trainer, orpo_trainer):
        with pytest.raises(ImportError, match="Please `pip install trl`"):
            module.LigerORPOTrainer  # noqa: B018
