"""Benchmarks: `liger-kernel bench`, and `python -m benchmark.run` in the repository.

Importing this package imports no torch, so that the command line can read its arguments.
"""

from __future__ import annotations

import argparse
from pathlib import Path

CONTENDERS = ("torch", "compile", "liger", "quack", "cce", "trl", "lean")  # lean: ours, dW of the head summed in bf16
MODES = ("full", "fwd")


def add_arguments(parser: argparse.ArgumentParser, output: Path) -> None:
    """The driver's arguments; `output` is where results go when nothing is said."""
    parser.add_argument("ops", nargs="*", metavar="OP", help="rms_norm, swiglu, ...; none: the table of --table")
    parser.add_argument("--against", default="torch,compile", help=f"of {', '.join(CONTENDERS)} (default: %(default)s)")
    parser.add_argument("--base", metavar="GITREF", help="ours at another commit of this repository as well")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="folder with the peers' packages")
    parser.add_argument(
        "--shapes", default="", help="models (llama3-8b, ...) or shapes as the op lists them, by commas"
    )
    parser.add_argument("--table", action="store_true", help="only the shapes that docs/benchmarks.md compares")
    parser.add_argument("--modes", default=",".join(MODES), help="full: forward and backward; fwd: without gradients")
    parser.add_argument("--samples", type=int, default=30, help="timings of each call (default: %(default)s)")
    parser.add_argument("--seconds", type=float, help="stop after so many; what was measured is kept")
    parser.add_argument("--skip-tests", action="store_true", help="the ops' tests passed on this device a moment ago")
    parser.add_argument("--output", type=Path, default=output, metavar="DIR", help="for JSON and PNG (%(default)s)")
    whole = parser.add_argument_group("whole training steps, random weights")
    whole.add_argument("--model", help="llama3.2-1b, llama3-8b, qwen3-0.6b: train it instead of timing ops")
    whole.add_argument("--tokens", default="8x2048", help="batch x sequence length (default: %(default)s)")
    whole.add_argument("--ours", default="ours", help="ours, ours+compile or both, by commas")
    whole.add_argument("--checkpoint", action="store_true", help="gradient checkpointing")
    whole.add_argument("--no-optimizer", action="store_true", help="forward and backward only")
    whole.add_argument("--steps", type=int, default=8)
    whole.add_argument("--warmup", type=int, default=3)
    whole.add_argument("--longest-context", action="store_true", help="one sequence of 8k, 16k, ... until memory ends")
    whole.add_argument("--profile", action="store_true", help="where time and peak memory of a step of ours go")
