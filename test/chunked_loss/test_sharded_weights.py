"""A head weight of which its engine has left nothing or a part here is refused by the engine's name, by every loss."""

import pytest
import torch

from liger_kernel import chunked_loss as losses
from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD, functional

X, Y, V = torch.randn(4, 5, 8), torch.randint(0, 11, (4, 5)), 11
ROWS, LABELS, WHOLE = X.flatten(0, 1), Y.flatten(), torch.randn(V, 8)
ONES, ADVANTAGES, LIKED = torch.ones_like(Y), torch.randn(4), torch.tensor([True, False, True, False])


def empty():
    weight = torch.nn.Parameter(torch.empty(0))
    weight.ds_id = 0  # what DeepSpeed leaves at a parameter that it has taken away
    return weight


SHARDED = {"ZeRO-3": empty, "FSDP1": lambda: torch.nn.Parameter(torch.randn(40))}
CALLS = {
    "cross_entropy": lambda w: LigerFusedLinearCrossEntropyLoss()(w, ROWS, LABELS),
    "logprobs": lambda w: functional.liger_fused_linear_logprobs(X, w, Y),
    "vocab_parallel": lambda w: functional.liger_vocab_parallel_logprobs(X, w, Y),
    "dpo": lambda w: losses.LigerFusedLinearDPOLoss(use_ref_model=False)(w, X, Y),
    "dpo_reference": lambda w: losses.LigerFusedLinearDPOLoss()(WHOLE, X, Y, None, X, w),
    "orpo": lambda w: losses.LigerFusedLinearORPOLoss()(w, X, Y),
    "cpo": lambda w: losses.LigerFusedLinearCPOLoss()(w, X, Y),
    "simpo": lambda w: losses.LigerFusedLinearSimPOLoss()(w, X, Y),
    "kto": lambda w: losses.LigerFusedLinearKTOLoss(use_ref_model=False)(X, w, Y, None, LIKED),
    "grpo": lambda w: losses.LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)(X, w, Y, ONES, ADVANTAGES),
    "jsd": lambda w: LigerFusedLinearJSD()(ROWS, w, ROWS, WHOLE, None),
    "jsd_teacher": lambda w: LigerFusedLinearJSD()(ROWS, WHOLE, ROWS, w, None),
    "distillation": lambda w: losses.LigerFusedLinearJSDLoss()(ROWS, w, ROWS, WHOLE, LABELS),
    "distillation_teacher": lambda w: losses.LigerFusedLinearJSDLoss()(ROWS, WHOLE, ROWS, w, LABELS),
    "cosine": lambda w: losses.LigerFusedLinearCosineSimilarityLoss()(ROWS, w, ROWS, WHOLE, LABELS),
}


@pytest.mark.parametrize("engine", SHARDED)
@pytest.mark.parametrize("loss", CALLS)
def test_a_weight_that_is_not_here_is_refused_by_its_engines_name(loss, engine):
    CALLS[loss](WHOLE)  # so that what is refused is the weight
    with pytest.raises(ValueError, match=engine):
        CALLS[loss](SHARDED[engine]())
