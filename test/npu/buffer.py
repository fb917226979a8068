"""Lower every kernel launch of an op's steps for an Ascend, at the sizes of real models, and check that it fits.

The ops are called on meta tensors, so nothing runs and nothing is allocated.

    python test/npu/buffer.py Ascend910B2 Ascend950PR_9589 [--ops rms_norm]
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator

os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()  # what is kept there does not run

import torch  # noqa: E402

from liger_kernel import backends  # noqa: E402
from liger_kernel.ops import EXPORTS, core  # noqa: E402

from npu import ascend  # noqa: E402

HIDDEN = (64, 128, 576, 1024, 2048, 4096, 5120, 8192, 16384)
INTERMEDIATE = (14336,)
VOCABULARY = (32000, 128256, 151936, 262144)

# Where the last dim of an op's inputs is a hidden size, an intermediate size, or a vocabulary.
WIDTHS = {
    "rms_norm": HIDDEN, "fused_add_rms_norm": HIDDEN, "layer_norm": HIDDEN, "gated_rms_norm": HIDDEN,
    "swiglu": INTERMEDIATE, "geglu": INTERMEDIATE, "relu_squared": INTERMEDIATE,
    "poly_norm": HIDDEN + INTERMEDIATE, "dyt": HIDDEN, "embedding": HIDDEN,
    "cross_entropy": VOCABULARY, "softmax": VOCABULARY, "jsd": VOCABULARY, "kl_div": VOCABULARY, "tvd": VOCABULARY,
    "sparsemax": VOCABULARY, "fused_ce_tvd": VOCABULARY,
}  # fmt: skip

VECTOR_INT64 = re.compile(r"arith\.(?:addi|subi|muli|divsi|remsi|cmpi)\b[^\n]*tensor<([0-9x]+)xi64>")
FEW = 64  # 64-bit numbers of a tile: where its rows or heads begin


def is_many(shape: str) -> bool:
    return math.prod(map(int, shape.split("x"))) > FEW


def cases_of(op: str, dtype: torch.dtype) -> Iterator[tuple[str, core.Case]]:
    """The op's timed shapes, and its first one at the widths of real models."""
    contract, meta = importlib.import_module(f"liger_kernel.ops.{op}").CONTRACT, torch.device("meta")
    timed = contract.timed(dtype, meta)
    yield from timed.items()
    first = next(iter(timed.values()))
    for width in WIDTHS.get(op, ()):
        yield f"width {width}", resized(first, width)
    if op == "fused_linear_cross_entropy":  # whose backward computes the logits again, in slabs
        yield "loss of each row", core.Case(first.args, first.kwargs | {"reduction": "none"})


def resized(case: core.Case, width: int) -> core.Case:
    """The same call with rows of another width."""
    before = case.args[0].shape[-1]

    def fit(value):
        if isinstance(value, torch.Tensor) and value.dim() and value.shape[-1] == before:
            return value.new_empty(*value.shape[:-1], width)
        return value

    return core.Case(tuple(map(fit, case.args)), {k: fit(v) for k, v in case.kwargs.items()})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arch", nargs="+")
    parser.add_argument("--ops", default=",".join(EXPORTS))
    arguments = parser.parse_args()
    launched: list[tuple[str, str, str | None]] = []

    def after(linalg, arch):
        """Check for every arch, and let the step go on whatever is found."""
        name = re.search(r"func\.func @(\w+)", linalg)[1]
        launched.extend((name, a, ascend.check(linalg, a)) for a in arguments.arch)

    ascend.install(runs=False, after=after)
    ascend.watch_lowering(lambda ir: wide.extend(filter(is_many, VECTOR_INT64.findall(ir))))
    wide: list[str] = []
    backends._BY_TYPE["meta"] = dataclasses.replace(
        backends.all_backends()["ascend"], device_type="meta", cores=lambda device: ascend.CORES,
        why_no_triton=lambda: None, guard=backends.Backend.guard,
    )  # fmt: skip
    failed = slow = total = 0
    for op in arguments.ops.split(","):
        room = importlib.import_module(f"liger_kernel.ops.{op}")
        if not hasattr(room, "CONTRACT") or not core._has_triton_pair(op):
            continue
        for dtype in (torch.bfloat16, torch.float32):
            for label, case in cases_of(op, dtype):
                launched.clear(), wide.clear()
                leaves = [a.requires_grad_() if getattr(a, "is_floating_point", bool)() else a for a in case.args]
                outputs = room.CONTRACT.call(*leaves, **case.kwargs)
                grown = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,))
                         if o is not None and o.requires_grad]  # fmt: skip
                torch.autograd.backward(grown, [torch.empty_like(o) for o in grown])
                for name, arch, complaint in launched:
                    total += 1
                    failed += complaint is not None
                    print(f"{op} {label} {dtype} {name} {arch}: {complaint or 'fits'}"[:400])
                if wide and all(a.numel() < 2**31 - 2**20 for a in leaves if isinstance(a, torch.Tensor)):
                    print(f"{op} {label} {dtype}: arithmetic on int64 vectors of {set(wide)}")
                    slow += 1
    print(f"{total} kernels checked, {failed} do not fit, {slow} calls with int64 vectors")
    return int(failed + slow > 0)


if __name__ == "__main__":
    sys.exit(main())
