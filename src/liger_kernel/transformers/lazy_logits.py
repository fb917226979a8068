"""Logits that are not computed until someone looks: what a fused LM head returns in place of hidden @ weight^T.

The model's own forward goes on with them: dtype casts, scales, soft caps, slices and views are recorded. A cross
entropy of them runs fused, without the logits ever existing whole; any other use computes the true logits once.
A plain Python object, not a Tensor subclass, because Dynamo traces through it without a graph break.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn import functional as torch_functional

from liger_kernel.ops.sharded import is_dtensor
from liger_kernel.transformers.fsdp import call_again, unwrapped
from liger_kernel.transformers.head_weight import merged_into
from liger_kernel.transformers.tensor_parallel import Passing

_STATE = ("hidden", "head", "window", "dtype", "device", "_vocab_size", "_steps", "_vocab", "_autocast", "_grad",
          "_settled", "_made_at", "_low", "_adapters", "split")  # fmt: skip


class LazyLogits:
    """Logits of `head` on `hidden` (..., H), shaped (..., V), with the elementwise steps taken since.

    head(hidden, reduce=f) must return f(hidden, weight, bias), run inside the module's call so that its hooks
    (FSDP, ZeRO, offloading) have the weight in place. window holds the options of the forward it was made in.
    With low, the inputs (..., H) of low-rank `adapters` (None: hidden), head(hidden, low, adapters, reduce=f) returns
    f(hidden, weight, bias, (u, B)). split: the head's weight is split by rows among ranks, and a DTensor.
    """

    def __init__(
        self, hidden, head, vocab_size, window=None, steps=(), dtype=None, vocab=None, grad=None, device=None,
        low=None, adapters=(), split=False,
    ):  # fmt: skip
        self.hidden = hidden
        self.head = head
        self.window = window
        self._vocab_size = vocab_size
        self._steps = steps
        self._vocab = vocab
        self._autocast = _autocast_dtype(hidden.device.type)
        computed = hidden.dtype if self._autocast is None or hidden.dtype is torch.float64 else self._autocast
        self.dtype = dtype or computed
        self._grad = torch.is_grad_enabled() if grad is None else grad
        self.device = device or hidden.device
        self._value: torch.Tensor | None = None
        self._settled = False
        self._low, self._adapters, self.split = low, adapters, split
        self._made_at = {} if torch.compiler.is_compiling() else _versions(head)

    def _like(self, **changes) -> LazyLogits:
        new = object.__new__(LazyLogits)
        for name in _STATE:  # one by one: Dynamo does not trace an update of __dict__ in every torch
            setattr(new, name, changes.get(name, getattr(self, name)))
        new._value = None
        return new

    def _moved(self, move: Callable, **changes) -> LazyLogits:
        """These logits with `move`, which leaves the last dim alone, done to what they are computed from."""
        low = None if self._low is None else tuple([x if x is None else move(x) for x in self._low])
        return self._like(hidden=move(self.hidden), _low=low, **changes)

    def _step(self, name: str, value: Any, **changes) -> LazyLogits:
        return self._like(_steps=(*self._steps, (name, value)), **changes)

    # What a tensor knows about itself

    @property
    def shape(self) -> torch.Size:
        start, stop = self._vocab or (0, self._vocab_size)
        return torch.Size((*self.hidden.shape[:-1], stop - start))

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    @property
    def ndim(self) -> int:
        return self.hidden.dim()

    def dim(self) -> int:
        return self.hidden.dim()

    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def requires_grad(self) -> bool:
        return self._grad

    def is_floating_point(self) -> bool:
        return True

    def is_contiguous(self, **options) -> bool:
        return True

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    # Steps that are recorded

    def float(self):
        return self.to(torch.float32)

    def double(self):
        return self.to(torch.float64)

    def half(self):
        return self.to(torch.float16)

    def bfloat16(self):
        return self.to(torch.bfloat16)

    def type_as(self, other):
        return self.to(other)

    def contiguous(self, **options):
        return self

    def to(self, *args, **kwargs):
        """Recorded where it changes the dtype or the device; the hidden states stay where they are."""
        if self._settled:
            return self.materialize().to(*args, **kwargs)
        new = self
        for target in (*args, kwargs.get("dtype"), kwargs.get("device")):
            if isinstance(target, torch.dtype):
                new = new if target is new.dtype else new._step("to", target, dtype=target)
            elif isinstance(target, (torch.device, str, int)) and not isinstance(target, bool):
                device = torch.device(target)
                same = device.type == new.device.type and device.index in (None, new.device.index)
                new = new if same else new._step("to", device, device=device)
            elif isinstance(target, torch.Tensor):
                new = new.to(target.device, target.dtype)
        return new

    def view(self, *shape):
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        lead = self.shape[:-1]
        if not self._settled and sizes and all(isinstance(size, (int, torch.SymInt)) for size in sizes):
            vocab = self.shape[-1]
            whole = sizes[-1] == -1 and -1 not in sizes[:-1] and math.prod(sizes[:-1]) == math.prod(lead)
            if sizes[-1] == vocab or whole:
                return self._moved(lambda x: x.reshape(*sizes[:-1], x.shape[-1]))
        return self.materialize().reshape(*sizes)

    reshape = view

    def flatten(self, start_dim: int = 0, end_dim: int = -1):
        last = end_dim + self.ndim if end_dim < 0 else end_dim
        if not self._settled and last < self.ndim - 1:
            return self._moved(lambda x: x.flatten(start_dim, last))
        return self.materialize().flatten(start_dim, end_dim)

    def __getitem__(self, index):
        new = None if self._settled else self._sliced(index)
        return self.materialize()[index] if new is None else new

    def _sliced(self, index) -> LazyLogits | None:
        """The lazy result of an index of slices and ints, or of one tensor over leading dims; None otherwise."""
        if isinstance(index, torch.Tensor):
            used = index.dim() if index.dtype is torch.bool else 1
            return self._moved(lambda x: x[index]) if used < self.ndim else None
        parts = index if isinstance(index, tuple) else (index,)
        if not all(isinstance(part, (slice, int)) or part is Ellipsis for part in parts):
            return None
        if Ellipsis in parts:
            at = parts.index(Ellipsis)
            parts = parts[:at] + (slice(None),) * (self.ndim - len(parts) + 1) + parts[at + 1 :]
        parts = parts + (slice(None),) * (self.ndim - len(parts))
        last = parts[-1]
        if not isinstance(last, slice) or last.step not in (None, 1):
            return None
        vocab = self._vocab
        if last != slice(None):
            start, stop, _ = last.indices(self.shape[-1])
            first = vocab[0] if vocab else 0
            vocab = (first + start, first + max(start, stop))
        return self._moved(lambda x: x[parts[:-1]], _vocab=vocab)

    def __mul__(self, factor):
        if _is_number(factor) and not self._settled:
            return self._step("mul", factor)
        return self.materialize() * _real(factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor):
        if _is_number(divisor) and not self._settled:
            return self._step("div", divisor)
        return self.materialize() / _real(divisor)

    mul = __mul__
    div = true_divide = __truediv__

    def tanh(self):
        return self.materialize().tanh() if self._settled else self._step("tanh", None)

    @property
    def data(self):
        return self.detach()

    def detach(self):
        if self._settled:
            return self.materialize().detach()
        return self._moved(lambda x: x.detach(), _grad=False)

    # The fused way

    def scales(self) -> tuple | None:
        """(logit_scale, softcap) with logits = softcap * tanh(logit_scale * z / softcap), z = hidden @ weight^T.

        Without a softcap logits = logit_scale * z. None for steps that this form does not cover.
        """
        inner, divisor, outer, capped = 1.0, 1.0, 1.0, False
        for name, value in self._steps:
            if name == "tanh":
                if capped:
                    return None
                capped = True
            elif name == "mul" and capped:
                outer *= value
            elif name == "div" and capped:
                outer /= value
            elif name == "mul":
                inner *= value
            elif name == "div":
                divisor *= value
        if not capped:
            return inner / divisor, None
        return (inner * outer / divisor, outer) if outer > 0 else None

    def is_fusable(self) -> bool:
        """Whether a cross entropy of these logits needs no logits."""
        return not self._settled and self.scales() is not None

    def reduce(self, function: Callable):
        """function(hidden, weight, bias) or, with adapters, function(hidden, weight, bias, low_rank).

        Run inside the head's call and under the autocast it was first called in.
        """

        def sliced(hidden, weight, bias, *low_rank):
            part = slice(*self._vocab)
            low_rank = [(u, low[part]) for u, low in low_rank]
            return function(hidden, weight[part], None if bias is None else bias[part], *low_rank)

        adapted = () if self._low is None else (self._low, self._adapters)
        with nullcontext() if self._grad else torch.no_grad(), self._made_under_autocast():
            used = function if self._vocab is None else sliced
            found = call_again(self.head, self.hidden, *adapted, split=self.split, reduce=used)
        return found.value if isinstance(found, Passing) else found

    def _made_under_autocast(self):
        """The autocast state of the head's call, where it is another one now."""
        device_type, dtype = self.hidden.device.type, self._autocast
        if dtype == _autocast_dtype(device_type):
            return nullcontext()
        return torch.autocast(device_type, dtype=dtype, enabled=dtype is not None)

    def cross_entropy(self, target, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0):
        """F.cross_entropy of these logits (T, V) and target (T,), fused; the loss has the logits' dtype."""
        from liger_kernel.transformers import functional
        from liger_kernel.transformers.model.loss_utils import low_rank_options, unpack

        options = {} if self.window is None else dict(self.window.options)
        options.update(scale_options(self, "softcap"))
        if weight is not None:
            options["ce_weight"] = weight
        if label_smoothing:
            options["label_smoothing"] = label_smoothing

        options.update(ignore_index=ignore_index, reduction=reduction)

        def loss(hidden, head_weight, bias, low_rank=None):
            given = options if bias is None else options | {"bias": bias}
            hidden, head_weight, more = low_rank_options(hidden, head_weight, low_rank)
            target_ = target.to(hidden.device)
            return unpack(functional.liger_fused_linear_cross_entropy(hidden, head_weight, target_, **given, **more))

        results = self.reduce(loss)
        if self.window is not None:
            self.window.collect(results)
        autocast = torch.is_autocast_enabled(self.device.type)  # which computes F.cross_entropy in fp32
        return results[0].to(device=self.device, dtype=torch.float32 if autocast else self.dtype)

    # The true logits

    def materialize(self, quiet: bool = False) -> torch.Tensor:
        """The true logits, computed at the first call and kept."""
        if self._value is None:
            if not torch.compiler.is_compiling():
                self._check_weight()
                if not quiet:
                    self._warn()
            value = self.reduce(_linear)
            with nullcontext() if self._grad else torch.no_grad():
                for name, operand in self._steps:
                    value = value.tanh() if name == "tanh" else getattr(value, name)(operand)
            self._value = value
        return self._value

    def _check_weight(self) -> None:
        now = _versions(self.head)
        if any(now.get(key, version) != version for key, version in self._made_at.items()):
            raise RuntimeError(
                "these logits were not computed during the forward, and the LM head's weight has changed since: use "
                "outputs.logits before the optimizer step, or call the model with skip_logits=False"
            )

    def _warn(self) -> None:
        if self.window is not None and self.window.first_use():
            size = self.numel() * torch.empty((), dtype=self.dtype).element_size() / 2**20
            warnings.warn(
                f"the logits of a fused LM head were used: computing all {tuple(self.shape)} of them takes "
                f"{size:,.1f} MiB that the fused loss saves (shown once; skip_logits=False gives ordinary logits)",
                stacklevel=4,
            )

    def __getattr__(self, name: str):
        if name in _LIKE_HIDDEN:
            return getattr(self.hidden, name)
        if name in _OF_SIZES:
            return getattr(torch.empty(self.shape, dtype=self.dtype, device="meta"), name)
        if name in _OF_KIND:
            return getattr(torch.empty(0, dtype=self.dtype, device=self.device), name)
        if name.startswith("_") or not hasattr(torch.Tensor, name):
            raise AttributeError(f"LazyLogits has no attribute {name!r}")
        value = self.materialize()
        if name.endswith("_"):
            self._settled = True  # changed in place: the recorded steps no longer say what the values are
        return getattr(value, name)

    def __setitem__(self, index, value) -> None:
        if self._value is None:
            self._value = self.materialize().clone()
        self._settled = True
        self._value[index] = _real(value)

    def __iter__(self):
        return iter(self.materialize())

    def __array__(self, *args, **kwargs):
        return self.materialize().detach().__array__(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        return self.materialize().detach().__reduce_ex__(protocol)  # a tensor's own: torch.load reads it as weights

    def __deepcopy__(self, memo):
        return self.materialize().detach().clone()

    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch_functional.cross_entropy:
            loss = _fused_cross_entropy(*args, **kwargs)
            if loss is not None:
                return loss
        name = getattr(func, "__name__", "")
        if args and isinstance(args[0], LazyLogits) and name in _RECORDED:
            return getattr(args[0], name)(*args[1:], **kwargs)
        if args and isinstance(args[0], LazyLogits) and name.endswith("_") and not name.endswith("__"):
            args[0]._settled = True
        return func(*_real(tuple(args)), **_real(kwargs))


def scale_options(logits: LazyLogits, softcap_name: str) -> dict[str, float]:
    """The recorded scale and soft cap as keyword arguments of a fused loss; what has no effect is left out."""
    scale, softcap = logits.scales() or (1.0, None)
    options = {} if scale == 1.0 else {"logit_scale": scale}
    return options if softcap is None else options | {softcap_name: softcap}


def _fused_cross_entropy(
    input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean", label_smoothing=0.0
):
    """The fused loss for F.cross_entropy's arguments, None where they ask for something else."""
    if not isinstance(input, LazyLogits) or not isinstance(target, torch.Tensor) or target.is_floating_point():
        return None
    if input.ndim != 2 or target.dim() != 1 or size_average is not None or reduce is not None:
        return None
    if not input.is_fusable() or (input.split and label_smoothing):
        return None
    return input.cross_entropy(target, weight, ignore_index, reduction, label_smoothing)


def _linear(hidden, weight, bias, low_rank=None):
    logits = torch_functional.linear(hidden, weight, bias)
    if is_dtensor(logits):  # of a tensor-parallel head
        logits = logits.full_tensor()
    return logits if low_rank is None else (logits + torch_functional.linear(*low_rank)).to(logits.dtype)


def _versions(head) -> dict:
    """How often each parameter of the head has been written; sharded ones are other objects during the forward.

    Also the adapters in its weight: PEFT writes them there behind the count of writes.
    """
    return {"merged": merged_into(unwrapped(head))} | {
        id(p): p._version for p in head.parameters() if not p.is_inference()
    }


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _real(value):
    if isinstance(value, LazyLogits):
        return value.materialize()
    if isinstance(value, dict):
        return {key: _real(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return type(value)(_real(item) for item in value)
    return value


def _through_value(name: str) -> Any:
    def method(self, *args):
        return getattr(self.materialize(), name)(*_real(args))

    method.__name__ = name
    return method


_LIKE_HIDDEN = {"is_cpu", "is_cuda", "is_hpu", "is_meta", "is_mps", "is_npu", "is_sparse", "is_xpu", "layout"}
_OF_SIZES = {"element_size", "itemsize", "nbytes", "nelement", "storage_offset", "stride"}
_OF_KIND = {"get_device", "is_complex", "is_signed", "new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"}
_RECORDED = {
    "bfloat16", "contiguous", "detach", "div", "double", "flatten", "float", "half", "mul", "reshape", "tanh", "to",
    "true_divide", "type_as", "view",
}  # fmt: skip
for _name in (
    "add", "radd", "sub", "rsub", "rtruediv", "floordiv", "mod", "pow", "rpow", "matmul", "rmatmul", "neg", "abs",
    "eq", "ne", "lt", "le", "gt", "ge", "bool", "float", "int",
):  # fmt: skip
    setattr(LazyLogits, f"__{_name}__", _through_value(f"__{_name}__"))
