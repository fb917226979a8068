"""`liger-kernel doctor`: what would be patched in a model, without its weights: it is built on the meta device."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from liger_kernel import backends
from liger_kernel.cli import UserError, report

_AUTO = (
    "AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModel",
)  # fmt: skip  # masked first: what can be trained as both is an encoder
# Bytes per logit at the peak of an unfused loss. 16 bit: the logits, the log-probabilities and their gradient in fp32,
# the gradient of the logits. fp32: the logits, the log-probabilities, the gradient.
_PER_LOGIT = 12


def run(arguments: argparse.Namespace) -> int:
    from liger_kernel.transformers import apply_liger_kernel, revert_liger_kernel

    dtype = getattr(torch, arguments.dtype)
    model = build(arguments.model, dtype)
    batch, seq = arguments.batch or 1, arguments.seq or 2048
    before = kept_bytes(model, batch, seq)
    found = apply_liger_kernel(model)
    try:
        after = kept_bytes(model, batch, seq)
        figures: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "kinds": found.kinds()}
        figures |= {"batch": batch, "seq": seq, "dtype": arguments.dtype}
        if isinstance(before, int) and isinstance(after, int):
            figures |= {"activations_saved": before - after}
        else:
            figures |= {"activations_saved": None, "activations_unknown": str(before)}
        figures |= {"head": head_bytes(model, found, batch * seq, dtype)}
    finally:
        revert_liger_kernel(model)
    if arguments.json:
        print(json.dumps(json.loads(found.to_json()) | {"estimate": figures}, indent=2))
    else:
        print("\n".join([str(found), "", *_kinds(figures["kinds"]), "", *_estimate(figures)]))
    return 0


def build(name: str, dtype: torch.dtype) -> nn.Module:
    """The model of a folder, a hub id or a model type, on the meta device, in training mode.

    Raises UserError for what is none of them and for a type that no class of transformers builds.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        if not Path(name).exists() and name in CONFIG_MAPPING:
            config = CONFIG_MAPPING[name]()
        else:
            config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{name} is no model folder, hub id or model type: {first}") from None
    autos = [auto for a in _AUTO if (auto := getattr(transformers, a, None)) is not None]
    named = [found for a in config.architectures or () if (found := getattr(transformers, a, None)) is not None]
    made = next((auto.from_config for auto in autos if type(config) in auto._model_mapping), None)
    made = named[0]._from_config if named else made
    if made is None:
        raise UserError(f"transformers has no model class for {name} ({config.model_type})")
    try:
        with torch.device("meta"):
            return made(config, dtype=dtype).train()
    except Exception as error:  # any configuration and any code of a model may be at fault
        raise UserError(f"{name} cannot be built: {type(error).__name__}: {error}".splitlines()[0]) from None


def kept_bytes(model: nn.Module, batch: int, seq: int) -> int | str:
    """What the body of a model keeps for the backward, parameters not counted, or why it cannot be run on meta.

    Only differences mean something: attention may keep there what its fused kernels do not.
    """
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no other storage gets the same address

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    body = getattr(model, "base_model", model)
    ids = torch.zeros(batch, seq, dtype=torch.long, device="meta")
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            body(input_ids=ids)
    except Exception as error:  # models that need an image, or whose code reads values, which meta tensors do not have
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return sum(storage.nbytes() for storage in kept.values()) - _remade(model, batch * seq)


def _remade(model: nn.Module, tokens: int) -> int:
    """The inputs of down projections, which patched MLPs make again where no hooks count what is kept."""
    from liger_kernel.transformers.kinds.probe import RECORD

    records = [r for m in model.modules() if (r := m.__dict__.get(RECORD)) is not None and r.kind == "mlp"]
    downs = [record.module.get_submodule(record.variant.down) for record in records]
    return sum(tokens * down.in_features * down.weight.element_size() for down in downs)


def head_bytes(model: nn.Module, found, tokens: int, dtype: torch.dtype) -> dict | None:
    """What logits, loss and their gradients take at most, unfused and fused; None without a language-model head."""
    from liger_kernel.ops.head_chunks import chunk_rows, pitch

    row = next(row for row in found.rows if row.kind == "head")
    weight = getattr(model.get_submodule(row.module), "weight", None) if row.reason is None else None
    if not isinstance(weight, torch.Tensor):
        return None
    classes, width = weight.shape
    rows = chunk_rows(tokens, classes, dtype, torch.device(backends.current().device_type), True)
    wide_sum = classes * width * (4 - dtype.itemsize) if rows < tokens else 0
    fused = rows * pitch(classes) * dtype.itemsize + wide_sum
    return {"pattern": row.kernel, "vocabulary": classes, "unfused": _PER_LOGIT * tokens * classes, "fused": fused}


def _kinds(kinds: dict[str, dict]) -> Iterable[str]:
    for kind, of in kinds.items():
        worst = "" if of["error"] is None else f", worst verified error {of['error']:.0e}"
        yield f"{kind}: {of['patched']} of {of['found']} patched{worst}"


def _estimate(figures: dict) -> Iterable[str]:
    parameters = f"{figures['parameters'] / 1e6:,.1f} M parameters"
    tokens = f"{figures['batch']} x {figures['seq']} tokens in {figures['dtype']}"
    yield f"Estimated for {tokens}, {parameters}, on {backends.current().name}, without gradient checkpointing:"
    head = figures["head"]
    if head is None:
        yield "  logits and loss    no fused head"
    else:
        yield f"  logits and loss    {_change(head['unfused'], head['fused'])}"
    if figures["activations_saved"] is None:
        yield f"  activations        unknown, it does not run on the meta device ({figures['activations_unknown']})"
    else:
        yield f"  activations        {report.size(figures['activations_saved'])} less kept for the backward"


def _change(before: int, after: int) -> str:
    return f"{report.size(before)} -> {report.size(after)} ({report.change(before, after)})"
