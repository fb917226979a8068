"""Model shapes, each op's sizes in a model, and the shapes that docs/benchmarks.md compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from liger_kernel.ops.core import Case


@dataclass(frozen=True)
class Model:
    """Sizes of a causal LM, and the tokens of one step that its ops are timed at."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    type: str = "llama"
    batch: int = 4
    seq: int = 4096

    @property
    def rows(self) -> int:
        return self.batch * self.seq


MODELS = {
    "llama3-8b": Model(4096, 14336, 32, 32, 8, 128, 128256, tied=False),
    "llama3.2-1b": Model(2048, 8192, 16, 32, 8, 64, 128256, tied=True),
    "qwen3-0.6b": Model(1024, 3072, 28, 16, 8, 128, 151936, tied=True, type="qwen3"),
    "gemma2-9b": Model(3584, 14336, 42, 16, 8, 256, 256000, tied=True, type="gemma2"),
    "tiny": Model(64, 128, 2, 4, 2, 16, 512, tied=True, batch=2, seq=16),
}

# op -> the shapes of its contract that stand in the table; 128x1024 is small, so that what it takes is host time
TABLE = {
    "rms_norm": ("16384x4096", "8192x8192", "65536x1024", "1048576x128", "128x1024"),
    "fused_add_rms_norm": ("16384x4096",),
    "layer_norm": ("16384x4096",),
    "swiglu": ("8192x14336",),
    "geglu": ("8192x14336",),
    "rope": ("4x4096x(32+8)x128",),
    "softmax": ("8192x32768",),
    "cross_entropy": ("8192x128256",),
    "jsd": ("4096x128256",),
}


class Draw:
    """Random arguments of one dtype on one device."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def labels(self, rows: int, classes: int) -> torch.Tensor:
        return torch.randint(0, classes, (rows,), device=self.device)

    def log_probs(self, rows: int, classes: int) -> torch.Tensor:
        return self(rows, classes).mul_(3).log_softmax(-1)

    def table(self, seq: int, width: int) -> dict[str, torch.Tensor]:
        angle = torch.cat([torch.rand(1, seq, width // 2, device=self.device) * 6.3] * 2, -1)  # as models make it
        return {"cos": angle.cos().to(self.dtype), "sin": angle.sin().to(self.dtype)}

    def head(self, classes: int, width: int) -> torch.Tensor:
        return self(classes, width).div_(width**0.5)


def _rope(d: Draw, m: Model) -> Case:
    q, k = (d(m.batch, m.seq, heads, m.head_dim).transpose(1, 2) for heads in (m.heads, m.kv_heads))
    return Case((q, k), d.table(m.seq, m.head_dim))


# How a model calls each op.
CALLS: dict[str, Callable[[Draw, Model], Case]] = {
    "rms_norm": lambda d, m: Case((d(m.rows, m.hidden), d(m.hidden))),
    "fused_add_rms_norm": lambda d, m: Case((d(m.rows, m.hidden), d(m.rows, m.hidden), d(m.hidden))),
    "layer_norm": lambda d, m: Case((d(m.rows, m.hidden), d(m.hidden), d(m.hidden))),
    "swiglu": lambda d, m: Case((d(m.rows, m.intermediate), d(m.rows, m.intermediate))),
    "geglu": lambda d, m: Case((d(m.rows, m.intermediate), d(m.rows, m.intermediate))),
    "relu_squared": lambda d, m: Case((d(m.rows, m.intermediate),)),
    "rope": _rope,
    "softmax": lambda d, m: Case((d(m.rows, m.vocabulary),)),
    "cross_entropy": lambda d, m: Case((d(m.rows, m.vocabulary), d.labels(m.rows, m.vocabulary))),
    "jsd": lambda d, m: Case((d.log_probs(m.rows, m.vocabulary), d.log_probs(m.rows, m.vocabulary))),
    "kl_div": lambda d, m: Case(
        (d.log_probs(m.rows, m.vocabulary),), {"target": d.log_probs(m.rows, m.vocabulary).exp()}
    ),
    "fused_linear_cross_entropy": lambda d, m: Case(
        (d(m.rows, m.hidden), d.head(m.vocabulary, m.hidden), None), {"target": d.labels(m.rows, m.vocabulary)}
    ),
    "fused_linear_scaled_cross_entropy": lambda d, m: Case(
        (d(m.rows, m.hidden), d.head(m.vocabulary, m.hidden), None), {"target": d.labels(m.rows, m.vocabulary)}
    ),
}


def labels(op: str, contract, asked: str, table: bool) -> list[str]:
    """The shapes of an op to time: those asked for that it has, those of the table, or all of its contract."""
    known = list(contract.timed(torch.bfloat16, torch.device("meta")))
    if table:
        return [label for label in TABLE.get(op, ()) if label in known]
    wanted = [label for label in asked.split(",") if label]
    return [label for label in wanted if label in known or label in MODELS and op in CALLS] if wanted else known


def case_of(op: str, contract, label: str, dtype: torch.dtype, device: torch.device) -> Case:
    """The arguments of one call; the same at every call."""
    torch.manual_seed(0)
    if label in MODELS:
        return CALLS[op](Draw(dtype, device), MODELS[label])
    return contract.timed(dtype, device)[label]
