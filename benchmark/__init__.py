"""Benchmarks of the repository: `python -m benchmark.run`; `python -m benchmark.report` makes docs/benchmarks.md."""

import os
from pathlib import Path

COMMITTED = Path(__file__).parent / "results"
RESULTS = Path(os.environ.get("OUT", COMMITTED))  # where new measurements go
