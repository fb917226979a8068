"""What the engine patches in one tiny model of a type, and whether the model still computes the same.

`python -m models.matrix TYPE...` prints it; `make models` runs every type and writes docs/models.md.
"""

import dataclasses
import inspect
import json
import re
import sys
import time
import warnings
from dataclasses import dataclass, field

import torch
from torch import nn

from liger_kernel.transformers import apply_liger_kernel, revert_liger_kernel
from models import tiny

# fp32 rounding through two layers and a head, relative to the loss and to the model's largest gradient. Both runs do
# the same mathematics in another order; the largest differences seen are a tenth of these.
LOSS, GRADIENT = 1e-5, 2e-5


@dataclass
class Entry:
    """One type. Counts are (patched, there are); left holds the reasons; error says why it could not be run."""

    model_type: str
    norms: tuple[int, int] = (0, 0)
    mlps: tuple[int, int] = (0, 0)
    ropes: tuple[int, int] = (0, 0)
    experts: tuple[int, int] = (0, 0)
    head: str = ""
    left: list[str] = field(default_factory=list)
    loss: float | None = None  # difference from the unpatched model
    gradient: float | None = None
    deterministic: bool = True  # the unpatched model computes the same twice
    bits: str = ""  # of the bf16 logits with everything but the head patched
    seconds: float = 0.0
    error: str = ""

    @property
    def equal(self) -> bool:
        return self.loss is not None and self.loss <= LOSS and self.gradient <= GRADIENT


def measure(model_type: str) -> Entry:
    """Build, run, patch and run again; what the model's own code cannot do is the entry's error."""
    entry = Entry(model_type)
    start = time.time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = tiny.tiny(model_type)
            inputs = tiny.text(model)
            wanted = run(model, inputs)
    except Exception as problem:
        entry.error = f"{type(problem).__name__}: {problem}".splitlines()[0][:120]
        return entry
    again = run(model, inputs)
    entry.deterministic = difference(again, wanted) == (0.0, 0.0)
    try:
        count(model, apply_liger_kernel(model), entry)
        entry.loss, entry.gradient = difference(run(model, inputs), wanted)
        revert_liger_kernel(model)
        entry.bits = bits(model, inputs)
    finally:
        revert_liger_kernel(model)
    entry.seconds = round(time.time() - start, 2)
    return entry


def run(model: nn.Module, inputs: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def difference(found, wanted) -> tuple[float, float]:
    """Of the loss, and of all gradients relative to the largest one; infinite where other parameters have one."""
    (loss, grads), (loss_wanted, grads_wanted) = found, wanted
    if grads.keys() != grads_wanted.keys():
        return float("inf"), float("inf")
    largest = max(g.abs().max().item() for g in grads_wanted.values())
    worst = max((grads[n] - g).abs().max().item() for n, g in grads_wanted.items())
    return (loss - loss_wanted).abs().item() / max(1.0, abs(loss_wanted.item())), worst / largest


def bits(model: nn.Module, inputs: dict) -> str:
    """Whether the bf16 logits of the unpatched model are those of the patched one, bit for bit."""
    model.bfloat16()
    try:
        wanted = logits(model, inputs)
    except Exception as problem:
        return f"cannot run in bf16 ({type(problem).__name__})"
    if not torch.equal(logits(model, inputs), wanted):
        return "not deterministic"
    apply_liger_kernel(model, fused_linear_cross_entropy=False)
    found = logits(model, inputs)
    if torch.equal(found, wanted):
        return "same"
    return f"{(found == wanted).float().mean():.0%} same"


@torch.no_grad()
def logits(model: nn.Module, inputs: dict) -> torch.Tensor:
    torch.manual_seed(7)
    return model(input_ids=inputs["input_ids"], use_cache=False).logits


def count(model: nn.Module, report, entry: Entry) -> None:
    """The report's rows beside what the model's own code shows: what no row mentions counts as left."""
    rows = {kind: [r for r in report.rows if r.kind == kind] for kind in ("norm", "mlp", "rope", "experts", "head")}
    found = {kind: {r.module for r in some} for kind, some in rows.items()}
    done = {kind: sum(r.reason is None for r in some) for kind, some in rows.items()}
    missed = {n for n, m in model.named_modules() if is_norm(m)} - found["norm"]
    called = rotations(model) - found["rope"]
    entry.norms = done["norm"], len(found["norm"] | missed)
    entry.mlps = done["mlp"], len(found["mlp"])
    entry.ropes = done["rope"], len(found["rope"] | called)
    entry.experts = done["experts"], len(found["experts"])
    entry.head = rows["head"][0].kernel or f"left: {rows['head'][0].reason}"
    classes = {n: type(m).__name__ for n, m in model.named_modules()}
    left = {
        f"{classes.get(r.module, r.module.rpartition('.')[2])}: {r.reason}" for r in report.left if r.kind != "head"
    }
    left |= {f"{classes[n]}: takes no part in this" for n in missed} | {f"{n}: not seen" for n in called}
    entry.left = sorted(left)


def is_norm(module: nn.Module) -> bool:
    """By its name: what a reader of the model's code would expect to be patched."""
    return bool(re.search(r"(RMS|Layer)Norm|RMSNorm", type(module).__name__)) and not list(module.children())


def rotations(model: nn.Module) -> set[str]:
    """Rotary functions that the model's classes call, by their names."""
    names = set()
    for kind in {type(m) for m in model.modules()}:
        for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
            for method in filter(inspect.isfunction, vars(base).values()):
                scope = inspect.unwrap(method).__globals__
                used = inspect.unwrap(method).__code__.co_names
                names |= {f"{scope['__name__']}.{n}" for n in used if n in scope and re.match(r"apply_.*rot", n)}
    return names


def main(types: list[str]) -> None:
    for model_type in types:
        print(json.dumps(dataclasses.asdict(measure(model_type))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
