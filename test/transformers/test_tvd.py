"""What is special about TVD: its helpers."""

import torch

from liger_kernel.ops.tvd import tv_distance_forward_triton, tvd_backward_triton


def test_helpers_give_the_loss_and_its_gradient(impl, device):
    p, q = (torch.randn(5, 17, device=device).softmax(-1) for _ in range(2))
    labels = torch.tensor([1, -100, 3, 0, -100], device=device)
    for given, rows in ((False, 5), (True, 3)):
        live = (labels != -100 if given else torch.ones_like(labels, dtype=torch.bool))[:, None]
        loss, dp = tv_distance_forward_triton(p, q, labels, "batchmean", -100, given)
        torch.testing.assert_close(loss, ((p - q).abs() * live).sum() / 2 / rows)
        found = tvd_backward_triton(torch.tensor(2.0, device=device), dp)
        assert found is dp
        torch.testing.assert_close(found, (p - q).sign() * live / rows)
