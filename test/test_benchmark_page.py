"""docs/benchmarks.md says what benchmark/results say."""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_page_is_fresh(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    report = importlib.import_module("benchmark.report")
    assert report.PAGE.read_text() == report.page(), "run python -m benchmark.report"
