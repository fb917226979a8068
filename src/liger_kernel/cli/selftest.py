"""`liger-kernel selftest`: run every op on this device against fp64 on the CPU, and remember the verdict."""

from __future__ import annotations

import argparse
import time

import torch

from liger_kernel import backends, selftest, verdicts
from liger_kernel.cli import UserError


def run(arguments: argparse.Namespace) -> int:
    """Print a table; 1 where an op failed. An op that failed uses its torch pair from then on."""
    device = torch.device(arguments.device or backends.current().device_type)
    if not backends.device_of(device).is_available():
        raise UserError(f"there is no {device.type!r} device here")
    known = selftest.tested_ops()
    if unknown := sorted(set(arguments.ops or ()) - set(known)):
        raise UserError(f"unknown op {', '.join(unknown)}; known: {', '.join(known)}")
    begin = time.monotonic()
    try:
        found = list(selftest.run(device, arguments.ops))
    except RuntimeError as error:
        raise UserError(f"{error}\nStart again, with --ops and each other op, to test the rest") from None
    width = max(len(v.op) for v in found)
    print(f"{'op':{width}}  {'runs':8} {'cases':>5}  {'error / allowed':>15}  verdict")
    for v in found:
        verdict = "passed" if v.error is None else f"FAILED: {v.error}"
        print(f"{v.op:{width}}  {v.source:8} {v.cases:5}  {v.worst:15.2f}  {verdict}")
    failed = [v.op for v in found if v.error is not None]
    file = verdicts.keep(device.type, {v.op: v.error for v in found})
    print(f"\n{verdicts.key_of(device.type)}")
    skipped = sum(v.skipped for v in found)
    print(f"{len(found) - len(failed)} of {len(found)} ops passed {sum(v.cases for v in found)} cases in "
          f"{time.monotonic() - begin:.0f} s, {skipped} cases left out for time; kept in {file}")  # fmt: skip
    if failed:
        print(f"{', '.join(failed)}: plain torch is used on this device until a self-test passes")
    return int(bool(failed))
