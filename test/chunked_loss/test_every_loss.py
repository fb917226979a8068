"""What is asked of every loss of liger_kernel.chunked_loss, in its own cases and against its own formula."""

import inspect

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from chunked_loss import test_distillation_losses as distillation
from chunked_loss import test_dpo_loss as dpo
from chunked_loss import test_grpo_loss as grpo
from chunked_loss import test_preference_losses as preference
from liger_kernel import chunked_loss

from support_losses import assert_same, leaves

# Those whose effect is tested by a case of its own: a way to give the reference, and what is returned.
ELSEWHERE = {"use_ref_model", "return_soft_hard_loss", "loss_type", "importance_sampling_level"}
NO_EFFECT = {"compiled", "chunk_size"}  # docs/accepted-without-effect.md
EXERCISED = {"DPO": dpo.OPTIONS, "GRPO": grpo.OPTIONS}
EXERCISED |= {kind: own + preference.SHARED for kind, own in preference.OPTIONS.items()}
EXERCISED |= dict.fromkeys(("JSD", "CosineSimilarity"), distillation.OPTIONS)

COMPILED = [(dpo, "DPO", dict(loss_type=t)) for t in ("sigmoid", "bco_pair")]
COMPILED += [(dpo, "DPO", dict(softcap=2.0, logit_scale=0.3))]
COMPILED += [(grpo, "GRPO", dict(importance_sampling_level=level)) for level in ("token", "sequence")]
COMPILED += [(preference, kind, {}) for kind in preference.KINDS]
COMPILED += [(distillation, kind, o) for kind in distillation.CLASSES for o in (
    {}, dict(weight_soft_loss=0.0), dict(weight_hard_loss=0.2, temperature=2.0, softcap=2.0, teacher_logit_scale=0.3),
)]  # fmt: skip


@pytest.mark.parametrize("name", [n for n in chunked_loss.__all__ if n.endswith("Loss")])
def test_every_argument_of_a_constructor_is_held_against_the_formula(name):
    known = inspect.signature(getattr(chunked_loss, name).__init__).parameters.keys() - {"self"}
    options = EXERCISED[name.removeprefix("LigerFusedLinear").removesuffix("Loss")]
    exercised = {argument for option in options for argument in option}
    assert known - exercised - ELSEWHERE - NO_EFFECT == set(), "add a case to the OPTIONS of its test"


def traced(module, kind, options, device):
    """(the loss, its formula, what they are given)."""
    if module is preference:
        return module.fused(kind, **options), module.KINDS[kind](**options), module.case(kind, device)
    first = (kind,) if module is distillation else ()
    given = module.given.__wrapped__(device)
    return module.fused(*first, **options), module.formula(*first, **options), given


@pytest.mark.parametrize("module, kind, options", COMPILED, ids=str)
def test_compiles_without_a_graph_break(module, kind, options, device):
    graphs = []

    def counter(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    run, formula, given = traced(module, kind, options, device)
    torch._dynamo.reset()
    assert_same(torch.compile(run, backend=counter, fullgraph=True), formula, given)
    assert len(graphs) == 1


class Recorder(TorchDispatchMode):
    """The calls of our own ops."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "liger_kernel":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


# One loss for each way in which the ops are called.
CHECKED = [(dpo, "DPO", dict(softcap=2.0, logit_scale=0.3)), (grpo, "GRPO", dict(importance_sampling_level="token"))]
CHECKED += [c for c in COMPILED if c[0] is distillation]


@pytest.mark.parametrize("module, kind, options", CHECKED, ids=str)
def test_the_ops_of_a_compiled_loss_pass_opcheck(module, kind, options, device):
    """Those of its forward and of its backward, with the arguments that the loss calls them with."""
    run, _, given = traced(module, kind, options, device)
    recorder = Recorder()

    def backend(graph, example_inputs):
        def recorded(*inputs):  # not around the compiled call, which would not compile under a mode
            with recorder:
                return graph.forward(*inputs)

        return recorded

    torch._dynamo.reset()
    inputs = leaves(given, torch.float32)
    loss, _ = torch.compile(run, backend=backend, fullgraph=True)(**inputs)
    with recorder:
        torch.autograd.grad(loss, [inputs[name] for name in ("hidden", "weight", "bias")])
    ops = {func: args for func, args in recorder.calls}
    names = {func.name().removesuffix("_backward") for func in ops}
    assert names and len(ops) == 2 * len(names), "a forward and a backward of each"
    for func, args in ops.items():
        first = not func.name().endswith("_backward")  # the other has no gradient of its own
        args = [a.detach().clone().requires_grad_(first and a.requires_grad) if isinstance(a, torch.Tensor) else a
                for a in args]  # fmt: skip
        torch.library.opcheck(func, tuple(args))


@pytest.mark.gpu
@pytest.mark.parametrize("module, kind, options", COMPILED, ids=str)
def test_the_host_never_waits_for_the_device(module, kind, options, device):
    run, _, given = traced(module, kind, options, device)
    inputs = leaves(given, torch.bfloat16)

    def step():
        loss, _ = run(**inputs)
        return torch.autograd.grad(loss, [inputs[name] for name in ("hidden", "weight", "bias")])

    step()  # kernels are built
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)
