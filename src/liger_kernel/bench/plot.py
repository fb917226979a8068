"""A picture per op: a bar for each contender against the ceiling of the device, one panel for each shape."""

from __future__ import annotations

from pathlib import Path

COLORS = {"ours": "#c2410c", "base": "#f0a884"}
OTHER = "#8a8f98"


def save(op: str, rows: list[dict], card: dict, path: Path) -> bool:
    """Write a PNG to `path`. False where there is nothing to show or no matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    done = [r for r in rows if r["op"] == op and "failed" not in r]
    panels = list(dict.fromkeys((r["shape"], r["mode"]) for r in done))
    if not panels:
        return False
    key, ceiling = ("TFLOP_s", "gemm_TFLOP_s") if "TFLOP_s" in done[0] else ("TB_s", "copy_TB_s")
    across = min(len(panels), 4)
    down = -(-len(panels) // across)
    figure = Figure(figsize=(2.8 * across + 0.4, 2.6 * down), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (shape, mode) in zip(figure.subplots(down, across, squeeze=False).flat, panels):
        bars = [r for r in done if (r["shape"], r["mode"]) == (shape, mode)]
        drawn = axes.bar([r["peer"] for r in bars], [r[key] for r in bars],
                         color=[COLORS.get(r["peer"], OTHER) for r in bars])  # fmt: skip
        axes.bar_label(drawn, fmt="%.2f" if key == "TB_s" else "%.0f", fontsize=7)
        axes.axhline(card[ceiling], color="black", linewidth=0.8, linestyle="--")
        axes.set_title(f"{shape} {mode}", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(figure.axes)[len(panels) :]:
        axes.set_visible(False)
    unit = "TFLOP/s, dashed: a bare GEMM" if key == "TFLOP_s" else "TB/s, dashed: a bare copy"
    figure.suptitle(f"{op}, {unit}", fontsize=9)
    figure.savefig(path, dpi=120, format="png")
    return True
