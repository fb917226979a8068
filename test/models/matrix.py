"""What the engine patches in one tiny model of a type, and whether the model still computes the same.

`python -m models.matrix TYPE...` prints it; `make models` runs every type and writes docs/models.md.
"""

import dataclasses
import inspect
import json
import logging
import re
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from torch import nn

from liger_kernel.transformers import apply_liger_kernel, revert_liger_kernel
from models import inputs, tiny

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


def measure(model_type: str, device: str = "cpu", multimodal: bool = False) -> Entry:
    """Build, run, patch and run again; what the model's own code cannot do is the entry's error."""
    entry = Entry(model_type)
    start = time.time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = tiny.tiny(model_type, multimodal).to(device)
            given = {name: t.to(device) for name, t in inputs.text(model).items()}
            wanted, again = run(model, given), run(model, given)
    except Exception as problem:
        entry.error = " ".join(f"{type(problem).__name__}: {problem}".split())[:160]
        return entry
    entry.deterministic = difference(again, wanted) == (0.0, 0.0)
    try:
        count(model, apply_liger_kernel(model), entry)
        entry.loss, entry.gradient = difference(run(model, given), wanted)
        revert_liger_kernel(model)
        entry.bits = bits(model, given)
    finally:
        revert_liger_kernel(model)
    entry.seconds = round(time.time() - start, 2)
    return entry


def run(model: nn.Module, given: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    outputs = model(**given, use_cache=False)
    loss = outputs.loss if outputs.loss is not None else outputs.logits.float().square().mean()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def difference(found, wanted) -> tuple[float, float]:
    """Of the loss, and of all gradients relative to the largest one; infinite where other parameters have one."""
    (loss, grads), (loss_wanted, grads_wanted) = found, wanted
    if grads.keys() != grads_wanted.keys():
        return float("inf"), float("inf")
    # max of a tensor, not of Python's floats, which passes over a NaN
    largest = torch.stack([g.abs().max() for g in grads_wanted.values()]).max().item()
    worst = torch.stack([(grads[n] - g).abs().max() for n, g in grads_wanted.items()]).max().item()
    return (loss - loss_wanted).abs().item() / max(1.0, abs(loss_wanted.item())), worst / largest


def bits(model: nn.Module, given: dict) -> str:
    """Whether the bf16 logits of the unpatched model are those of the patched one, bit for bit."""
    model.bfloat16()
    try:
        wanted = logits(model, given)
    except Exception as problem:
        return f"cannot run in bf16 ({type(problem).__name__})"
    if not torch.equal(logits(model, given), wanted):
        return "not deterministic"
    apply_liger_kernel(model, fused_linear_cross_entropy=False)
    found = logits(model, given)
    if torch.equal(found, wanted):
        return "same"
    return f"{(found == wanted).float().mean():.0%} same"


@torch.no_grad()
def logits(model: nn.Module, given: dict) -> torch.Tensor:
    torch.manual_seed(7)
    low = {name: t.bfloat16() if t.is_floating_point() else t for name, t in given.items()}
    return model(**low, use_cache=False).logits


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
    left |= {f"{classes[n]}: {why_missed(model.get_submodule(n))}" for n in missed}
    left |= {f"{n}: not seen" for n in called}
    if entry.head.startswith("left"):
        left.add(f"head: {rows['head'][0].reason}")
    entry.left = sorted(left)


def why_missed(module: nn.Module) -> str:
    if any(p.dim() != 1 for p in module.parameters()):
        return "its parameters have more than one dimension"
    return "does not return its input normalised"


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


# The page


def page(entries: list[Entry]) -> str:
    """docs/models.md: totals, a row per type that runs, what was left and why, what was not run and why."""
    ran = [e for e in entries if not e.error]
    rows = [" | ".join(("", *cells(e), "")).strip() for e in ran]
    parts = [HEAD.format(transformers=transformers.__version__, torch=torch.__version__.partition("+")[0])]
    for name, types in (
        ("causal language models", tiny.causal_types()),
        ("multimodal models", tiny.multimodal_types()),
    ):
        parts.append(totals(name, [e for e in ran if e.model_type in types], len(types)))
    parts += [TABLE, *rows, "", "## Left alone", "", *reasons({e.model_type: e.left for e in ran})]
    parts += ["", "## Not run", ""]
    parts += reasons({e.model_type: [tiny.NOT_RUN.get(e.model_type, e.error)] for e in entries if e.error})
    return "\n".join(parts) + "\n"


HEAD = """# Models

Every type of transformers {transformers} with a causal or a multimodal language model, tiny and random, on a CPU with
torch {torch}: what `apply_liger_kernel(model)` patches, and that the patched model computes the same. `make models`
writes this page. A cell is what is patched of what there is. Loss and gradient are the largest differences from the
unpatched model in fp32, relative to the loss and to the model's largest gradient; bf16 compares the logits bit for
bit, with everything but the head patched. Multimodal models are given text, and an image or sound where they need
one; a type with a causal and a multimodal class is shown with the causal one. A model whose forward computes no loss is
trained on the mean square of its logits.
"""
TABLE = """## By type

| type | norms | gated MLPs | rope | experts | head | loss | gradient | bf16 |
| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | --- |"""


def cells(e: Entry) -> list[str]:
    counts = [f"{done}/{there}" if there else "" for done, there in (e.norms, e.mlps, e.ropes, e.experts)]
    head = "left" if e.head.startswith("left") else e.head.partition(" ")[2]
    return [e.model_type, *counts, head, f"{e.loss:.0e}", f"{e.gradient:.0e}", e.bits]


def totals(name: str, entries: list[Entry], types: int) -> str:
    norms, there = (sum(e.norms[i] for e in entries) for i in (0, 1))
    lines = [f"**{len(entries)} of {types} {name}**: {norms} of {there} norms;"]
    for kind, what in (("mlps", "gated MLPs"), ("ropes", "rotary functions"), ("experts", "experts")):
        some = [getattr(e, kind) for e in entries if getattr(e, kind)[1]]
        lines.append(f"{what} in {sum(done > 0 for done, _ in some)} of {len(some)} types that have them;")
    heads = sum(not e.head.startswith("left") for e in entries)
    same = sum(e.bits == "same" for e in entries)
    equal = sum(e.equal for e in entries)
    lines.append(f"the head in {heads}; loss and every gradient equal in {equal}; bf16 logits bit-identical in {same}.")
    return " ".join(lines) + "\n"


def reasons(by_type: dict[str, list[str]]) -> list[str]:
    """A line per reason, with the types it holds for."""
    types: dict[str, list[str]] = {}
    for model_type, given in by_type.items():
        for reason in given:
            types.setdefault(reason, []).append(model_type)
    return [f"- {reason.replace('|', '/')}: {', '.join(some)}" for reason, some in sorted(types.items())]


def main(arguments: list[str]) -> None:
    """TYPE...: print their entries as JSON, with --on DEVICE first: measured there. --write PATH: write the page."""
    logging.disable(logging.WARNING)
    if arguments[:1] == ["--write"]:
        types = sorted({*tiny.causal_types(), *tiny.multimodal_types()})
        entries = []
        for model_type in types:
            print(model_type, flush=True)
            entries.append(measure(model_type))
        Path(arguments[1]).write_text(page(entries))
        return
    device = "cpu"
    if arguments[:1] == ["--on"]:
        _, device, *arguments = arguments
    for model_type in arguments or sorted({*tiny.causal_types(), *tiny.multimodal_types()}):
        print(json.dumps(dataclasses.asdict(measure(model_type, device))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
