"""Running a module's own code on small random data, to learn what it computes without touching the module.

Nothing here reads or copies a model's weights: a twin has the class and the settings of the module and tensors of its
own, always on the CPU, so meta-device, quantised and sharded modules are probed like any other.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# fp32: a few units in the last place, as between x * rsqrt(v) and x / sqrt(v). Half precision: a formula that rounds
# at other places agrees in 50 to 90 % of the bits patterns, the right one in all but a rare tie.
MAX_ERROR = 5e-6
MIN_SAME = 0.99

_PLAIN = frozenset(nn.Module().__dict__)  # what every module has: parameters, hooks, the training flag
_SCALARS = (int, float, str, type(None))
RECORD = "_liger_kernel_patch"
_NOT_SETTINGS = frozenset(
    {"forward", "_old_forward", "_apply_gate", "_replicate_for_data_parallel", "_hf_hook", RECORD}
)


@dataclass(frozen=True)
class Match:
    """What a module computes, as the kind's variant (hashable, picklable), and the worst fp32 error when verified."""

    kind: str
    flag: str
    kernel: str
    variant: Any
    error: float


@dataclass(frozen=True)
class Refusal:
    """Why a module that looks like a kind is left alone."""

    kind: str
    reason: str


class _Same:
    """An object as a dict key by identity; holding it keeps its id from being reused."""

    def __init__(self, value):
        self.value = value

    def __hash__(self):
        return id(self.value)

    def __eq__(self, other):
        return isinstance(other, _Same) and self.value is other.value


def settings(module: nn.Module) -> dict[str, Any]:
    """A module's own attributes, without what belongs to every module, to hooks and to us."""
    return {k: v for k, v in module.__dict__.items() if k not in _PLAIN and k not in _NOT_SETTINGS}


def _key(module: nn.Module):
    shapes = tuple((n, tuple(shape_of(p))) for n, p in module.named_parameters(recurse=False))
    own = tuple((k, v if _is_plain(v) else _Same(v)) for k, v in settings(module).items())
    children = tuple((n, type(c), _key(c)) for n, c in module.named_children())
    code = tuple(_Same(f) for c in type(module).__mro__ if c is not nn.Module for f in vars(c).values() if callable(f))
    return shapes, own, children, code


def _is_plain(value: Any) -> bool:
    return all(isinstance(v, _SCALARS) for v in (value if isinstance(value, tuple) else (value,)))


def shape_of(parameter: torch.Tensor) -> torch.Size:
    """The whole shape of a parameter, also where DeepSpeed ZeRO-3 keeps it elsewhere."""
    return getattr(parameter, "ds_shape", parameter.shape)


_verified: weakref.WeakKeyDictionary[type, dict] = weakref.WeakKeyDictionary()


def verified_once(verify: Callable[[nn.Module], Match | Refusal | None]) -> Callable:
    """Verify once per class, code, shapes and settings: a model of 100 layers is probed like one of a single layer."""

    def cached(module: nn.Module) -> Match | Refusal | None:
        known = _verified.setdefault(type(module), {})
        key = verify, _key(module)
        if key not in known:
            with probing():
                known[key] = verify(module)
        return known[key]

    return cached


@contextlib.contextmanager
def probing():
    """Plain CPU arithmetic whatever is switched on outside, and the global random state left as it was."""
    with (
        torch.device("cpu"),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        torch.autocast("cpu", enabled=False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of odd dtypes and shapes: ours, not the user's
        yield


def twin(
    module: nn.Module,
    parameters: Mapping[str, torch.Tensor],
    children: Mapping[str, nn.Module],
    changed: Mapping[str, Any] | None = None,
    training: bool = True,
) -> nn.Module:
    """A module of the same class and settings around other tensors; hooks and patches are left out."""
    made = object.__new__(type(module))
    nn.Module.__init__(made)
    made.__dict__.update(settings(module))
    made.__dict__.update(changed or {})
    missing = dict.fromkeys(module._parameters)
    made._parameters.update(missing | {n: nn.Parameter(p, requires_grad=False) for n, p in parameters.items()})
    made._modules.update({**module._modules, **children})
    made.training = training
    return made


def run(made: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """The class's own forward on a twin."""
    return type(made).forward(made, *inputs)


def inputs(module: nn.Module) -> list[inspect.Parameter]:
    """The named parameters of a module's forward."""
    variadic = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return [p for p in parameters if p.kind not in variadic]


def required_inputs(module: nn.Module) -> list[str]:
    """What a module's forward cannot be called without."""
    return [p.name for p in inputs(module) if p.default is inspect.Parameter.empty]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers from a generator of our own."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).to(dtype)


def error(found: Any, wanted: torch.Tensor) -> float:
    """Largest difference relative to the largest value of its row; infinite where the two cannot be compared."""
    if not isinstance(found, torch.Tensor) or found.shape != wanted.shape or found.dtype != wanted.dtype:
        return float("inf")
    difference = (found - wanted).abs().amax(-1) / wanted.abs().amax(-1).clamp(min=1e-30)
    worst = difference.max().item()
    return worst if worst == worst else float("inf")


def same(found: Any, wanted: torch.Tensor) -> float:
    """The part of the elements that are equal bit for bit; 0 where dtype or shape differ."""
    if not isinstance(found, torch.Tensor) or found.shape != wanted.shape or found.dtype != wanted.dtype:
        return 0.0
    return (found == wanted).float().mean().item()
