"""A compiled kernel is found again exactly where Triton would have found it."""

import ast
import types
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from liger_kernel import backends  # noqa: E402
from liger_kernel.ops.kernels import launch as launching  # noqa: E402
from liger_kernel.ops.kernels.launch import launch  # noqa: E402

CPU = torch.device("cpu")


class Compiled:
    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.ran, self.hooked = [], []

    def run(self, *args):
        self.ran.append(args)

    def __getitem__(self, grid):
        return lambda *args, stream: self.hooked.append((grid, args, stream))


class Kernel:
    """Two pointers, a specialised and a free integer, a constexpr; counts what is compiled."""

    params = [types.SimpleNamespace(name=n, do_not_specialize=n == "rows") for n in ("X", "Y", "n", "rows", "BLOCK")]

    def __init__(self):
        self.compiled = []

    def __getitem__(self, grid):
        def first(*args, **meta):
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return first


class Wrapper(torch.Tensor):
    """One that keeps its numbers in others, as quantised tensors do."""

    __torch_dispatch__ = None


@pytest.fixture
def kernel(monkeypatch):
    if not launching._KEEPS_HANDLES:
        pytest.skip("this triton's compiled kernels are not kept")
    backend = backends.Backend(name="cpu", device_type="cpu", is_available=lambda: True, stream=lambda device: 7)
    monkeypatch.setitem(backends._BY_TYPE, "cpu", backend)
    monkeypatch.setattr(launching, "_KEEPS_HANDLES", True)
    monkeypatch.setattr(launching, "_handles", {})
    monkeypatch.setattr(launching, "_free", {})
    return Kernel()


def start(kernel, x=None, y=None, n=32, rows=5, block=64, warps=4):
    x = torch.empty(8) if x is None else x
    launch(kernel, 3, CPU, x, y, n, rows, BLOCK=block, num_warps=warps)
    return x


def test_a_second_launch_starts_what_the_first_compiled(kernel):
    start(kernel)
    x = start(kernel)
    (compiled,) = kernel.compiled
    (args,) = compiled.ran
    assert args[:9] == (3, 1, 1, 7, "function", "metadata", None, None, None)
    assert args[9] is x and args[10:] == (None, 32, 5, 64)


@pytest.mark.parametrize("keeps", [True, False])
def test_a_kernel_never_reads_at_address_0(kernel, keeps, monkeypatch):
    """A tensor on its way between ranks says its address is 0: compiled kernels read there, on GPUs only."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    monkeypatch.setattr(launching, "_KEEPS_HANDLES", keeps)
    given, x = [], torch.empty(8)
    monkeypatch.setattr(
        Kernel, "__getitem__", lambda self, grid: lambda *args, **meta: given.append(args) or Compiled()
    )
    start(kernel, AsyncCollectiveTensor(x))
    assert [type(t) for t in given[0][:2]] == [torch.Tensor, type(None)] and given[0][0].data_ptr() == x.data_ptr()
    start(kernel, torch.empty(0))  # nothing is read
    wrapper = torch.Tensor._make_wrapper_subclass(Wrapper, (8,))
    with pytest.raises(RuntimeError, match="cannot read a Wrapper, which has no memory"):
        start(kernel, wrapper)


@pytest.mark.parametrize(
    "other",
    [
        dict(x=torch.empty(8, dtype=torch.float16)),
        dict(x=torch.empty(9)[1:]),  # not at a multiple of 16 bytes
        dict(y=torch.empty(8)),
        dict(n=33),
        dict(rows=2**31),  # a 64-bit argument
        dict(block=128),
        dict(warps=8),
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_triton_specialises_on_compiles_anew(kernel, other):
    start(kernel)
    start(kernel, **other)
    assert len(kernel.compiled) == 2


def test_a_free_integer_compiles_nothing(kernel):
    for rows in (5, 1, 16, 2**31 - 1):
        start(kernel, rows=rows)
    assert len(kernel.compiled) == 1


def test_a_profiler_that_hooks_launches_sees_them(kernel, monkeypatch):
    start(kernel)
    hooks = triton.knobs.runtime
    monkeypatch.setattr(hooks, "launch_enter_hook", types.SimpleNamespace(calls=[print]))
    start(kernel)
    (compiled,) = kernel.compiled
    assert not compiled.ran and compiled.hooked[0][0] == (3, 1, 1) and compiled.hooked[0][2] == 7


def test_another_device_is_made_current_for_the_launch(kernel, monkeypatch):
    entered = []

    class Guard:
        def __enter__(self):
            entered.append(len(kernel.compiled[0].ran) if kernel.compiled else 0)

        def __exit__(self, *error):
            entered.append(len(kernel.compiled[0].ran))

    other = backends.Backend(
        name="cpu", device_type="cpu", is_available=lambda: True, stream=lambda device: 7,
        is_current=lambda device: False, guard=lambda device: Guard(),
    )  # fmt: skip
    monkeypatch.setitem(backends._BY_TYPE, "cpu", other)
    start(kernel)
    start(kernel)
    assert entered == [0, 0, 0, 1]


def test_nothing_but_launch_starts_a_kernel():
    """So that no kernel can start on another device than the one that launch makes current."""
    folder = Path(launching.__file__).parent
    for file in sorted(folder.glob("*.py")):
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        started = [ast.unparse(c) for c in calls if isinstance(c.func, ast.Subscript)]
        assert not started or file.name == "launch.py", f"{file.name}: {started}"
        for call in calls:
            if ast.unparse(call.func) == "launch":
                assert ast.unparse(call.args[2]).split(".")[-1] == "device", f"{file.name}: {ast.unparse(call)}"
    jitted = [f for f in folder.parents[1].rglob("*.py") if "triton.jit" in f.read_text()]
    assert jitted and all(f.parent == folder for f in jitted)  # no kernel is anywhere else
