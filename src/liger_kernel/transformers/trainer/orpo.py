"""TRL's ORPO trainer over the fused head: the same loss and metrics, and no logits."""

from __future__ import annotations

import torch

from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss
from liger_kernel.transformers.fsdp import _FSDPForwardRedirection

try:
    try:
        from trl.trainer import ORPOTrainer
    except ImportError:  # since 0.29
        from trl.experimental.orpo import ORPOTrainer
except ImportError as error:
    raise ImportError(
        "Please `pip install trl` to use LigerORPOTrainer: there is no ORPOTrainer of TRL here"
    ) from error

_OUTCOMES = ("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected", "nll_loss", "rewards/chosen",
             "rewards/rejected", "log_odds_ratio", "log_odds_chosen")  # fmt: skip


class LigerORPOTrainer(ORPOTrainer):
    """TRL's ORPOTrainer with its arguments; the loss is LigerFusedLinearORPOLoss of the last hidden states.

    For decoders whose logits are their head's, scaled by config.logit_scale or config.logits_scaling and capped by
    config.final_logit_softcapping. The metrics logits/chosen and logits/rejected are over the answers' tokens. Raises
    ValueError for an encoder-decoder model and for a model that adds the losses of its routers.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        config = self.model.config
        if self.is_encoder_decoder or getattr(self, "aux_loss_enabled", False):
            raise ValueError("LigerORPOTrainer trains decoders only, without output_router_logits")
        self.orpo_loss = LigerFusedLinearORPOLoss(
            ignore_index=getattr(self, "label_pad_token_id", -100),
            beta=self.beta,
            softcap=getattr(config, "final_logit_softcapping", None),
            logit_scale=(getattr(config, "logit_scale", None) or 1.0)
            / (getattr(config, "logits_scaling", None) or 1.0),
        )

    def concatenated_forward(self, model, batch):
        """-> (loss, what LigerFusedLinearORPOLoss returns beside it), of the chosen and rejected rows of a batch."""
        options = {"label_pad_token_id": self.label_pad_token_id} if hasattr(self, "label_pad_token_id") else {}
        rows = self.concatenated_inputs(
            batch,
            is_encoder_decoder=False,
            padding_value=self.padding_value,
            device=self.accelerator.device,
            **options,
        )
        # inside the call of the wrapped model: there FSDP has the weights gathered, and DDP waits for gradients
        return _FSDPForwardRedirection()(
            model,
            self._loss,
            self.accelerator.unwrap_model(model),
            rows["concatenated_input_ids"],
            rows["concatenated_attention_mask"],
            rows["concatenated_labels"],
        )

    def _loss(self, model, input_ids, attention_mask, labels):
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        head = model.get_output_embeddings()
        hidden = model.base_model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state[:, :-1]
        # the NLL is over prompts too
        chosen = torch.where(attention_mask == 1, input_ids, self.orpo_loss.ignore_index)[: len(labels) // 2, 1:]
        return self.orpo_loss(head.weight, hidden, labels[:, 1:], getattr(head, "bias", None), chosen)

    def get_batch_loss_metrics(self, model, batch, train_eval="train"):
        """-> (loss, the metrics by name as TRL's trainer names them), the host waiting for the device once."""
        loss, outcomes = self.concatenated_forward(model, batch)
        found = dict(zip(_OUTCOMES, outcomes, strict=True))
        chosen, rejected = found["rewards/chosen"], found["rewards/rejected"]
        found |= {"rewards/accuracies": (chosen > rejected).float(), "rewards/margins": chosen - rejected}
        means = [self.accelerator.gather_for_metrics(value.detach()).float().mean() for value in found.values()]
        prefix = "eval_" if train_eval == "eval" else ""
        return loss, {prefix + name: value for name, value in zip(found, torch.stack(means).tolist(), strict=True)}
