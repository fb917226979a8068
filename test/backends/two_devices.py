"""In a process of its own: a patched model on two devices trains, and every op runs on the second; test_dispatch.py.

python test/backends/two_devices.py npu
"""

import importlib
import json
import sys

import torch
from triton.runtime.interpreter import InterpretedFunction

import fake_device

NAME = sys.argv[1]
module = fake_device.install(NAME, vector_core_num=48, multi_processor_count=12)

from accelerate import dispatch_model  # noqa: E402

from liger_kernel.ops import EXPORTS  # noqa: E402
from liger_kernel.ops.fused_linear_cross_entropy import liger_fused_linear_cross_entropy  # noqa: E402
from liger_kernel.selftest import call as run  # noqa: E402
from liger_kernel.transformers import apply_liger_kernel  # noqa: E402

from support import tiny_model  # noqa: E402

PLACES = {  # the head is back on the first device, as where it is tied to the embedding
    "model.embed_tokens": f"{NAME}:0", "model.rotary_emb": f"{NAME}:0", "model.layers.0": f"{NAME}:0",
    "model.layers.1": f"{NAME}:1", "model.norm": f"{NAME}:1", "lm_head": f"{NAME}:0",
}  # fmt: skip
launches = []
get = InterpretedFunction.__getitem__


def recording(self, grid):
    start = get(self, grid)

    def run(*args, **kwargs):
        devices = {str(a.device) for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)}
        launches.append((sorted(devices), f"{NAME}:{module.current_device()}"))
        return start(*args, **kwargs)

    return run


InterpretedFunction.__getitem__ = recording


def make():
    torch.manual_seed(1)
    return tiny_model("llama", vocab_size=67)


ids = torch.randint(3, 67, (2, 9), generator=torch.Generator().manual_seed(2))
plain = make()
expected = plain(input_ids=ids, labels=ids, use_cache=False).loss
expected.backward()
model = dispatch_model(make(), PLACES, main_device=f"{NAME}:0", force_hooks=True)
report = apply_liger_kernel(model)
outputs = model(input_ids=ids.to(NAME), labels=ids.to(NAME), use_cache=False)
outputs.loss.backward()
gradients = zip(model.named_parameters(), plain.parameters(), strict=True)
found = {
    "left": [f"{row.module}: {row.reason}" for row in report.left],
    "lazy": type(outputs.logits).__name__,
    "launches": [*launches],
    "current": module.current_device(),
    "loss": abs(outputs.loss.item() - expected.item()) / expected.item(),
    "errors": {n: ((p.grad.cpu() - q.grad).norm() / q.grad.norm()).item() for (n, p), q in gradients},
    "places": sorted({str(p.grad.device) for p in model.parameters()}),
}
# Every op on the second device, while the first is current
found["ops"] = {}
for op in (op for op in EXPORTS if hasattr(importlib.import_module(f"liger_kernel.ops.{op}"), "CONTRACT")):
    contract = importlib.import_module(f"liger_kernel.ops.{op}").CONTRACT
    launches = []
    for case in contract.cases(torch.float32, torch.device(f"{NAME}:1"))[:2]:
        run(contract.call, case)
    found["ops"][op] = [*{json.dumps(launched): launched for launched in launches}.values()]

hidden, weight = torch.randn(4, 8, device=f"{NAME}:0"), torch.randn(67, 8, device=f"{NAME}:1")
try:
    liger_fused_linear_cross_entropy(hidden, weight, torch.zeros(4, dtype=torch.int64, device=hidden.device))
    found["refused"] = ""
except ValueError as error:
    found["refused"] = str(error)
print(json.dumps(found))
sys.stdout.flush()
