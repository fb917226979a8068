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


WIDENS = re.compile(r"int64\(.*\)|.*\.to\(tl\.int64\)", re.DOTALL)
PASSES_ON = ("tl.minimum", "tl.maximum", "tl.cdiv", "tl.where", "min", "max")  # calls whose result is an index again
TILE_SIZES = ("ROWS", "BLOCK", "LANES", "VEC")  # an index times one of these is an index: at most R or N


class Indices(ast.NodeVisitor):
    """Collects the products of a size and a 32-bit index: a program id, or what is made of one and not cast."""

    def __init__(self, kernel):
        self.names = {a.arg: "" for a in kernel.args.args if a.arg in ("pid", "tile", "row", "index")}
        self.found = set()
        for statement in kernel.body:
            self.visit(statement)

    def narrow(self, node) -> bool:
        if WIDENS.fullmatch(ast.unparse(node)):
            return False
        if isinstance(node, ast.Name):
            return node.id in self.names
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            return called == "tl.program_id" or called in PASSES_ON and any(map(self.narrow, node.args))
        if isinstance(node, ast.BinOp):  # a remainder is an offset within a row
            return not isinstance(node.op, ast.Mod) and (self.narrow(node.left) or self.narrow(node.right))
        inner = getattr(node, "operand", None) or getattr(node, "value", None)
        return isinstance(node, (ast.UnaryOp, ast.Subscript)) and self.narrow(inner)

    def assign(self, target, value):
        for name in [n.id for n in ast.walk(target) if isinstance(n, ast.Name)]:
            self.names.pop(name, None)
            if self.narrow(value):
                divided = isinstance(value, ast.BinOp) and isinstance(value.op, ast.FloorDiv)
                self.names[name] = ast.unparse(value.right) if divided else ""

    def visit_Assign(self, node):
        self.visit(node.value)
        for target in node.targets:
            self.assign(target, node.value)

    def visit_For(self, node):
        if isinstance(node.iter, ast.Call) and any(map(self.narrow, node.iter.args[:2])):
            self.names[node.target.id] = ""
        for statement in node.body:
            self.visit(statement)

    def visit_BinOp(self, node):
        self.generic_visit(node)
        for index, size in ((node.left, node.right), (node.right, node.left)):
            if not isinstance(node.op, ast.Mult) or not self.narrow(index) or isinstance(size, ast.Constant):
                continue
            text = ast.unparse(size)
            quotient = self.names.get(ast.unparse(index)) == text  # i // n * n is at most i
            if not (quotient or text in TILE_SIZES or WIDENS.fullmatch(text)):
                self.found.add(ast.unparse(node))


@pytest.mark.parametrize("path", KERNELS, ids=name)
def test_row_indices_are_64_bit_before_they_meet_a_size(path):
    """A program id, or what is made of one, times a stride overflows 32 bits beyond 2^31 elements."""
    for kernel in kernels_in(path):
        found = Indices(kernel).found
        assert not found, f"{kernel.name}: {found}: a 32-bit index times a size needs int64(index)"


WALK = "for tile in range(tl.program_id(0), R, tl.num_programs(0)):\n        "


@pytest.mark.parametrize(
    ("body", "bad"),
    [
        ("tl.load(X + tl.program_id(0) * N)", True),
        ("tl.load(X + N * tl.program_id(0))", True),
        ("pid = tl.program_id(0)\n    row = pid // 4 + 1\n    tl.load(X + row * stride)", True),
        (WALK + "tl.load(X + (tile * ROWS + cols) * N)", True),
        (WALK + "tl.load(X + int64(tile) * ROWS * N)", False),
        ("row = tl.program_id(0).to(tl.int64)\n    tl.load(X + row * N)", False),
        ("row = tl.program_id(0)\n    row = row.to(tl.int64)\n    tl.load(X + row * N)", False),
        ("pid = tl.program_id(0)\n    label = tl.load(X + pid)\n    live = label * N", False),
        ("pid = tl.program_id(0)\n    row = pid // N\n    col = pid - row * N", False),
        ("mask = tl.program_id(0) * ROWS + cols < R", False),
    ],
)
def test_the_check_of_indices_sees(body, bad):
    (kernel,) = ast.parse(f"def k(X, R, N, stride, cols):\n    {body}").body
    assert bool(Indices(kernel).found) == bad


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
