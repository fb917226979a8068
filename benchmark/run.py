"""`python -m benchmark.run OP... [--against ...] [--base GITREF] [--shapes ...]`: the driver of liger_kernel.bench,
which writes to benchmark/results."""

from __future__ import annotations

import argparse
import sys

from benchmark import RESULTS
from liger_kernel import bench
from liger_kernel.bench import run


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="benchmark.run", description=run.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    bench.add_arguments(parser, RESULTS)
    try:
        return run.main(parser.parse_args())
    except run.Asked as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
