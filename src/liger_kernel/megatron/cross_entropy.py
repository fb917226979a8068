"""Cross entropy in the place of Megatron-Core's vocab_parallel_cross_entropy and fused_vocab_parallel_cross_entropy."""

from __future__ import annotations

import torch

from liger_kernel.transformers.vocab_parallel_cross_entropy import LigerVocabParallelCrossEntropy


class LigerMegatronCrossEntropy(LigerVocabParallelCrossEntropy):
    """LigerVocabParallelCrossEntropy with Megatron-Core's label smoothing, on its tensor-parallel group."""

    def __init__(
        self,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "none",
        label_smoothing_formula: str = "megatron",
        label_smoothing_mode: str = "partition",
    ):
        super().__init__(ignore_index, label_smoothing, reduction, label_smoothing_formula, label_smoothing_mode)

    def forward(self, vocab_parallel_logits: torch.Tensor, target: torch.Tensor, tp_group=None) -> torch.Tensor:
        """vocab_parallel_logits: (S, B, V of this rank); target: (S, B). tp_group: None is Megatron-Core's, where it
        has one, else all ranks of the job. The loss is fp32."""
        return super().forward(vocab_parallel_logits, target, _megatron_group() if tp_group is None else tp_group)


def _megatron_group():
    try:
        from megatron.core import parallel_state
    except ImportError:
        return None
    return parallel_state.get_tensor_model_parallel_group() if parallel_state.model_parallel_is_initialized() else None
