"""Every op on the device that is here, forward and backward, against its own reference in fp64 on the CPU.

The cases are those of the ops' contracts: odd shapes, single elements, empty batches, long rows, every option.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from liger_kernel import verdicts
from liger_kernel.ops import EXPORTS, core

# Allowed on top of torch's own rounding error, relative to the largest value of the truth: a few units in the last
# place, because both round the same mathematics but not in the same order.
SLACK = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float64: 1e-13}
FLOOR = 1e-7  # where the truth is 0 and ours is what rounding leaves of two values that cancel

DTYPES = (torch.float32, torch.bfloat16)


@dataclass
class Verdict:
    """What was found of an op: the first error, or None where all its cases passed."""

    op: str
    source: str
    cases: int = 0
    skipped: int = 0  # cases there was no time for
    error: str | None = None
    worst: float = 0.0  # largest error found, in units of what is allowed


def tested_ops() -> list[str]:
    """The ops that have a contract."""
    return [op for op in EXPORTS if hasattr(importlib.import_module(f"liger_kernel.ops.{op}"), "CONTRACT")]


def run(device: torch.device, ops: list[str] | None = None, seconds: float = 45.0) -> Iterator[Verdict]:
    """Yield the verdict of each op, in no set order of cases: those left after `seconds` are skipped, and counted.

    Raises RuntimeError where the device itself stops working, since no later verdict would mean anything.
    """
    ops = tested_ops() if ops is None else ops
    begin = time.monotonic()
    with verdicts.ignored():
        core.forget()
        found = {op: Verdict(op, core.resolve(op, device.type).source) for op in ops}
        waiting = {op: list(cases_of(op, device)) for op in ops}
        for turn in itertools.count():  # a case of each op in turn, so that time runs out for all alike
            left = [op for op in ops if turn < len(waiting[op])]
            if not left:
                break
            for op in left:
                if turn and time.monotonic() - begin > seconds:
                    found[op].skipped += 1
                elif found[op].error is None:
                    try_case(found[op], waiting[op][turn], device)
        core.forget()
    yield from found.values()


def cases_of(op: str, device: torch.device) -> Iterator[tuple]:
    """(case, dtype), those that differ most first, on the CPU."""
    contract = importlib.import_module(f"liger_kernel.ops.{op}").CONTRACT
    with same_numbers():
        per_dtype = [contract.cases(dtype, torch.device("cpu")) for dtype in DTYPES]
    for i in spread(len(per_dtype[0])):
        for dtype, cases in zip(DTYPES, per_dtype):
            yield cases[i], dtype


@contextlib.contextmanager
def same_numbers() -> Iterator[None]:
    """Random numbers that are the same at every run, and a generator that is left as it was: a verdict repeats."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def spread(n: int) -> list[int]:
    """0 ... n - 1, in an order whose every beginning covers the whole range."""
    bits = max(n - 1, 1).bit_length()
    return [i for i in (int(f"{k:0{bits}b}"[::-1], 2) for k in range(1 << bits)) if i < n]


def try_case(verdict: Verdict, given: tuple, device: torch.device) -> None:
    case, dtype = given
    contract = importlib.import_module(f"liger_kernel.ops.{verdict.op}").CONTRACT
    shapes = [tuple(a.shape) for a in case.args if isinstance(a, torch.Tensor)]
    options = {k: v for k, v in case.kwargs.items() if not isinstance(v, torch.Tensor)}
    try:
        with same_numbers():
            *truths, upstream = call(contract.reference, case, dtype=torch.float64)
        *torchs, _ = call(contract.reference, case, upstream)
        *ours, _ = call(contract.call, on_device(case, device), upstream)
        for what, o, r, t in zip(("output", "gradient"), ours, torchs, truths):
            error, worst = disagreement(o, r, t, dtype)
            verdict.worst = max(verdict.worst, worst)
            if error:
                verdict.error = f"{what} {error}, for {dtype} {shapes} {options}"
                break
    except Exception as error:  # whatever a compiler or a driver raises is a verdict on the op
        verdict.error = f"{type(error).__name__}: {error}"[:500] + f", for {dtype} {shapes} {options}"
        try:
            torch.ones(8, device=device).sum().item()
        except Exception as dead:
            raise RuntimeError(f"{verdict.op} left {device} unusable: {verdict.error}") from dead
    verdict.cases += 1


def on_device(case: core.Case, device: torch.device) -> core.Case:
    there = lambda v: v.to(device) if isinstance(v, torch.Tensor) else v  # noqa: E731
    return core.Case(tuple(map(there, case.args)), {k: there(v) for k, v in case.kwargs.items()})


def differentiable(value) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def outputs_of(result) -> list:
    return list(result) if isinstance(result, tuple) else [result]


def call(fn, case: core.Case, upstream: list | None = None, dtype: torch.dtype | None = None) -> tuple:
    """Outputs, and the gradients of every floating argument, for random upstream gradients (made when None)."""
    leaves = [(a.detach().to(dtype or a.dtype).clone().requires_grad_() if differentiable(a) else a) for a in case.args]
    kwargs = {k: v.to(dtype) if dtype and differentiable(v) else v for k, v in case.kwargs.items()}
    outputs = [o for o in outputs_of(fn(*leaves, **kwargs)) if o is not None]
    grown = [o for o in outputs if o.requires_grad]
    if upstream is None:
        upstream = [torch.randn(o.shape, dtype=torch.float64, device="cpu") for o in grown]
    torch.autograd.backward(grown, [g.to(o) for g, o in zip(upstream, grown, strict=True)])
    return outputs, [a.grad for a in leaves if differentiable(a)], upstream


def disagreement(ours, torchs, truths, dtype: torch.dtype, times: int = 1) -> tuple[str | None, float]:
    """(what is wrong with ours, or None; its largest error in units of the allowed one).

    Allowed is `times` torch's own error against the fp64 truths, plus SLACK of the largest value.
    """
    worst = 0.0
    for i, (o, r, t) in enumerate(zip(ours, torchs, truths, strict=True)):
        if t is None:
            if o is not None and o.any():
                return f"{i}: a gradient where the reference has none", worst
            continue
        if o is None or o.shape != t.shape:
            return f"{i}: shape {None if o is None else tuple(o.shape)}, expected {tuple(t.shape)}", worst
        o, r = o.to(t.device), r.to(t.device)
        if not t.is_floating_point():
            if not torch.equal(o, r):
                return f"{i}: differs", worst
            continue
        if not t.numel():
            continue
        if o.isnan().any():
            return f"{i}: NaN, or an element was never written", float("inf")
        error, own = (o.double() - t).abs().max(), (r.double() - t).abs().max()
        allowed = times * own + SLACK[dtype] * t.abs().max() + FLOOR
        worst = max(worst, (error / allowed).item())
        if not error <= allowed:
            return f"{i}: error {error:.2e}, torch's own plus slack {allowed:.2e}", worst
    return None, worst
