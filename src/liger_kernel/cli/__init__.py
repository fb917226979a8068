"""The command `liger-kernel`: demo, compare, bench, doctor, selftest, env; a subcommand imports what it needs."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from liger_kernel import bench
from liger_kernel._version import __version__


class UserError(Exception):
    """What the user can put right: printed as one sentence, exit code 2."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process) and return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        module = importlib.import_module(f"{__name__}.{arguments.command}")
        return module.run(arguments)
    except UserError as error:
        print(f"liger-kernel: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("liger_kernel"):
            raise
        print(
            f"liger-kernel: `{arguments.command}` needs the package `{error.name}`: pip install 'liger-kernel[train]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="liger-kernel", description="Fused kernels for LLM training.")
    parser.add_argument("--version", action="version", version=f"liger-kernel {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="demo | compare | bench | doctor | selftest | env"
    )

    demo = commands.add_parser("demo", help="train a small model on real text with and without the kernels")
    compare = commands.add_parser("compare", help="the same with your own model and data: what would you gain?")
    compare.add_argument("--model", required=True, help="local folder or hub id of a causal LM")
    compare.add_argument("--data", required=True, help="a .txt, .jsonl or .parquet file")
    compare.add_argument("--text-field", default="text", help="field of .jsonl and .parquet (default: text)")
    for command in (demo, compare):
        command.add_argument("--batch", type=count, help="sequences per step")
        command.add_argument("--seq", type=count, help="tokens per sequence")
        command.add_argument("--steps", type=count, help="optimiser steps of each run")
        command.add_argument("--device", help="torch device (default: the accelerator, else the CPU)")
        command.add_argument("--output", default=".", metavar="DIR", help="where the picture and the figures go")

    timing = commands.add_parser("bench", help="time the kernels, or a whole model's steps, beside torch and others")
    bench.add_arguments(timing, Path("liger-bench"))

    doctor = commands.add_parser("doctor", help="what would be patched in a model and what that saves, without weights")
    doctor.add_argument("model", help="local folder or hub id of a model, or a model type such as llama")
    doctor.add_argument("--batch", type=count, help="sequences per step of the estimate (default: 1)")
    doctor.add_argument("--seq", type=count, help="tokens per sequence of the estimate (default: 2048)")
    doctor.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    doctor.add_argument("--json", action="store_true", help="print the report and the estimate as JSON")

    selftest = commands.add_parser(
        "selftest", help="run every op on this device against fp64, and avoid those that fail"
    )
    selftest.add_argument("--device", help="torch device (default: the accelerator, else the CPU)")
    selftest.add_argument("--ops", nargs="+", metavar="OP", help="only these ops (default: all)")

    commands.add_parser("env", help="versions, devices, and which implementation runs each op")
    return parser


def count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
