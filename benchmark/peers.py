"""How each peer is called for each op. A peer that has no such op is simply not listed.

Calls take the arguments of our contract's timed case and return what it differentiates.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

import torch


def ours(op: str, contract) -> Callable:
    return contract.call


def eager(op: str, contract) -> Callable:
    """The formula as transformers writes it."""
    return contract.reference


def compiled(op: str, contract) -> Callable:
    return torch.compile(contract.reference)


def liger(op: str, contract) -> Callable | None:
    """Upstream's functionals. They live under our import name, so ours is put away first."""
    for name in [m for m in sys.modules if m.split(".")[0] == "liger_kernel"]:
        del sys.modules[name]
    sys.path.insert(0, os.environ["LIGER_BENCH_PEERS"])
    functional = importlib.import_module("liger_kernel.transformers.functional")
    assert functional.__file__.startswith(os.environ["LIGER_BENCH_PEERS"]), "this is not the peer"
    calls = {
        "cross_entropy": lambda x, target, **o: functional.liger_cross_entropy(x, target, **o),
        "fused_add_rms_norm": lambda x, r, w, eps=1e-6, offset=0.0, casting_mode="llama": (
            functional.liger_fused_add_rms_norm(x, r, w, eps, offset, casting_mode, False)
        ),
        "fused_linear_cross_entropy": lambda h, w, t, *_, **o: functional.liger_fused_linear_cross_entropy(h, w, t),
        "geglu": lambda a, b, **o: functional.liger_geglu(a, b),
        "jsd": lambda x, t, **o: functional.liger_jsd(x, t),
        "layer_norm": lambda x, w, b, eps=1e-5: functional.liger_layer_norm(x, w, b, eps),
        "relu_squared": lambda x: functional.liger_relu_squared(x),
        "rms_norm": lambda x, w, eps=1e-6, offset=0.0, casting_mode="llama": functional.liger_rms_norm(
            x, w, eps, offset, casting_mode, False
        ),
        "rope": lambda q, k, cos, sin, **o: functional.liger_rope(q, k, cos, sin),
        "softmax": lambda x: functional.liger_softmax(x),
        "swiglu": lambda a, b, **o: functional.liger_swiglu(a, b),
    }
    return calls.get(op)


def quack(op: str, contract) -> Callable | None:
    if op == "rms_norm":
        rmsnorm = importlib.import_module("quack").rmsnorm
        return lambda x, w, eps=1e-6, **o: rmsnorm(x, w, eps=eps)
    if op == "fused_add_rms_norm":
        rmsnorm = importlib.import_module("quack").rmsnorm
        return lambda x, r, w, eps=1e-6, **o: rmsnorm(x, w, residual=r, eps=eps, prenorm=True)
    if op == "softmax":
        return importlib.import_module("quack").softmax
    if op == "cross_entropy":
        cross_entropy = importlib.import_module("quack").cross_entropy
        return lambda x, target, **o: cross_entropy(x, target, reduction="mean")
    return None


def cce(op: str, contract) -> Callable | None:
    """cut-cross-entropy at its default, which drops small gradients."""
    if op != "fused_linear_cross_entropy":
        return None
    linear_cross_entropy = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda h, w, t, *_, **o: linear_cross_entropy(h, w, t)


PEERS = {"ours": ours, "torch": eager, "compile": compiled, "liger": liger, "quack": quack, "cce": cce}
