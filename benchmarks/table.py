"""The table that the suites print: a row a case and kind of work, variants as columns."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

from resnet_fused.data import require
from resnet_fused.measure import Ratio

COLUMNS = {"eager": "eager", "compile": "compile", "ours": "ours", "lean": "ours", "fast": "fast"}
LEAST_WIDTH = 140


class Row(NamedTuple):
    """One variant's result."""

    case: str
    work: str
    variant: str
    seconds: list[float]
    info: dict[str, Any]

    @property
    def column(self) -> str:
        """An op of ours and a block that is lean stand below each other."""
        return COLUMNS.get(self.variant, self.variant)


def columns_of(rows: Sequence[Row]) -> list[str]:
    found = dict.fromkeys(row.column for row in rows)
    return [c for c in dict.fromkeys(COLUMNS.values()) if c in found] + [c for c in found if c not in COLUMNS]


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a line for each case and kind of work: medians, ratios and, where counted, the roofline's share."""
    columns = columns_of(rows)
    others = [c for c in columns if c != "eager"]
    lines: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row.case, row.work), {})[row.column] = row
    shares = any("share" in row.info for row in rows)
    head = ["case", "work", *(f"{c}, ms" for c in columns), *(f"eager/{c}" for c in others)]
    out = []
    for (case, work), by in lines.items():
        line = [case, work, *(f"{1e3 * median(by[c].seconds):.3f}" if c in by else "" for c in columns)]
        for c in others:
            ratio = by[c].info.get("ratio") if c in by else None
            line.append(str(Ratio(**ratio)) if ratio else "")
        if shares:
            own = by["ours"].info if "ours" in by else {}
            line += [f"{own['gbs']:.1f}" if "gbs" in own else "", f"{own['share']:.0%}" if "share" in own else ""]
        out.append(line)
    return head + ["ours, GB/s", "of the roof"] * shares, out


def print_table(rows: Sequence[Row], title: str) -> None:
    """By rich, at a width that holds the line of a case."""
    head, lines = cells(rows)
    table = require("rich.table", "the benchmark").Table(title=f"measured: {title}", title_justify="left")
    for i, column in enumerate(head):
        table.add_column(column, justify="left" if i < 2 else "right", no_wrap=i < 2)
    for line in lines:
        table.add_row(*line)
    console = require("rich.console", "the benchmark").Console()
    console.width = max(console.width, LEAST_WIDTH)
    console.print(table)
