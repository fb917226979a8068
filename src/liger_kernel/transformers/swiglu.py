"""Gated MLPs with SiLU, as transformers builds them: same constructor arguments, same parameter names."""

from __future__ import annotations

import torch
from torch import nn

from liger_kernel.ops.fused_moe import LigerFusedMoEFunction
from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction, LigerSiLUMulFunction

_SILU = ("silu", "swish")


def _check(config, name: str = "hidden_act") -> None:
    if (activation := getattr(config, name)) not in _SILU:
        raise ValueError(f"{name} must be one of {sorted(_SILU)} for a SwiGLU MLP, got {activation!r}")


class LigerSwiGLUMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), x (..., hidden_size).

    Reads config.hidden_size, .intermediate_size (unless given), .hidden_act and, where it is there, .mlp_bias.
    forward uses gate_proj, up_proj and down_proj only, so it also serves as a forward of other classes that have them.
    Raises ValueError for a hidden_act other than SiLU.
    """

    _activation = "hidden_act"

    def __init__(self, config, intermediate_size: int | None = None):
        super().__init__()
        _check(config, self._activation)
        self.config = config
        self.hidden_size = config.hidden_size
        self.intermediate_size = config.intermediate_size if intermediate_size is None else intermediate_size
        bias = getattr(config, "mlp_bias", False)
        self.gate_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=bias)
        self.up_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(self.intermediate_size, self.hidden_size, bias=bias)

    def forward(self, x):
        return self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))


class LigerQwen3MoeSwiGLUMLP(LigerSwiGLUMLP):
    """LigerSwiGLUMLP under the name that mixtures of experts use for their dense and shared MLPs."""


class LigerSwiGLUMLPForMuseGlimmer(LigerSwiGLUMLP):
    """LigerSwiGLUMLP of Muse Glimmer, whose configuration names the activation hidden_activation."""

    _activation = "hidden_activation"

    def __init__(self, config):
        super().__init__(config)


class LigerHunyuanV1SwiGLUMLP(LigerSwiGLUMLP):
    """LigerSwiGLUMLP with HunYuan's constructor; layer_idx and is_shared_mlp change nothing, as in transformers."""

    def __init__(self, config, layer_idx: int | None = None, is_shared_mlp: bool = False):
        super().__init__(config)
        self.layer_idx = layer_idx


class LigerFalconH1SwiGLUMLP(LigerSwiGLUMLP):
    """down(silu(gate(x) * m0) * up(x)) * m1 with config.mlp_multipliers = (m0, m1)."""

    def __init__(self, config):
        super().__init__(config)
        self.gate_multiplier, self.down_multiplier = config.mlp_multipliers

    def forward(self, x):
        y = LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x), self.gate_multiplier)
        return self.down_proj(y) * self.down_multiplier  # after down_proj: its bias is scaled too


class LigerPhi3SwiGLUMLP(nn.Module):
    """LigerSwiGLUMLP with gate and up in one linear, gate_up_proj, the gate first. Raises as LigerSwiGLUMLP does."""

    def __init__(self, config):
        super().__init__()
        _check(config)
        self.config = config
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(LigerFusedGateUpSiLUMulFunction.apply(self.gate_up_proj(x)))


class LigerBlockSparseTop2MLP(nn.Module):
    """w2(silu(w1(x)) * w3(x)): one expert of Mixtral before transformers 5, and InternLM2's MLP."""

    def __init__(self, config):
        super().__init__()
        _check(config)
        self.ffn_dim = config.intermediate_size
        self.hidden_dim = config.hidden_size
        self.w1 = nn.Linear(self.hidden_dim, self.ffn_dim, bias=False)
        self.w2 = nn.Linear(self.ffn_dim, self.hidden_dim, bias=False)
        self.w3 = nn.Linear(self.hidden_dim, self.ffn_dim, bias=False)

    def forward(self, x):
        return self.w2(LigerSiLUMulFunction.apply(self.w1(x), self.w3(x)))


class LigerExperts(nn.Module):
    """The experts of a mixture as transformers 5 keeps them: gate_up_proj (E, 2 I, H), down_proj (E, H, I).

    E is config.num_local_experts, num_experts or n_routed_experts; I moe_intermediate_size, else intermediate_size.
    forward uses the two parameters only, so it also serves as a forward of other classes that have them.
    Raises ValueError for a hidden_act other than SiLU.
    """

    def __init__(self, config):
        super().__init__()
        _check(config)
        counts = (getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
        self.num_experts = next(count for count in counts if count is not None)
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        sizes = (2 * self.intermediate_dim, self.hidden_dim), (self.hidden_dim, self.intermediate_dim)
        made = [nn.Parameter(torch.empty(self.num_experts, *size)) for size in sizes]
        self.gate_up_proj, self.down_proj = made
        for parameter in made:
            nn.init.normal_(parameter, std=getattr(config, "initializer_range", 0.02))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        """hidden_states (T, H), the experts of each token and their weights (T, K) -> (T, H)."""
        weights = self.gate_up_proj, self.down_proj
        return LigerFusedMoEFunction.apply(hidden_states, *weights, top_k_index, top_k_weights)
