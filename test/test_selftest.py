"""`liger-kernel selftest`: what it finds, what it keeps, and what a failed op does afterwards."""

import dataclasses
import json
import warnings

import pytest
import torch

from liger_kernel import backends, selftest, verdicts
from liger_kernel.cli import main
from liger_kernel.ops import core
from liger_kernel.transformers import functional as F


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    core.forget()
    yield
    core.forget()


def test_every_op_passes_here_in_time(capsys, device):
    """The whole command: it tries every op, ends in under a minute, and keeps what it found."""
    assert main(["selftest"]) == 0
    said = capsys.readouterr().out
    for op in selftest.tested_ops():
        assert f"\n{op} " in said
    assert "FAILED" not in said and str(verdicts.cache_file()) in said
    [(key, kept)] = json.loads(verdicts.cache_file().read_text()).items()
    assert key == verdicts.key_of(device.type) and torch.__version__ in key
    assert kept == {op: None for op in selftest.tested_ops()}


def test_a_verdict_repeats_and_leaves_the_generator_alone(device):
    before = torch.get_rng_state()
    first, again = ([v.worst for v in selftest.run(device, ["softmax"])] for _ in range(2))
    assert first == again and first[0] > 0
    assert torch.equal(torch.get_rng_state(), before)


def broken(monkeypatch, room, device, spoil):
    """The default pair of a room, with its forward spoiled."""
    pair = core.resolve(room, device.type).kernels
    monkeypatch.setitem(core._resolved, (room, device.type), pair)
    forward = pair.forward
    object.__setattr__(pair, "forward", lambda *args, **kwargs: spoil(forward(*args, **kwargs)))
    return lambda: object.__setattr__(pair, "forward", forward)


def raises(result):
    raise RuntimeError("ptxas does not know this architecture")


@pytest.mark.parametrize(
    "spoil, error",
    [
        (lambda y: y * 1.001, "output 0: error"),
        (lambda y: y * float("nan"), "output 0: NaN"),
        (raises, "RuntimeError: ptxas"),
    ],
    ids=["wrong", "nan", "raises"],
)
def test_an_op_that_fails_runs_in_plain_torch_until_it_passes(spoil, error, monkeypatch, device, capsys):
    restore = broken(monkeypatch, "softmax", device, spoil)
    try:
        assert main(["selftest", "--ops", "softmax", "rope"]) == 1
    finally:
        restore()
    said = capsys.readouterr().out
    assert f"FAILED: {error}" in said and "softmax: plain torch is used" in said
    with pytest.warns(UserWarning, match=f"softmax failed.*{error}"):
        F.liger_softmax(torch.ones(2, 3, device=device))
        found = core.resolve("softmax", device.type)
    assert found.source == "torch" and error in found.why
    assert error not in core.resolve("rope", device.type).why
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert core.resolve("softmax", device.type, "torch").why == "asked for", "one that is asked for is obeyed"
    assert main(["selftest", "--ops", "softmax"]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.liger_softmax(torch.ones(2, 3, device=device))
    assert json.loads(verdicts.cache_file().read_text())[verdicts.key_of(device.type)] == {
        "softmax": None,
        "rope": None,
    }


def test_a_verdict_holds_for_one_driver_only(monkeypatch, device):
    verdicts.keep(device.type, {"softmax": "error 1"})
    assert verdicts.failure("softmax", device.type) == "error 1"
    backend = backends.device_of(device)
    monkeypatch.setitem(backends._BY_TYPE, device.type, dataclasses.replace(backend, driver=lambda device: "newer"))
    assert verdicts.failure("softmax", device.type) is None


def test_a_spoiled_cache_is_no_verdict(device):
    verdicts.cache_file().parent.mkdir(parents=True)
    verdicts.cache_file().write_text("{not json")
    assert verdicts.failure("softmax", device.type) is None
    verdicts.keep(device.type, {"softmax": None})
    assert verdicts.all_verdicts()[verdicts.key_of(device.type)] == {"softmax": None}


def test_time_runs_out_for_all_ops_alike(device):
    found = list(selftest.run(device, ["softmax", "relu_squared"], seconds=0.0))
    assert [v.cases for v in found] == [1, 1] and all(v.skipped > 1 for v in found)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 30])
def test_spread_takes_each_case_once_and_both_halves_early(n):
    assert sorted(selftest.spread(n)) == list(range(n))
    assert n < 4 or {i < n / 2 for i in selftest.spread(n)[:2]} == {True, False}


@pytest.mark.parametrize(
    "argv, says", [(["--ops", "nothing"], "unknown op nothing"), (["--device", "xpu"], "no 'xpu'")]
)
def test_what_cannot_be_tested_is_said(argv, says, capsys):
    if "xpu" in argv and torch.xpu.is_available():
        pytest.skip("there is one")
    assert main(["selftest", *argv]) == 2
    assert says in capsys.readouterr().err
