"""What the command line and the demo print with; rich comes with the `apps` extra."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from .data import require
from .explain import Explanation

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_LEFT = ("unit", "kind", "plan", "where", "what", "result")  # columns of words; the others hold figures


def make_console() -> Console:
    """The terminal at its own width; a pipe or a file at one that the tables fit in."""
    width = None if sys.stdout.isatty() else 120
    return require("rich.console", "the command line").Console(width=width)


def make_table(*columns: str, title: str | None = None) -> Table:
    """An empty table: figures right, words (and the first column) left."""
    table = require("rich.table", "the command line").Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 or column in _LEFT else "right")
    return table


def explanation_table(explanation: Explanation, title: str) -> Table:
    """How each unit runs, with the totals in the last row; the reasons are numbered and stand below."""
    *columns, _ = explanation.columns
    table = make_table(*columns, "why", title=title)
    numbers: dict[str, int] = {}
    for *cells, reason in explanation.cells():
        table.add_row(*cells, str(numbers.setdefault(reason, len(numbers) + 1)))
    table.add_section()
    *totals, _ = Explanation([explanation.total()]).cells()[0]
    table.add_row(*totals, "")
    table.caption = "\n".join(f"{number}  {reason}" for reason, number in numbers.items())
    table.caption_justify = "left"
    return table
