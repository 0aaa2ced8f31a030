"""Tables: as plain text, in notebooks, and with rich where that is installed."""

from __future__ import annotations

import html
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, repr=False)
class Table:
    """Rows of text under a header; the last row is the sum of the others, where there is one.

    Args:
        header: the titles of the columns.
        rows: the cells.
        left: how many columns are text, to the left; those after them are figures, to the right.
        has_total: whether the last row is for all.
        title: what stands above it in a console with rich.
        text_at_end: whether the last column is text as well.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 2
    has_total: bool = True
    title: str = "Weight decay groups"
    text_at_end: bool = False

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows)]
        lines = []
        for row in (self.header, *self.rows):
            cells = zip(row, widths, self._aligned())
            lines.append("  ".join(cell.rjust(w) if to_the_right else cell.ljust(w) for cell, w, to_the_right in cells))
        return "\n".join(line.rstrip() for line in lines)

    def _repr_html_(self) -> str:
        """For notebooks."""

        def cells(row: Sequence[str], tag: str) -> str:
            styles = ["right" if to_the_right else "left" for to_the_right in self._aligned()]
            pairs = zip(row, styles)
            return "".join(f'<{tag} style="text-align: {s}">{html.escape(cell)}</{tag}>' for cell, s in pairs)

        rows = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in self.rows)
        return f"<table><thead><tr>{cells(self.header, 'th')}</tr></thead><tbody>{rows}</tbody></table>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """For IPython."""
        printer.text(str(self))

    def __rich__(self) -> Any:
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=self.title, title_justify="left")
        for title, to_the_right in zip(self.header, self._aligned()):
            table.add_column(title, justify="right" if to_the_right else "left", overflow="fold")
        for number, row in enumerate(self.rows, start=1):
            # As Text, since a pattern like `[ab]*` is markup to rich.
            table.add_row(*map(Text, row), end_section=self.has_total and number == len(self.rows) - 1)
        return table

    def print(self) -> None:
        """Print it, with rich where that is installed."""
        if importlib.util.find_spec("rich") is None:
            print(self)
            return
        from rich import print as print_rich

        print_rich(self)

    def _aligned(self) -> list[bool]:
        end = len(self.header) - self.text_at_end
        return [self.left <= number < end for number in range(len(self.header))]


class Tabular:
    """Shows itself as a table: as text, in notebooks, in consoles with rich."""

    @property
    def table(self) -> Table:
        """The table."""
        raise NotImplementedError

    def __str__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """For IPython, which would show all parameters of param groups."""
        printer.text(str(self))

    def __rich__(self) -> Any:
        return self.table.__rich__()


class Lines(str):
    """Text of several lines, which notebooks show as that."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        return preformatted(self)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))


def preformatted(text: str) -> str:
    """Text as it is, for notebooks."""
    return f"<pre>{html.escape(text)}</pre>"
