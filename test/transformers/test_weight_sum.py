"""The sum of products that becomes a weight's gradient."""

import pytest
import torch

from liger_kernel.ops import weight_sum
from liger_kernel.ops.weight_sum import WeightSum

from support import dtypes


@pytest.mark.parametrize("n_rows, width", [(1, 2), (5, 3), (300, 130), (3, 8194), (0, 4)])
def test_a_sum_is_rounded_once_in_its_own_memory(n_rows, width, impl, device):
    for dtype in dtypes(impl, device):
        products = [(torch.randn(n_rows, 7, device=device), torch.randn(7, width, device=device)) for _ in range(3)]
        total = WeightSum(n_rows, width, torch.float32, dtype, device)
        for a, b in products:
            total.add(a, b)
        memory = total.parts[0].untyped_storage().data_ptr()
        found = total.finish()
        halves = [slice(None)]
        if dtype is not torch.float32 and width % 2 == 0:
            assert found.untyped_storage().data_ptr() == memory
            assert found.untyped_storage().nbytes() == n_rows * width * dtype.itemsize
            halves = [slice(0, width // 2), slice(width // 2, width)]
        expected = []
        for columns in halves:
            part = torch.mm(products[0][0], products[0][1][:, columns])
            for a, b in products[1:]:
                part.addmm_(a, b[:, columns])
            expected.append(part)
        assert found.is_contiguous() and torch.equal(found, torch.cat(expected, 1).to(dtype))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [6, 7])
def test_products_are_summed_wider_than_their_factors(narrow, width, device):
    # 256 + 64 x 0.5: a 16-bit sum with 8 bits of mantissa would stay at 256
    total = WeightSum(3, width, torch.float32, torch.float32, device)
    ones = [torch.ones(*shape, dtype=narrow, device=device) for shape in ((3, 1), (1, width))]
    total.add(256 * ones[0], ones[1])
    for _ in range(64):
        total.add(0.5 * ones[0], ones[1])
    assert torch.equal(total.finish(), torch.full((3, width), 288.0, device=device))


def test_temporaries_are_slabs(monkeypatch):
    monkeypatch.setattr(weight_sum, "SLAB", 64)
    a, b = torch.randn(40, 5).bfloat16(), torch.randn(5, 6).bfloat16()
    total = WeightSum(40, 6, torch.float32, torch.bfloat16, torch.device("cpu"))
    total.add(a, b)
    total.add(a, b)
    torch.testing.assert_close(total.finish(), (2 * (a.float() @ b.float())).bfloat16(), rtol=2**-8, atol=0)


def test_nothing_added_is_zero(device):
    assert torch.equal(
        WeightSum(4, 6, torch.float32, torch.bfloat16, device).finish(), torch.zeros(4, 6).bfloat16().to(device)
    )
