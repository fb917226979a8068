"""`liger-kernel env`: the report of liger_kernel.env_report."""

from __future__ import annotations

import argparse

from liger_kernel.env_report import print_env_report


def run(arguments: argparse.Namespace) -> int:
    print_env_report()
    return 0
