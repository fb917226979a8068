"""Every name of liger-kernel's interface, with its parameters, their order and their defaults: interface.txt.

test_model_names.py has the apply_liger_kernel_to_<model> functions.
"""

import importlib
import inspect
from pathlib import Path

import pytest
import torch

LISTED = Path(__file__).with_name("interface.txt").read_text()
INTERNAL = "part of how a kernel is launched there; here that is chosen in ops/kernels"
HOOKS = "subclasses define the loss only; the head walks its rows itself, so there is no chunk to hand out"
# module and name, or how these begin -> why it is not as listed
EXCEPTIONS = {
    **{f"ops.{op}.get_num_warps": INTERNAL for op in ("fused_ce_tvd", "fused_linear_kl_div", "kl_div", "tvd")},
    "ops.fused_moe.compute_routing_metadata": INTERNAL,
    "ops.mhc.mhc_": "hand on what its kernels leave for each other, whose shapes only they know",
    "ops.mlp.get_bucket_m": INTERNAL,
    "ops.mlp.gemm_swiglu": INTERNAL,
    "ops.mlp.swiglu_backward_d": INTERNAL,
    "chunked_loss.grpo_loss.LigerFusedLinearGRPOFunction.ppo_loss_fn": "an option it does not know raises",
    "ops.fused_neighborhood_attention.fused_neighborhood_attention_forward": "returns the S x S matrix of weights",
    "ops.experimental.mm_int8int2": "products of packed integers: no layer or model of the interface uses them",
    **{
        f"chunked_loss.fused_linear_{base}.": HOOKS
        for base in ("distillation", "ppo", "preference", "unpaired_preference")
    },
}
NOT_BUILT = ("LigerExpertParallelFusedMoe", "configure", "backends.registry.")


def listed():
    module = ""
    for line in LISTED.splitlines():
        if line.startswith("["):
            module = line.strip("[]")
        elif line and not line.startswith("#"):
            name, bracket, parameters = line.partition("(")
            yield module, name, parameters[:-1] if bracket else None


def resolve(module, name):
    found = importlib.import_module(f"liger_kernel.{module}".rstrip("."))
    for part in name.split("."):
        if not hasattr(found, part) and inspect.ismodule(found):
            importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part)
    return found


def expected(parameters):
    """Parameters as they are written in a def."""
    function = eval(f"lambda {parameters}: None", {"torch": torch})  # noqa: S307
    return [*inspect.signature(function).parameters.values()]


def signature_of(found):
    """The parameters of a function, of a Function's apply, of a method without what it is bound to."""
    if inspect.isclass(found):
        found = found.forward if issubclass(found, torch.autograd.Function) else found.apply
    return [p for p in inspect.signature(found).parameters.values() if p.name not in ("self", "cls", "ctx")]


def deviation(wanted, ours):
    """Why a call written for `wanted` may not do the same with `ours`; None where it does."""
    kinds = {p.kind for p in ours}
    by_name = {p.name: p for p in ours}
    positions = [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    place = 0
    for p in wanted:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            if p.kind not in kinds:
                return f"takes no {p}"
            continue
        positional = p.kind is p.POSITIONAL_OR_KEYWORD
        mine = by_name.get(p.name)
        if mine is None:
            return f"has no {p.name}"
        if positional and positions[place : place + 1] != [p.name]:
            return f"{p.name} is not at place {place}"
        place += positional
        if p.default is not p.empty and (mine.default is p.empty or mine.default != p.default):
            return f"{p.name}={mine.default!r}, not {p.default!r}"
    extra = [
        p.name for p in ours if p.name not in {w.name for w in wanted} and p.default is p.empty and "*" not in str(p)
    ]
    return f"needs {extra} too" if extra else None


def why_not(module, name, parameters):
    """Why a name is not as listed; None where it is."""
    try:
        found = resolve(module, name)
    except (ImportError, AttributeError) as error:
        return str(error)
    return None if parameters is None else deviation(expected(parameters), signature_of(found))


def is_in(parts, module, name):
    return any(part in f"{module}.{name}" for part in parts) and not module.startswith("ops.backends")


ALL = [*listed()]
KEPT = [entry for entry in ALL if not f"{entry[0]}.{entry[1]}".startswith(tuple(EXCEPTIONS))]


@pytest.mark.parametrize("module, name, parameters", KEPT, ids=[f"{m}.{n}" for m, n, _ in KEPT])
def test_a_name_is_there_and_is_called_as_listed(module, name, parameters):
    wrong = why_not(module, name, parameters)
    if wrong and "pip install trl" in wrong:
        pytest.skip(wrong)
    if wrong and "No module" in wrong and is_in(NOT_BUILT, module, name):
        pytest.skip(wrong)
    assert wrong is None, wrong


@pytest.mark.parametrize("start", EXCEPTIONS)
def test_an_exception_is_one(start):
    """An exception nobody needs any more would hide the next deviation."""
    entries = [entry for entry in ALL if f"{entry[0]}.{entry[1]}".startswith(start)]
    assert any(why_not(*entry) for entry in entries)


@pytest.mark.parametrize(
    ("wanted", "ours", "wrong"),
    [
        ("a, b=1", "a, b=1, c=None", None),
        ("a, *, b=1", "a, b=1", None),
        ("a, b", "b, a", "a is not at place 0"),
        ("a, b=1", "a, b=2", "b=2, not 1"),
        ("a, b=1", "a", "has no b"),
        ("a, b", "a, *, b", "b is not at place 1"),
        ("a", "a, b", "needs ['b'] too"),
        ("a, **rest", "a", "takes no **rest"),
    ],
)
def test_the_comparison_sees(wanted, ours, wrong):
    assert deviation(expected(wanted), expected(ours)) == wrong
