"""benchmark/losses.py on tiny sizes: every contender that can be there, and none that computes something else."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRL = os.environ.get("LIGER_TEST_TRL")


@pytest.fixture
def losses(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    found = importlib.import_module("benchmark.losses")
    monkeypatch.setattr(found, "SAMPLES", (1, 1))
    return found


def small(losses, name):
    return losses.ROWS[name]._replace(**losses.SMALL)


@pytest.mark.parametrize("name", ["dpo", "orpo", "simpo", "kto", "grpo", "gspo", "grpo-long"])
def test_ours_is_timed_where_it_is_the_formula(losses, name):
    for contender in ("ours", "torch", "products"):
        assert losses.one(contender, small(losses, name), [])["ms"] > 0


def test_a_contender_that_computes_something_else_is_not_timed(losses, monkeypatch):
    monkeypatch.setattr(losses, "formula", lambda loss, of=losses.formula: lambda **given: of(loss)(**given) * 1.01)
    with pytest.raises(AssertionError, match="not close"):
        losses.one("ours", small(losses, "dpo"), [])


def test_a_peer_that_is_not_there_is_named(losses, tmp_path):
    for peer in ("liger", "trl"):
        with pytest.raises(SystemExit, match=f"no folder of --peers has a {peer}"):
            losses.one(peer, small(losses, "dpo"), [tmp_path])


def run(*more):
    command = [sys.executable, "-m", "benchmark.losses", "--device", "cpu", "--small", "--rows", "dpo,orpo", *more]
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(not TRL, reason="LIGER_TEST_TRL names no folder with TRL's versions")
def test_the_script_runs_each_contender_in_a_process_of_its_own():
    done = run("--against", "torch,compile,trl", "--peers", f"{TRL}/1.16")
    rows = [ast.literal_eval(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert not done.returncode, done.stdout + done.stderr
    whole = ["products", "torch", "compile", "trl", "ours"]
    assert [(r["loss"], r["contender"]) for r in rows] == [("dpo", c) for c in whole] + [
        ("orpo", c) for c in whole if c != "trl"
    ]
    assert all(r["ms"] > 0 for r in rows) and rows[3]["version"].startswith("1.16")


def test_a_row_that_is_not_known_is_refused():
    assert "expected of torch, compile, liger, trl, got quack" in run("--against", "quack").stderr
