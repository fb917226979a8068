"""What a user's code does on a device of a given name, in a process of its own: see test_dispatch.py.

python test/backends/on_device.py npu
"""

import json
import sys

import torch

import fake_device

NAME = sys.argv[1]
fake_device.install(NAME, vector_core_num=48, multi_processor_count=12)

from liger_kernel import backends, utils  # noqa: E402
from liger_kernel.ops import core  # noqa: E402
from liger_kernel.transformers import LigerRMSNorm  # noqa: E402

found = {
    "backend": backends.device_of(torch.device(NAME)).name,
    "cores": backends.device_of(torch.device(NAME)).cores(torch.device(NAME, 1)),
    "device": utils.infer_device(),
    "comm": utils.infer_comm_backend(),
    "arch": utils.infer_device_arch(1),
    "is_npu": utils.is_npu_available(),
    "memory": utils.get_total_gpu_memory() if utils.infer_device() == NAME else None,
    "impls": backends.available_impls("rms_norm", NAME),
    "source": core.resolve("rms_norm", NAME).source,
    "why": core.resolve("rms_norm", NAME).why,
}


def outcome(module, x):
    x = x.detach().requires_grad_()
    module.zero_grad()
    module(x).square().sum().backward()
    return x.grad, module.weight.grad.clone()  # a module that moves takes its own along


# The pair is chosen by the tensor of each call: a module that moves takes the other one along.
used = []
for pair in ("torch", "triton"):
    if pair not in found["impls"]:
        continue
    kernels = core.resolve("rms_norm", "cpu", pair).kernels

    def forward(x, *args, _pair=pair, _forward=kernels.forward, **kwargs):
        used.append([x.device.type, _pair])
        return _forward(x, *args, **kwargs)

    object.__setattr__(kernels, "forward", forward)

torch.manual_seed(0)
module, x = LigerRMSNorm(40, in_place=False), torch.randn(5, 40)
with torch.no_grad():
    module.weight.copy_(torch.randn(40))
expected = outcome(module, x)
there = outcome(module.to(NAME), x.to(NAME))
second = outcome(module.to(f"{NAME}:1"), x.to(f"{NAME}:1"))
again = outcome(module.to("cpu"), x)
found["used"] = used
found["devices"] = [str(t.device) for t in (*there, *second, *again)]
found["error"] = max(
    (a.cpu() - b).abs().max().item() for results in (there, second, again) for a, b in zip(results, expected)
)
found["current"] = torch.get_device_module(NAME).current_device()

head = torch.nn.Linear(8, 8).to(NAME)
with torch.autocast(NAME, dtype=torch.bfloat16):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    hidden = torch.randn(4, 8, device=NAME, requires_grad=True)
    loss = LigerFusedLinearCrossEntropyLoss()(head.weight, hidden, torch.arange(4, device=NAME))
    loss.backward()
found["autocast"] = [str(loss.device), str(hidden.grad.dtype), torch.isfinite(hidden.grad).all().item()]

print(json.dumps(found))
sys.stdout.flush()
