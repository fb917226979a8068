"""The house rules a machine can check."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src/liger_kernel").rglob("*.py"))
KERNELS = sorted((ROOT / "src/liger_kernel/ops/kernels").glob("*.py"))
TESTS = sorted((ROOT / "test").rglob("*.py"))


def name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=name)
def test_file_is_not_too_long(path):
    """500 lines are the rule, which a reader keeps; 800 are the wall."""
    lines = len(path.read_text().splitlines())
    assert lines <= 800, f"{lines} lines, where 500 are the rule: make it a folder with the same parts"


@pytest.mark.parametrize("path", [p for p in SOURCES if "backends" not in p.parts], ids=name)
def test_only_backends_name_a_device(path):
    found = re.findall(r'["\'](?:npu|cuda|xpu|hip|mlu|gcu)["\']|torch\.(?:cuda|npu|xpu)\b', path.read_text())
    assert not found, f"{found}: ask liger_kernel.backends"


def kernels_in(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
            yield node


@pytest.mark.parametrize("path", KERNELS, ids=name)
def test_row_indices_are_64_bit_before_they_meet_a_size(path):
    """A program id, a tile or a row times a stride overflows 32 bits beyond 2^31 elements."""
    for kernel in kernels_in(path):
        for node in ast.walk(kernel):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
                text = ast.unparse(node.left)
                index = re.fullmatch(r"(pid|tile|row_id|tl\.program_id\(\d\))", text)
                size = ast.unparse(node.right)
                assert not index or size.isupper() and size in ("ROWS", "BLOCK"), (
                    f"{kernel.name}: {ast.unparse(node)} needs int64({text})"
                )


@pytest.mark.parametrize("path", KERNELS, ids=name)
def test_kernels_stay_inside_the_common_language(path):
    """What Triton 3.2, AMD, Ascend and the interpreter all have: see "Kernels" in AGENTS.md."""
    text = path.read_text()
    for word in ("libdevice", "inline_asm", "make_block_ptr", "tl.atomic", "tf32"):
        assert word not in text, word


@pytest.mark.parametrize("path", KERNELS, ids=name)
def test_no_python_float_reaches_a_kernel_by_value(path):
    """Capital = memory, ALL_CAPS = compile time: a lower-case parameter would be a float passed as fp64."""
    allowed = {"R", "N", "T", "V", "P", "H", "B", "S"}  # sizes, passed as integers
    for kernel in kernels_in(path):
        launched = kernel.name.endswith("_kernel")
        for arg in kernel.args.args if launched else []:
            constexpr = arg.annotation is not None and "constexpr" in ast.unparse(arg.annotation)
            assert (
                constexpr
                or arg.arg in allowed
                or arg.arg[0].isupper()
                or arg.arg.startswith("d")
                or ("stride" in arg.arg or arg.arg.startswith("n_") or arg.arg.endswith("_ptr"))
            ), f"{kernel.name}: {arg.arg}"
