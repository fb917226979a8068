"""docs/benchmarks.md says what benchmark/results say."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def report(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    return importlib.import_module("benchmark.report")


def test_page_is_fresh(report):
    assert report.PAGE.read_text() == report.page(), "run python -m benchmark.report"


def test_rows_that_failed_or_ran_out_of_memory_stand_in_the_tables(report):
    timing = {"median": 1.5, "low": 1.4, "high": 1.6, "samples": 40}
    row = {"op": "rope", "shape": "4x8", "peer": "liger", "mode": "full"}
    rows = [
        row | {"event_ms": timing, "graph_ms": None, "TB_s": None, "extra_MiB": 3},
        row | {"failed": "RuntimeError"},
    ]
    *_, measured, failed = report.ops({"rows": rows})
    assert measured == "| rope | 4x8 | full | liger |  |  | 1.500 | 3 |"
    assert failed == "| rope | 4x8 | full | liger | failed | | | |"
    shape = {"model": "m", "batch": 8, "seq": 16}
    rows = [shape | {"contender": "hf", "out_of_memory": True}, {"contender": "liger", "failed": "ImportError"}]
    assert report.models({"rows": rows})[-2:] == ["| hf | | | out of memory |", "| liger | | | failed |"]
