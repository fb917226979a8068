"""Tensors of more than 2^31 elements, and 131072 rows: the last rows are what they are alone.

The same check runs small on any machine, which shows that it can tell.
"""

import gc
import importlib

import pytest
import torch

from liger_kernel.bench.shapes import Draw

TAIL = 3
BIG = 2**31
LONG = 131072
NEEDED_GIB = 48  # of the largest case, forward and backward


class Rows:
    """An op on R rows: how to make its arguments, which of them have rows, and what else it is told."""

    def __init__(self, width, make, rows=(0,), mean=False, **options):
        self.width, self.make, self.rows, self.mean, self.options = width, make, rows, mean, options


OPS = {
    "rms_norm": Rows(4096, lambda d, r, n: (d(r, n), d(n))),
    "fused_add_rms_norm": Rows(4096, lambda d, r, n: (d(r, n), d(r, n), d(n)), rows=(0, 1)),
    "gated_rms_norm": Rows(4096, lambda d, r, n: (d(r, n), d(r, n), d(n)), rows=(0, 1)),
    "modulated_rms_norm": Rows(4096, lambda d, r, n: (d(r, n), d(n), d(r, n), d(r, n)), rows=(0, 2, 3)),
    "mhc_pre": Rows(4096, lambda d, r, n: (d(r, 4, n // 4), d(r, 4)), rows=(0, 1)),
    "mhc_post_res": Rows(4096, lambda d, r, n: (d(r, 4, n // 4), d(r, n // 4), d(r, 4), d(r, 4, 4)), rows=(0, 1, 2, 3)),
    "layer_norm": Rows(4096, lambda d, r, n: (d(r, n), d(n), d(n))),
    "softmax": Rows(4096, lambda d, r, n: (d(r, n),)),
    "swiglu": Rows(4096, lambda d, r, n: (d(r, n), d(r, n)), rows=(0, 1)),
    "geglu": Rows(4096, lambda d, r, n: (d(r, n), d(r, n)), rows=(0, 1)),
    "relu_squared": Rows(4096, lambda d, r, n: (d(r, n),)),
    "cross_entropy": Rows(128256, lambda d, r, n: (d(r, n), d.labels(r, n)), rows=(0, 1), reduction="none"),
    "jsd": Rows(128256, lambda d, r, n: (d.log_probs(r, n), d.log_probs(r, n)), rows=(0, 1), mean=True),
}


def gradients(op, args):
    contract = importlib.import_module(f"liger_kernel.ops.{op}").CONTRACT
    leaves = [a.detach().requires_grad_() if a.is_floating_point() else a for a in args]
    outputs = contract.call(*leaves, **OPS[op].options)
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o is not None and o.requires_grad]
    upstream = []
    for o in outputs:
        torch.manual_seed(5)
        tail = torch.randn(TAIL, *o.shape[1:], dtype=o.dtype, device=o.device) if o.dim() else None
        given = torch.ones_like(o)
        if o.dim():
            given[-TAIL:] = tail
        upstream.append(given)
    torch.autograd.backward(outputs, upstream)
    return outputs, [leaves[i].grad for i in OPS[op].rows if leaves[i].is_floating_point()]


def check(op, rows, device, width=None):
    """The last rows of a call on `rows` rows against a call on these alone."""
    form = OPS[op]
    args = form.make(Draw(torch.bfloat16, device), rows, width or form.width)
    last = [a[-TAIL:].clone() if i in form.rows else a for i, a in enumerate(args)]
    outputs, grads = gradients(op, args)
    found = [t[-TAIL:].clone() for t in (*outputs, *grads) if t is not None and t.dim()]
    del args, outputs, grads
    gc.collect()
    outputs, grads = gradients(op, last)
    wanted = [t for t in (*outputs, *grads) if t is not None and t.dim()]
    assert len(found) == len(wanted) > 0
    for f, w in zip(found, wanted, strict=True):
        if form.mean:  # of more rows: the same gradient, smaller, rounded to bf16 anew
            torch.testing.assert_close(f.float() * (rows / TAIL), w.float(), rtol=2 * 2**-7, atol=1e-6)
        else:
            assert torch.equal(f, w)


@pytest.mark.parametrize("op", OPS)
def test_rows_do_not_depend_on_how_many_there_are(op, device):
    check(op, 97, device, width=64)


def room_for(gib):
    return torch.cuda.mem_get_info()[0] > gib * 2**30 if torch.cuda.is_available() else False


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_more_than_2_to_the_31_elements(op, device):
    if not room_for(NEEDED_GIB):
        pytest.skip(f"needs {NEEDED_GIB} GiB of device memory")
    check(op, BIG // OPS[op].width + 5, device)
    torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_131072_rows(op, device):
    if not room_for(24):
        pytest.skip("needs 24 GiB of device memory")
    check(op, LONG, device, width=4096 if OPS[op].width == 4096 else 8192)
    torch.cuda.empty_cache()


@pytest.mark.gpu
def test_rotary_embedding_of_131072_positions_and_more_than_2_to_the_31_elements(device):
    if not room_for(NEEDED_GIB):
        pytest.skip(f"needs {NEEDED_GIB} GiB of device memory")
    rope = importlib.import_module("liger_kernel.ops.rope")
    d = Draw(torch.bfloat16, device)
    q, k = d(1, LONG, 130, 128).transpose(1, 2), d(1, LONG, 2, 128).transpose(1, 2)
    assert q.numel() > BIG
    table = d.table(LONG, 128)
    q_out, k_out = rope.CONTRACT.call(q, k, **table)
    last = {name: t[:, -TAIL:] for name, t in table.items()}
    for out, x in ((q_out, q), (k_out, k)):
        alone, _ = rope.CONTRACT.call(x[:, :, -TAIL:], x[:, :1, -TAIL:], **last)
        assert torch.equal(out[:, :, -TAIL:], alone)


@pytest.mark.gpu
def test_fused_head_of_131072_rows_and_more_than_2_to_the_31_logits(device):
    """The gradient of the last rows, and the loss, are those of the rows in two halves."""
    if not room_for(24):
        pytest.skip("needs 24 GiB of device memory")
    head = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    d = Draw(torch.bfloat16, device)
    x, w, y = d(LONG, 256).requires_grad_(), d.head(32768, 256), d.labels(LONG, 32768)
    loss = head.CONTRACT.call(x, w, None, target=y)
    loss.backward()
    half = LONG // 2
    z = x[half:].detach().requires_grad_()
    first = head.CONTRACT.call(x[:half].detach(), w, None, target=y[:half])
    second = head.CONTRACT.call(z, w, None, target=y[half:])
    second.backward()
    torch.testing.assert_close(loss, (first + second) / 2, rtol=1e-5, atol=0)  # sums of 131072 terms in fp32
    torch.testing.assert_close(x.grad[half:].float(), z.grad.float() / 2, rtol=2 * 2**-7, atol=1e-8)  # bf16, halved
