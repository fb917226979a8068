"""Gated MLPs with GELU, as transformers' Gemma family builds them."""

from __future__ import annotations

from torch import nn

from liger_kernel.ops.geglu import LigerGELUMulFunction

_APPROXIMATE = {"gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "gelu": "none"}


class LigerGEGLUMLP(nn.Module):
    """down(gelu(gate(x)) * up(x)), x (..., hidden_size), without biases.

    The GELU is the one config.hidden_activation names (config.hidden_act where that is absent or None).
    forward serves as a forward of other classes with gate_proj, up_proj and down_proj too, with the tanh GELU.
    Raises ValueError for another activation.
    """

    def __init__(self, config):
        super().__init__()
        name = getattr(config, "hidden_activation", None) or config.hidden_act
        if name not in _APPROXIMATE:
            raise ValueError(f"hidden_act must be one of {sorted(_APPROXIMATE)} for a GEGLU MLP, got {name!r}")
        self.approximate = _APPROXIMATE[name]
        self.config = config
        self.hidden_size = config.hidden_size
        self.intermediate_size = config.intermediate_size
        self.gate_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=False)
        self.up_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=False)
        self.down_proj = nn.Linear(self.intermediate_size, self.hidden_size, bias=False)

    def forward(self, x):
        approximate = getattr(self, "approximate", "tanh")
        return self.down_proj(LigerGELUMulFunction.apply(self.gate_proj(x), self.up_proj(x), approximate))


class LigerGEGLUMLPForGemma4(LigerGEGLUMLP):
    """LigerGEGLUMLP of Gemma 4: twice as wide in layers that reuse another's keys and values, if the config says so."""

    def __init__(self, config, layer_idx: int | None = None):
        super().__init__(config)
        if layer_idx is not None and getattr(config, "use_double_wide_mlp", False) and _reuses_kv(config, layer_idx):
            self.intermediate_size *= 2
            self.gate_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=False)
            self.up_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=False)
            self.down_proj = nn.Linear(self.intermediate_size, self.hidden_size, bias=False)


def _reuses_kv(config, layer_idx: int) -> bool:
    modes = getattr(config, "kv_sharing_modes", None)
    if modes is not None:
        return modes[layer_idx] == "reuse"
    first = config.num_hidden_layers - getattr(config, "num_kv_shared_layers", 0)  # older transformers
    return layer_idx >= first > 0
