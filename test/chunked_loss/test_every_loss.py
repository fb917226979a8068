"""What is asked of every loss of liger_kernel.chunked_loss, in its own cases and against its own formula."""

import inspect

import pytest
import torch

from chunked_loss import test_distillation_losses as distillation
from chunked_loss import test_dpo_loss as dpo
from chunked_loss import test_grpo_loss as grpo
from chunked_loss import test_preference_losses as preference
from liger_kernel import chunked_loss

from support_losses import assert_same

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


@pytest.mark.parametrize("module, kind, options", COMPILED, ids=str)
def test_compiles_without_a_graph_break(module, kind, options, device):
    graphs = []

    def counter(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    if module is preference:
        run, formula, given = module.fused(kind, **options), module.KINDS[kind](**options), module.case(kind, device)
    else:
        first = (kind,) if module is distillation else ()
        run, formula = module.fused(*first, **options), module.formula(*first, **options)
        given = module.given.__wrapped__(device)
    torch._dynamo.reset()
    assert_same(torch.compile(run, backend=counter, fullgraph=True), formula, given)
    assert len(graphs) == 1
