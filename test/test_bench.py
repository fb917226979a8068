"""The benchmark driver: it measures what it says, prints nothing of an op that is wrong, and keeps what it measured."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from liger_kernel import bench
from liger_kernel.bench import measure, model, peers, plot, process, profile, run, shapes, worker
from liger_kernel.ops.rms_norm import CONTRACT

CARD = {"copy_TB_s": 3.0, "gemm_TFLOP_s": 700.0}


def arguments(*given, output="."):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser, Path(output))
    return parser.parse_args(given)


def call(name="ours", op="rms_norm"):
    job = worker.Job(name, [op], shapes="tiny", samples=3, dtype="float32")
    return next(c for c in worker.calls(job) if c.label == "tiny")


@pytest.mark.parametrize("op", shapes.CALLS)
def test_every_op_of_a_model_is_timed_and_agrees_with_its_formula(op):
    one = call(op=op)
    for mode in bench.MODES:
        row = worker.timed(one, one.case(), mode)
        # fp32, summed in another order; what is wrong is off by far more
        assert row["error"] <= 1e-4 and row["event_ms"].samples == 3 and row["TB_s"] > 0
        assert ("TFLOP_s" in row) == (one.contract.flops is not None) == op.startswith("fused_linear_")


def test_bytes_of_a_forward_are_its_inputs_and_outputs():
    one = call()
    n = shapes.MODELS["tiny"].rows * shapes.MODELS["tiny"].hidden
    assert worker.timed(one, one.case(), "full")["bytes"] == 5 * n * 4
    assert worker.timed(one, one.case(), "fwd")["bytes"] == (2 * n + shapes.MODELS["tiny"].hidden) * 4


def test_a_peer_that_computes_something_else_is_not_timed(monkeypatch):
    wrong = lambda op, contract: lambda x, w, **o: contract.call(x, w, **o) * 1.05  # noqa: E731
    monkeypatch.setitem(peers.PEERS, "quack", wrong)
    one = call("quack")
    row = worker.timed(one, one.case(), "full")
    assert "differs from the formula by 0.05" in row["failed"] and "event_ms" not in row


def test_a_peer_that_writes_over_its_inputs_is_compared_with_fresh_ones(monkeypatch):
    class InPlace(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return CONTRACT.reference(x, w)

        @staticmethod
        def backward(ctx, dy):
            x, w = ctx.saved_tensors
            with torch.enable_grad():
                leaves = [t.detach().clone().requires_grad_() for t in (x, w)]
                dx, dw = torch.autograd.grad(CONTRACT.reference(*leaves), leaves, dy)
            x.detach().copy_(dx)
            return x.detach(), dw

    monkeypatch.setitem(peers.PEERS, "quack", lambda op, contract: InPlace.apply)
    one = call("quack")
    row = worker.timed(one, one.case(), "full")
    assert "failed" not in row and row["error"] <= 1e-5


def test_upstream_gradients_are_equal_whatever_the_layout_of_an_output():
    x = torch.empty(2, 3, 4)
    torch.manual_seed(1)
    plain = worker._random_like(x)
    torch.manual_seed(1)
    turned = worker._random_like(x.transpose(0, 2).contiguous().transpose(0, 2))
    assert torch.equal(plain, turned) and plain.stride() != turned.stride()


def test_an_op_whose_tests_fail_is_left_out(monkeypatch, capsys):
    said = (
        "FAILED test/test_contract.py::test_matches_reference[triton-fused_add_rms_norm] - Assertion\n"
        "FAILED test/transformers/test_rope.py::test_partial - Assertion\n"
    )
    done = types.SimpleNamespace(returncode=1, stdout=said, stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: done)
    assert run.green(["rms_norm", "fused_add_rms_norm", "rope", "swiglu"]) == ["rms_norm", "swiglu"]
    done.stdout = "no tests ran: conftest is broken"
    assert run.green(["rms_norm"]) == []
    assert "FAILED" in capsys.readouterr().out


def test_only_the_shapes_asked_for_are_timed():
    assert shapes.labels("rms_norm", CONTRACT, "8192x8192,tiny,1x1", False) == ["8192x8192", "tiny"]
    assert shapes.labels("rms_norm", CONTRACT, "", True) == list(shapes.TABLE["rms_norm"])
    for op, named in shapes.TABLE.items():
        contract = importlib.import_module(f"liger_kernel.ops.{op}").CONTRACT
        assert shapes.labels(op, contract, "", True) == list(named), "the table names a shape that the op has not"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["nope"], "there is no op 'nope'"),
        (["rms_norm", "--shapes", "1x1"], "has none of these shapes"),
        (["rms_norm", "--against", "jax"], "not 'jax'"),
        (["rms_norm", "--against", "liger"], "needs --peers"),
        (["rms_norm", "--modes", "sideways"], "not 'sideways'"),
        (["--model", "gpt-9"], "not 'gpt-9'"),
    ],
)
def test_what_cannot_be_done_is_said(given, says):
    with pytest.raises(process.Asked, match=says):
        run.main(arguments(*given, "--skip-tests"))


def test_the_whole_driver(tmp_path, monkeypatch, capsys):
    """One process for each contender; a package that is missing is a row that says so; JSON and PNG are written."""
    monkeypatch.setattr(measure, "ceilings", lambda samples: CARD)
    given = "rms_norm --shapes tiny --modes full --against torch,quack --samples 3 --skip-tests"
    assert run.main(arguments(*given.split(), output=tmp_path)) == 0
    (written,) = tmp_path.glob("ops-rms_norm-*.json")
    data = json.loads(written.read_text())
    assert [r["peer"] for r in data["rows"]] == ["ours", "torch", "quack"] and data["copy_TB_s"] == 3.0
    ours, torchs, quacks = data["rows"]
    assert ours["event_ms"]["samples"] == 3 and "failed" not in torchs
    if importlib.util.find_spec("quack") is None:
        assert "No module named 'quack'" in quacks["failed"]
    assert len(list(tmp_path.glob("rms_norm-*.png"))) == 1
    assert "ours takes" in capsys.readouterr().out


def test_nothing_is_started_when_time_is_up(tmp_path, monkeypatch):
    """Workers that began after the clock had stopped the others ran on without an end."""
    monkeypatch.setattr(measure, "ceilings", lambda samples: CARD)
    started = []
    monkeypatch.setattr(run, "Worker", lambda *job: started.append(job))
    given = "softmax --shapes tiny --against torch --skip-tests --seconds 1e-9"
    assert run.main(arguments(*given.split(), output=tmp_path)) == 0
    (written,) = tmp_path.glob("*.json")
    assert json.loads(written.read_text())["rows"] == [] and not started


@pytest.mark.skipif(not (process.REPOSITORY / ".git").exists(), reason="needs the repository's history")
def test_base_is_the_same_op_at_another_commit():
    before = subprocess.run(["git", "worktree", "list"], cwd=process.REPOSITORY, capture_output=True).stdout
    with process.base_folder("HEAD") as folder:
        assert (Path(folder) / "liger_kernel/ops/core.py").exists()
        job = worker.Job("base", ["softmax"], "tiny", modes=["fwd"], samples=2, folder=folder, dtype="float32")
        one = process.Worker(run.WORKER, job)
        one.ready()
        (row,) = one.rows()
        one.close()
    assert row["peer"] == "base" and "failed" not in row
    assert subprocess.run(["git", "worktree", "list"], cwd=process.REPOSITORY, capture_output=True).stdout == before
    with pytest.raises(process.Asked, match="no-such-ref"), process.base_folder("no-such-ref"):
        pass


def test_the_device_stays_what_it_was_when_another_liger_kernel_is_imported(tmp_path):
    """liger's tensors were on the CPU of a machine with a GPU: our backends could not be imported any more."""
    (tmp_path / "liger_kernel/ops").mkdir(parents=True)
    for package in ("liger_kernel", "liger_kernel/ops"):
        (tmp_path / package / "__init__.py").touch()
    code = (
        "from pathlib import Path; from liger_kernel import backends; from liger_kernel.bench import measure, peers;"
        f"kind = backends.current().device_type; peers.take_from(Path({str(tmp_path)!r}));"
        "backends.current = None; assert measure.device().type == kind"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_take_from_says_when_there_is_nothing_to_take(tmp_path):
    code = f"from pathlib import Path; from liger_kernel.bench import peers; peers.take_from(Path({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"there is no liger_kernel in {tmp_path}" in done.stderr


def test_builders_end_without_timing():
    one = process.Worker(run.WORKER, worker.Job("ours", ["softmax"], "tiny", only_build=True, dtype="float32"))
    assert list(one.rows()) == [] and one.process.returncode == 0
    one.close()


def test_a_worker_that_is_stopped_leaves_no_failure():
    one = process.Worker(run.WORKER, worker.Job("ours", []))
    cancel = process.stop_after(0.0, [one])
    one.ready()
    assert list(one.rows()) == []
    cancel()
    one.close()


def test_a_model_is_trained_and_its_memory_ends_the_longest_context(monkeypatch, capsys):
    monkeypatch.setattr(model, "FIRST_CONTEXT", 8)
    steps = model.Trainer.step

    def until_32(self, batch, seq):
        if seq == 32:
            raise torch.OutOfMemoryError
        return steps(self, batch, seq)

    monkeypatch.setattr(model.Trainer, "step", until_32)
    model.work(model.Job("ours", "tiny", 2, 8, steps=1, warmup=1, longest_context=True))
    rows = [json.loads(line[4:]) for line in capsys.readouterr().out.splitlines() if line.startswith("ROW ")]
    assert [r["seq"] for r in rows] == [8, 16, 32] and rows[-1]["out_of_memory"]
    assert rows[0]["patched"] == "9 modules patched" and len(rows[0]["loss"]) == 2


PEER = "def _apply_liger_kernel_to_instance(model):\n    {does}\n"


@pytest.mark.slow
@pytest.mark.parametrize("engine, sizes", [("fsdp2", [(1, 16), (1, 32), (2, 32)]), ("ddp", [(1, 16)] * 2)])
@pytest.mark.parametrize("peer", ["runs", "fails"])
def test_processes_train_together_and_their_rows_are_kept(engine, sizes, peer, tmp_path):
    upstream = tmp_path / "peer/liger_kernel"
    rooms = {".": "", "ops": "", "transformers": PEER.format(does="pass" if peer == "runs" else "raise OSError(5)")}
    for name, text in rooms.items():
        (upstream / name).mkdir(parents=True, exist_ok=True)
        (upstream / name / "__init__.py").write_text(text)
    command = [sys.executable, "-m", "benchmark.multi_gpu", engine, "--model", "tiny", "--tokens", "1x16"]
    command += ["--longest", "32", "--most", "64", "--steps", "1", "--warmup", "1", "--output", str(tmp_path)]
    path = f"{process.REPOSITORY / 'src'}{os.pathsep}{process.REPOSITORY}"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command += ["--peers", str(upstream.parent), *["--contenders", "liger"] * (peer == "fails")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (saved,) = tmp_path.glob(f"multi-{engine}-tiny-x2-*.json")
    data = json.loads(saved.read_text())
    processes = [1, 2] if engine == "ddp" else [2]
    if peer == "fails":
        assert [r["processes"] for r in data["rows"]] == processes and data["scaling"] == {}
        assert all(r["failed"] == "OSError: 5" for r in data["rows"])
        return
    contenders = ["torch", "ours", "liger"]
    assert [(r["contender"], r["batch"], r["seq"]) for r in data["rows"]] == [
        (c, *s) for c in contenders for s in sizes
    ]
    assert [r["processes"] for r in data["rows"]] == (processes * 3 if engine == "ddp" else [2] * 9)
    assert all(r["tokens_per_s"] > 0 and r["peak_GiB"] > 0 for r in data["rows"])
    plain, *others = (data["rows"][i : i + len(sizes)] for i in range(0, len(data["rows"]), len(sizes)))
    for rows in others:  # the same tokens and weights; fp32 in another order
        for one, other in zip(plain, rows, strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert [r["patched"] for r in others[1]] == ["upstream"] * len(sizes)
    assert list(data["scaling"]) == (contenders if engine == "ddp" else [])


def test_the_profile_counts_what_is_alive_at_the_peak():
    def event(action, addr, size, line):
        frames = [{"filename": "x/liger_kernel/ops/swiglu.py", "line": line, "name": "forward"}]
        return {"action": action, "addr": addr, "size": size, "frames": frames}

    events = [event("alloc", 1, 10, 1), event("alloc", 2, 5, 2), event("free_completed", 1, 10, 1),
              event("alloc", 1, 7, 3)]  # fmt: skip
    most, alive = profile._alive_at_peak(events)
    assert most == 15 and sorted(size for size, _ in alive.values()) == [5, 10]
    assert profile._owner(events[0]["frames"]) == "ops/swiglu.py:1 forward"


def test_no_picture_without_rows(tmp_path):
    assert not plot.save("rms_norm", [{"op": "rms_norm", "failed": "x"}], CARD, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
