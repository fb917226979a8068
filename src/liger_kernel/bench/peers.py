"""How each contender is called for each op. A contender that has no such op is simply not listed.

Calls take the arguments of our contract's timed case and return what it differentiates, in its order.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from liger_kernel.bench import measure


def take_from(folder: Path) -> None:
    """Import `liger_kernel` from `folder` from now on: upstream, or this library at another commit."""
    measure.device()  # which device there is can only be asked while our backends can be imported
    for name in [m for m in sys.modules if m.split(".")[0] == "liger_kernel" and ".bench" not in m]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    found = importlib.import_module("liger_kernel.ops").__file__ or ""
    if not found.startswith(str(folder)):
        raise ImportError(f"there is no liger_kernel in {folder}")


def ours(op: str, contract) -> Callable:
    return contract.call


def lean(op: str, contract) -> Callable | None:
    """Ours with the head's dW summed in bf16, as its peers do."""
    if op != "fused_linear_cross_entropy":
        return None
    return lambda *args, **options: contract.call(*args, accum_dtype=torch.bfloat16, **options)


def eager(op: str, contract) -> Callable:
    """The formula as transformers writes it."""
    return contract.reference


def compiled(op: str, contract) -> Callable:
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4096  # one per shape
    return torch.compile(contract.reference, dynamic=False)


def liger(op: str, contract) -> Callable | None:
    functional = importlib.import_module("liger_kernel.transformers.functional")
    calls: dict[str, Callable] = {
        "cross_entropy": lambda x, target, **o: functional.liger_cross_entropy(x, target, **o),
        "fused_add_rms_norm": lambda x, r, w, eps=1e-6, offset=0.0, casting_mode="llama": (
            functional.liger_fused_add_rms_norm(x, r, w, eps, offset, casting_mode, False)
        ),
        "fused_linear_cross_entropy": lambda h, w, bias=None, target=None, **o: (
            functional.liger_fused_linear_cross_entropy(h, w, target, bias)
        ),
        "geglu": lambda a, b, **o: functional.liger_geglu(a, b),
        "jsd": lambda x, t, **o: functional.liger_jsd(x, t),
        "kl_div": lambda x, target=None, **o: functional.liger_kl_div(x, target),
        "layer_norm": lambda x, w, b, eps=1e-6: functional.liger_layer_norm(x, w, b, eps),
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
    if op not in ("rms_norm", "fused_add_rms_norm", "softmax", "cross_entropy"):
        return None
    package = importlib.import_module("quack")
    calls: dict[str, Callable] = {
        "rms_norm": lambda x, w, eps=1e-6, **o: package.rmsnorm(x, w, eps=eps),
        "fused_add_rms_norm": lambda x, r, w, eps=1e-6, **o: package.rmsnorm(x, w, residual=r, eps=eps, prenorm=True),
        "softmax": lambda x: package.softmax(x),
        "cross_entropy": lambda x, target, **o: package.cross_entropy(x, target, reduction="mean"),
    }
    return calls[op]


def cce(op: str, contract) -> Callable | None:
    """cut-cross-entropy at its default, which drops small gradients."""
    if op != "fused_linear_cross_entropy":
        return None
    linear_cross_entropy = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda h, w, bias=None, target=None, **o: linear_cross_entropy(h, w, target)


def trl(op: str, contract) -> Callable | None:
    """TRL's log-probabilities of the labels, as its trainers take them from logits."""
    if op != "cross_entropy":
        return None
    selective_log_softmax = importlib.import_module("trl.trainer.utils").selective_log_softmax
    return lambda x, target, **o: -selective_log_softmax(x, target).mean()


PEERS = {"ours": ours, "base": ours, "torch": eager, "compile": compiled, "liger": liger, "quack": quack, "cce": cce,
         "trl": trl, "lean": lean}  # fmt: skip
COMPILED = {"ours", "lean", "base", "compile", "liger", "quack", "cce"}  # build kernels at the first call
