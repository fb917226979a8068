"""RMSNorm as modules: one class, and the flavours that models construct under names of their own."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from liger_kernel.ops.rms_norm import CASTING, LigerRMSNormFunction

INITS = {"ones": torch.ones, "zeros": torch.zeros}


class LigerRMSNorm(nn.Module):
    """RMSNorm of the last dimension, (..., hidden_size) -> the same shape and dtype (arXiv:1910.07467).

    The weight, offset + weight to be exact, is multiplied as casting_mode says: "llama" (after rounding to the input
    dtype), "gemma" (in fp32) or "none" (every step in the input dtype). in_place=True permits the backward to write
    over the incoming gradient. elementwise_affine=False has no weight. row_mode is accepted and has no effect.
    Raises ValueError for an unknown casting_mode or init_fn.
    """

    def __init__(
        self,
        hidden_size,
        eps=1e-6,
        offset=0.0,
        casting_mode="llama",
        init_fn="ones",
        in_place=True,
        row_mode=None,
        elementwise_affine=True,
    ):
        super().__init__()
        if init_fn not in INITS:
            raise ValueError(f"init_fn must be one of {sorted(INITS)}, got {init_fn!r}")
        if casting_mode not in CASTING:
            raise ValueError(f"casting_mode must be one of {sorted(CASTING)}, got {casting_mode!r}")
        self.weight = nn.Parameter(INITS[init_fn](hidden_size)) if elementwise_affine else None
        self.variance_epsilon = eps
        self.offset = offset
        self.casting_mode = casting_mode
        self.in_place = in_place
        self.row_mode = row_mode

    def forward(self, hidden_states):
        return LigerRMSNormFunction.apply(
            hidden_states,
            self.weight,
            self.variance_epsilon,
            self.offset,
            self.casting_mode,
            self.in_place,
            self.row_mode,
        )

    def extra_repr(self):
        shape = None if self.weight is None else tuple(self.weight.shape)
        return f"{shape}, eps={self.variance_epsilon}, offset={self.offset}, in_place={self.in_place}"


_RENAMED = {"dim": "hidden_size", "with_scale": "elementwise_affine"}
_AS_BASE = ("hidden_size", "eps", "offset", "casting_mode", "init_fn", "in_place", "row_mode")
_AS_GEMMA3 = ("dim", "eps", "offset", "casting_mode", "init_fn", "in_place")
_AS_GEMMA4 = (*_AS_GEMMA3, "with_scale")
_CENTRED: dict[str, Any] = {
    "offset": 1.0,
    "casting_mode": "gemma",
    "init_fn": "zeros",
}  # the weight is kept as its distance from 1


def _flavour(name: str, parameters: tuple[str, ...] = _AS_BASE, **defaults: Any) -> type[LigerRMSNorm]:
    """LigerRMSNorm whose constructor takes `parameters`, with `defaults` where they differ from LigerRMSNorm's."""
    base = inspect.signature(LigerRMSNorm.__init__).parameters
    own = [base["self"]]
    for parameter in parameters:
        known = base[_RENAMED.get(parameter, parameter)]
        own.append(known.replace(name=parameter, default=defaults.get(parameter, known.default)))
    signature = inspect.Signature(own)

    def __init__(self, *args, **kwargs):
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        LigerRMSNorm.__init__(**{_RENAMED.get(k, k): v for k, v in given.arguments.items()})

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    doc = f"LigerRMSNorm with other defaults: {', '.join(f'{k}={v!r}' for k, v in defaults.items())}."
    body = {"__init__": __init__, "__doc__": doc, "__module__": __name__, "__qualname__": name}
    return type(name, (LigerRMSNorm,), body)


LigerRMSNormForGemma = _flavour("LigerRMSNormForGemma", **_CENTRED)
LigerRMSNormForGemma2 = _flavour("LigerRMSNormForGemma2", in_place=False, **_CENTRED)
LigerRMSNormForGemma3 = _flavour("LigerRMSNormForGemma3", _AS_GEMMA3, in_place=False, **_CENTRED)
LigerRMSNormForGemma4 = _flavour("LigerRMSNormForGemma4", _AS_GEMMA4, in_place=False, casting_mode="gemma")
LigerRMSNormForOlmo2 = _flavour("LigerRMSNormForOlmo2", in_place=False)
LigerRMSNormForGlm4 = _flavour("LigerRMSNormForGlm4", in_place=False)
LigerRMSNormForQwen3Next = _flavour("LigerRMSNormForQwen3Next", in_place=False, **_CENTRED)
LigerRMSNormForMuseGlimmer = _flavour(
    "LigerRMSNormForMuseGlimmer", _AS_GEMMA4, dim=None, in_place=False, casting_mode="gemma"
)
LigerRMSNormForMuseGlimmerTextCentered = _flavour("LigerRMSNormForMuseGlimmerTextCentered", in_place=False, **_CENTRED)
