"""Plain formulas of the alignment losses on whole logits, and how the fused ones are held against them."""

import torch
from torch.nn.functional import linear

# Of the largest value: some ten roundings of fp32, for sums over tokens, vocabulary and hidden width in another order.
FP32 = 1e-5


def token_logps(hidden, weight, bias, target, live, softcap=None, logit_scale=1.0, temperature=1.0):
    """(log-probabilities (B, L), 0 where not live; the logits)."""
    z = linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    picked = z.log_softmax(-1).gather(-1, target.where(live, 0)[..., None]).squeeze(-1)
    return picked.masked_fill(~live, 0.0), z


def leaves(given, dtype, names=("hidden", "weight", "bias")):
    """Copies of the tensors in dtype; those named take gradients."""
    copies = {}
    for name, value in given.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value = value.detach().to(dtype).clone().requires_grad_(name in names)
        copies[name] = value
    return copies


def outcome(run, given, dtype, upstream=1.7):
    """(loss, metrics, gradients of hidden, weight and bias for an upstream gradient)."""
    inputs = leaves(given, dtype)
    loss, metrics = run(**inputs)
    wanted = [inputs[name] for name in ("hidden", "weight", "bias") if inputs.get(name) is not None]
    return loss.detach(), metrics, torch.autograd.grad(loss * upstream, wanted)


def assert_close(ours, truth, what, rtol=FP32, floor=1e-2, own=None):
    """own: the formula in fp32; where it is further off than rtol, twice its error: another draw of its noise."""
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    assert not ours.isnan().any(), f"{what}: NaN"
    if ours.numel():
        error, size = (ours.double() - truth.double()).abs().max().item(), truth.abs().max().item()
        allowed = rtol * max(size, floor)
        if error > allowed and own is not None:
            allowed = max(allowed, 2 * (own().double() - truth.double()).abs().max().item())
        assert error <= allowed, f"{what}: error {error:.2e} of {size:.2e}, {allowed:.2e} allowed"


def assert_same(run, formula, given, rtol=FP32):
    """Loss, every metric and every gradient of an fp32 run are those of the formula in fp64."""
    truth, found = outcome(formula, given, torch.float64), outcome(run, given, torch.float32)
    assert_close(found[0], truth[0], "loss", rtol, own=lambda: outcome(formula, given, torch.float32)[0])
    assert len(found[1]) == len(truth[1])
    for i, (ours, other) in enumerate(zip(found[1], truth[1], strict=True)):
        assert not ours.requires_grad
        assert_close(ours, other.detach(), f"metric {i}", rtol, floor=1.0)  # means and sums of logits cancel
    for i, (ours, other) in enumerate(zip(found[2], truth[2], strict=True)):
        assert_close(ours, other, f"gradient {i}", rtol)


# MiB for the logits of the cases here, and what they lead to.
BUDGETS = {"one group": "", "several groups": "0.02", "nothing fits": "0.0001"}


# A rounding of the result, of the largest value.
SLACK = {torch.bfloat16: 8e-3, torch.float16: 1e-3}


def assert_as_good_as_torch(run, formula, given, dtype, floor=0.0):
    """Loss, metrics and gradients in a dtype are as near the formula's in fp64 as the formula's in that dtype."""
    truth = outcome(formula, given, torch.float64)
    ours, torchs = outcome(run, given, dtype), outcome(formula, given, dtype)
    for o, t, r in zip(*((value[0], *value[1], *value[2]) for value in (ours, torchs, truth)), strict=True):
        error, own = (o.double() - r).abs().max(), (t.double() - r).abs().max()
        assert error <= own + SLACK[dtype] * max(r.abs().max(), floor), f"{error:.2e}, torch's own {own:.2e}"
