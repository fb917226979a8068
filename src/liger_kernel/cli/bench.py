"""`liger-kernel bench`: the driver of liger_kernel.bench."""

from __future__ import annotations

import argparse

from liger_kernel.bench import run as driver
from liger_kernel.cli import UserError


def run(arguments: argparse.Namespace) -> int:
    try:
        return driver.main(arguments)
    except driver.Asked as error:
        raise UserError(str(error)) from None
