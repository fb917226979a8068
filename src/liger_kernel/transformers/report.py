"""What was patched in a model, how well it was verified, and what was left alone and why."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from dataclasses import dataclass, field

_COLUMNS = ("module", "count", "kind", "kernel", "error", "left alone because")


@dataclass(frozen=True)
class Row:
    """One module, rope function or head. reason is None where it is patched; error is the worst one verified."""

    module: str
    kind: str
    kernel: str | None = None
    error: float | None = None
    reason: str | None = None


@dataclass
class Report:
    """The rows of one model, in the order of its modules. Prints as a table, layers folded into one line."""

    model: str
    rows: list[Row] = field(default_factory=list)
    note: str = ""  # why there are no rows, where there are none

    @property
    def patched(self) -> list[Row]:
        """The rows that run our kernels."""
        return [r for r in self.rows if r.reason is None]

    @property
    def left(self) -> list[Row]:
        """The rows left as they were, each with its reason."""
        return [r for r in self.rows if r.reason is not None]

    def to_json(self) -> str:
        """The report as JSON: model, note, patched and left."""
        patched, left = ([dataclasses.asdict(r) for r in rows] for rows in (self.patched, self.left))
        return json.dumps({"model": self.model, "note": self.note, "patched": patched, "left": left}, indent=2)

    def summary(self) -> str:
        """One line: how many of what was found are patched."""
        text = f"{self.model}: {len(self.patched)} of {len(self.rows)} found are patched"
        return f"{text} ({self.note})" if self.note else text

    def kinds(self) -> dict[str, dict]:
        """Per kind how many were found and patched, and the worst error that verifying showed."""
        counts: dict[str, dict] = {}
        for row in self.rows:
            of = counts.setdefault(row.kind, {"found": 0, "patched": 0, "error": None})
            of["found"] += 1
            if row.reason is None:
                of["patched"] += 1
                of["error"] = max((e for e in (of["error"], row.error) if e is not None), default=None)
        return counts

    def lines(self) -> list[tuple[str, ...]]:
        """The table's cells; modules that differ only in a number share a line."""
        folded: dict[tuple, list[Row]] = {}
        for row in self.rows:
            pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row.module)
            folded.setdefault((pattern, row.kind, row.kernel, row.reason), []).append(row)
        cells: list[tuple[str, ...]] = []
        for (pattern, kind, kernel, reason), rows in folded.items():
            errors = [r.error for r in rows if r.error is not None]
            worst = f"{max(errors):.0e}" if errors and reason is None else ""
            cells.append((pattern, str(len(rows)), kind, kernel or "", worst, reason or ""))
        return cells

    def __str__(self) -> str:
        table = [_COLUMNS, *self.lines()]
        widths = [max(len(line[i]) for line in table) for i in range(len(_COLUMNS))]
        if sys.stdout.isatty() and (rendered := self._rendered()):
            return rendered
        text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table]
        return "\n".join([self.summary(), *text])

    def _rendered(self) -> str | None:
        """The table as rich draws it, or None without rich."""
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            return None
        table = Table(*_COLUMNS, title=self.summary())
        for line in self.lines():
            table.add_row(*line, style="" if not line[-1] else "yellow")
        console = Console()
        with console.capture() as drawn:
            console.print(table)
        return drawn.get().rstrip("\n")
