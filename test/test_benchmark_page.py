"""docs/benchmarks.md says what benchmark/results say."""

import importlib
import json
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


SURROUNDINGS = dict(card="Card", torch="2", triton="3", commit="abc", date="2026-01-02T03:04", gpus=2, scaling={})


def _step(contender, processes, batch, seq, speed, **more):
    measured = {"tokens_per_s": speed, "peak_GiB": 70.5, "loss": [12.0, 11.25], "patched": "so"} if speed else {}
    row = {"contender": contender, "model": "m", "processes": processes, "batch": batch, "seq": seq}
    return row | measured | more


def _page(report, monkeypatch, folder, name, data):
    (folder / name).write_text(json.dumps(SURROUNDINGS | data))
    monkeypatch.setattr(report, "COMMITTED", folder)
    return report.page().splitlines()


def test_sharded_training_says_the_longest_sequence_and_who_is_faster(report, monkeypatch, tmp_path):
    rows = [
        _step("torch", 2, 1, 4096, 9000, checkpoint=True), _step("torch", 2, 1, 8192, 0, out_of_memory=True),
        _step("ours", 2, 1, 4096, 10000, checkpoint=True), _step("ours", 2, 1, 131072, 8000),
        _step("ours", 2, 2, 131072, 0, out_of_memory=True), _step("liger", 2, 1, 4096, 12500),
        {"contender": "liger", "model": "m", "processes": 2, "failed": "OSError: 5"},
    ]  # fmt: skip
    lines = _page(report, monkeypatch, tmp_path, "multi-fsdp2-m-x2-card.json", {"engine": "fsdp2", "rows": rows})
    start = lines.index("## m on 2 GPUs, FSDP2, bf16, AdamW, gradient checkpointing")
    assert lines[start + 6 :] == [
        "| torch | 2 | 1 x 4096 | 9,000 | 70.5 | 11.2500 | so |",
        "| torch | 2 | 1 x 8192 |  | | | out of memory |",
        "| ours | 2 | 1 x 4096 | 10,000 | 70.5 | 11.2500 | so |",
        "| ours | 2 | 1 x 131072 | 8,000 | 70.5 | 11.2500 | so |",
        "| ours | 2 | 2 x 131072 |  | | | out of memory |",
        "| liger | 2 | 1 x 4096 | 12,500 | 70.5 | 11.2500 | so |",
        "| liger | 2 |  |  | | | failed |",
        "",
        "Longest sequence: torch 4,096, ours 131,072, liger 4,096.",
        "",
        "Where a peer is faster:",
        "",
        "- 1 x 4096, GPUs 2: liger takes 80% of our time",
        "",
        "Not measured:",
        "",
        "- liger: OSError: 5",
        "",
        "Card, torch 2, triton 3, commit abc, 2026-01-02 (`multi-fsdp2-m-x2-card.json`)",
    ]


def test_replicated_training_says_how_it_scales(report, monkeypatch, tmp_path):
    rows = [_step("torch", 1, 4, 2048, 30000), _step("torch", 2, 4, 2048, 54000),
            _step("ours", 1, 4, 2048, 40000), _step("ours", 2, 4, 2048, 76000)]  # fmt: skip
    data = {"engine": "ddp", "rows": rows, "scaling": {"torch": 0.9, "ours": 0.95}}
    lines = _page(report, monkeypatch, tmp_path, "multi-ddp-m-x2-card.json", data)
    start = lines.index("## m on 2 GPUs, DDP, bf16, AdamW")
    assert lines[start + 6 : start + 12] == [
        "| torch | 1 | 4 x 2048 | 30,000 | 70.5 | 11.2500 | so |",
        "| torch | 2 | 4 x 2048 | 54,000 | 70.5 | 11.2500 | so |",
        "| ours | 1 | 4 x 2048 | 40,000 | 70.5 | 11.2500 | so |",
        "| ours | 2 | 4 x 2048 | 76,000 | 70.5 | 11.2500 | so |",
        "",
        "Tokens/s of 2 GPUs, of 2 times those of one: torch 90%, ours 95%.",
    ]
    assert "Where a peer is faster:" not in lines
