"""Every op's contract on an npu, with its Triton pair as triton-ascend lowers it."""

import pytest
import torch

from liger_kernel import backends
from liger_kernel.ops import core
from test_contract import OPS, check, contract_of

from npu import ascend

# fp16 is left out: it takes the paths of bf16, and each kernel costs a second to lower and to build.
DTYPES = (torch.float32, torch.bfloat16)
# How often torch's own error: the lowered loops add a row one element after the other, where a core adds halves.
TIMES = 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_matches_reference(op, dtype, npu, poisoned_memory):
    assert core._has_triton_pair(op) is (core.resolve(op, "npu").source == "triton")
    for case in contract_of(op).cases(dtype, npu):
        check(op, case, dtype, TIMES)


def test_this_process_has_an_ascend():
    backend = backends.current()
    assert (backend.name, backend.device_type, backend.cores(torch.device("npu", 0))) == ("ascend", "npu", 48)


@pytest.mark.parametrize("arch, bits", [(ascend.ARCH, 1572864), ("Ascend950PR_9589", 2031616)])
def test_a_kernel_that_does_not_fit_the_buffer_is_refused(arch, bits, npu):
    """The check itself: a tile of 32768 columns takes more than a core has."""
    from liger_kernel.ops.kernels.blocks import RowTiles
    from liger_kernel.ops.kernels.softmax import softmax_forward

    ascend.install(after=lambda linalg, _: ascend.check(linalg, arch))
    try:
        with pytest.raises(Exception, match=f"ub overflow, requires [0-9]+ bits while {bits} bits available"):
            softmax_forward(torch.randn(1, 30000, device=npu), RowTiles(1, 32768, False, 1, 1))
    finally:
        ascend.install()


def test_a_wrong_kernel_is_seen(npu, monkeypatch):
    """The execution itself: half of the tiles left out, and the contract fails."""
    from liger_kernel.ops.kernels import softmax

    launch = softmax.launch
    monkeypatch.setattr(softmax, "launch", lambda kernel, programs, *args, **meta: launch(kernel, 0, *args, **meta))
    with pytest.raises(AssertionError, match="softmax"):
        check("softmax", contract_of("softmax").cases(torch.float32, npu)[0], torch.float32)
