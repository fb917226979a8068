"""The picture: loss curves on top of each other; memory and speed side by side."""

from __future__ import annotations

from pathlib import Path

from liger_kernel.cli import report
from liger_kernel.cli.train import Result

COLORS = {"transformers": "#8a8f98", "liger_kernel": "#c2410c"}


def save(plain: Result | None, patched: Result | None, tokens: int, path: Path) -> None:
    """Write a PNG to `path`; a run that was out of memory leaves a gap."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = dict(zip(COLORS, (plain, patched), strict=True))
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    curve, memory, head, speed = figure.subplots(1, 4, width_ratios=[2.4, 1, 1, 1])
    styles: list[dict] = [{"linewidth": 4}, {"linewidth": 1.5, "linestyle": "--"}]
    for (name, run), style in zip(runs.items(), styles, strict=True):
        if run:
            curve.plot(range(1, len(run.losses) + 1), run.losses, label=name, color=COLORS[name], **style)
    curve.set(title="loss", xlabel="step")
    curve.legend(frameon=False)
    _bars(memory, "peak memory, GB", [run.peak / 1e9 if run else None for run in runs.values()])
    _bars(head, "loss head, GB", [(run.head or 0) / 1e9 if run else None for run in runs.values()])
    rates = [report.tokens_per_second(run, tokens) if run else None for run in runs.values()]
    _bars(speed, "tokens per second", rates, "{:,.0f}")
    for axes in (curve, memory, head, speed):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, format="png")


def _bars(axes, title: str, values: list[float | None], form: str = "{:.2f}") -> None:
    bars = axes.bar(list(COLORS), [value or 0 for value in values], color=list(COLORS.values()))
    axes.bar_label(bars, [report.MISSING if value is None else form.format(value) for value in values])
    axes.set(title=title, yticks=[])
    axes.margins(y=0.15)
    axes.tick_params(axis="x", labelsize=8)
