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
    row = {"op": "rope", "shape": "4x8", "mode": "full"}
    ours = row | {"peer": "ours", "event_ms": timing, "graph_ms": None, "TB_s": 1.5, "extra_MiB": 3, "host_us": 41.2}
    rows = [ours, ours | {"peer": "liger", "event_ms": timing | {"median": 1.2}},
            row | {"peer": "torch", "failed": "RuntimeError"},
            {"op": "", "shape": "", "mode": "", "peer": "quack", "failed": "no module named quack"}]  # fmt: skip
    text = report.ops({"rows": rows, "copy_TB_s": 3.0})
    assert "| rope | 4x8 | full | 1.500 | 1.50 | 50% | 1.500 | 41 | 3 | 1.200 | failed |  | 0.80 |" in text
    assert "- rope 4x8 full: liger takes 80% of our time" in text
    assert "- quack: no module named quack" in text
    shape = {"model": "m", "batch": 8, "seq": 16}
    rows = [shape | {"contender": "hf", "out_of_memory": True}, {"contender": "liger", "failed": "ImportError"}]
    assert report.models({"rows": rows})[-2:] == [
        "| hf | 8 x 16 |  | | | out of memory |", "| liger | |  | | | failed |"
    ]  # fmt: skip


def test_losses_stand_in_a_table_for_each_size(report):
    long = {"loss": "grpo", "batch": 1, "seq": 64, "hidden": 8, "classes": 20}
    row = {"loss": "dpo", "batch": 8, "seq": 16, "hidden": 8, "classes": 10, "contender": "ours", "ms": 1.25, "MiB": 3}
    text = report.losses({"rows": [
        row, row | {"contender": "liger", "compiled": False}, long | {"contender": "torch", "out_of_memory": True}
    ]})  # fmt: skip
    assert [line for line in text if line.startswith("## ")] == [
        "## Losses over a fused head, 8x16 tokens, hidden size 8, 10 classes, bf16",
        "## Losses over a fused head, 1x64 tokens, hidden size 8, 20 classes, bf16",
    ]
    assert "| dpo | ours | 1.2 | 3 |" in text and "| grpo | torch | out of memory |  |" in text
    assert "| dpo | liger without its torch.compile, which failed | 1.2 | 3 |" in text
