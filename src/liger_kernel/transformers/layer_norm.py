"""LayerNorm as a module that stands where nn.LayerNorm is constructed."""

from __future__ import annotations

import math

import torch
from torch import nn

from liger_kernel.ops.core import known_impl
from liger_kernel.ops.layer_norm import LigerLayerNormFunction
from liger_kernel.transformers.rms_norm import INITS


class LigerLayerNorm(nn.Module):
    """LayerNorm of the last dimension, (..., hidden_size) -> the same shape and dtype (arXiv:1607.06450).

    There is a bias parameter, initially 0, whatever `bias` says, so that checkpoints of nn.LayerNorm load;
    elementwise_affine=False has neither weight nor bias. impl, or its synonym backend, names the implementation that
    runs this module ("torch", "triton", a backend); None follows the process. mode knows "auto" only.
    Raises ValueError for an unknown impl, backend, mode or init_fn, and for more than one normalised dimension.
    """

    def __init__(
        self,
        hidden_size,
        eps=1e-6,
        bias=False,
        init_fn="ones",
        impl=None,
        mode=None,
        backend=None,
        *,
        elementwise_affine=True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if init_fn not in INITS:
            raise ValueError(f"init_fn must be one of {sorted(INITS)}, got {init_fn!r}")
        if mode not in (None, "auto", "default"):
            raise ValueError(f"mode must be None or 'auto', got {mode!r}")
        if None not in (impl, backend) and impl != backend:
            raise ValueError(f"impl={impl!r} and backend={backend!r} name two implementations for one module")
        if not isinstance(hidden_size, int) and len(hidden_size) != 1:
            raise ValueError(f"only the last dimension can be normalised, got hidden_size={hidden_size!r}")
        self.hidden_size = hidden_size if isinstance(hidden_size, int) else math.prod(hidden_size)
        self.eps = self.variance_epsilon = eps
        self.mode = mode
        self.backend = impl if impl is not None else backend
        factory = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(INITS[init_fn](self.hidden_size, **factory)) if elementwise_affine else None
        self.bias = nn.Parameter(torch.zeros(self.hidden_size, **factory)) if elementwise_affine else None

    @property
    def backend(self):
        """The same as impl."""
        return self.impl

    @backend.setter
    def backend(self, value):
        self.impl = known_impl(value, "impl")

    def forward(self, hidden_states):
        impl = getattr(self, "impl", None)  # absent where this method is bound to an nn.LayerNorm
        return LigerLayerNormFunction.apply(hidden_states, self.weight, self.bias, self.variance_epsilon, impl)

    def extra_repr(self):
        return f"{self.hidden_size}, eps={self.variance_epsilon}"
