"""Every way to cut rows into tiles gives the same result: what a sweep of launch numbers relies on."""

import pytest
import torch

pytest.importorskip("triton")

from liger_kernel.ops.kernels import fused_add_rms_norm, layer_norm, rms_norm, softmax, wide_norm  # noqa: E402
from liger_kernel.ops.kernels.blocks import RowTiles  # noqa: E402

ROWS, COLS = 13, 70

TILES = {
    "one program walks every row": RowTiles(1, 128, False, 1, 1),
    "programs of unequal work": RowTiles(2, 128, False, 1, 3),
    "prefetch": RowTiles(2, 128, False, 1, 3, prefetch=True),
    "prefetch of a single tile each": RowTiles(4, 128, False, 2, 4, prefetch=True),
    "a tile taller than the rows": RowTiles(32, 128, False, 4, 1, prefetch=True),
    "column loop": RowTiles(1, 32, True, 1, 13),
    "column loop over several rows": RowTiles(4, 32, True, 1, 2),
    "column loop of one program": RowTiles(4, 64, True, 1, 1),
}


def passes(op, x, dy, w):
    """Each launcher's call with a `tiles` left to give."""
    if op is softmax:
        y = softmax.softmax_forward(x)
        return [lambda t: (softmax.softmax_forward(x, tiles=t),), lambda t: (softmax.softmax_backward(dy, y, tiles=t),)]
    if op is layer_norm:
        _, *stats = layer_norm.layer_norm_forward(x, w, w, 1e-6)
        saved = dy, x, w, w, *stats, True, True
        return [
            lambda t: layer_norm.layer_norm_forward(x, w, w, 1e-6, tiles=t),
            lambda t: layer_norm.layer_norm_backward(*saved, tiles=t),
        ]
    options = 1e-6, 0.0, "llama"
    if op is fused_add_rms_norm:
        _, s, rstd = op.fused_add_rms_norm_forward(x, dy, w, *options)
        saved = dy, x, s, w, rstd, *options[1:], False, True
        return [
            lambda t: op.fused_add_rms_norm_forward(x, dy, w, *options, tiles=t),
            lambda t: op.fused_add_rms_norm_backward(*saved, tiles=t),
        ]
    _, rstd = op.rms_norm_forward(x, w, *options, x.dtype)
    saved = dy, x, w, rstd, *options[1:], False, True
    return [
        lambda t: op.rms_norm_forward(x, w, *options, x.dtype, tiles=t),
        lambda t: op.rms_norm_backward(*saved, tiles=t),
    ]


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
@pytest.mark.parametrize("op", [rms_norm, fused_add_rms_norm, layer_norm, softmax], ids=lambda op: op.__name__[31:])
def test_result_does_not_depend_on_the_tiling(op, tiles, device, poisoned_memory):
    x, dy = (torch.randn(ROWS, COLS, device=device) for _ in range(2))
    w = torch.randn(COLS, device=device)
    for call in passes(op, x, dy, w):
        for found, expected in zip(call(tiles), call(None), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("columns", [
    wide_norm.Columns(2, 32, 1, 1, 3), wide_norm.Columns(4, 32, 1, 3, 9), wide_norm.Columns(1, 16, 1, 2, 4),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("op", [rms_norm, fused_add_rms_norm, layer_norm], ids=lambda op: op.__name__[31:])
def test_result_does_not_depend_on_the_columns_of_a_wide_row(op, columns, device, poisoned_memory, monkeypatch):
    x, dy = (torch.randn(ROWS, COLS, device=device) for _ in range(2))
    backward = passes(op, x, dy, torch.randn(COLS, device=device))[1]
    expected = backward(None)
    monkeypatch.setattr(wide_norm.Columns, "choose", lambda *sizes: columns)
    for found, wanted in zip(backward(TILES["column loop"]), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_tiles_chosen_for_a_persistent_kernel_fill_the_cores_once(device):
    whole = RowTiles.choose(10**6, 4096, device, live=4)
    walking = RowTiles.choose(10**6, 4096, device, live=4, walks=True)
    assert whole.programs * whole.rows >= 10**6 and not whole.prefetch
    assert walking.programs < whole.programs and walking.prefetch
    assert walking.rows * walking.block == whole.rows * whole.block
    assert not RowTiles.choose(10**6, 10**6, device, live=4, walks=True).prefetch, "a column loop prefetches no row"
