"""A result as a table, for a terminal and for a Markdown page, out of the same cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Sheet:
    """`notes`: lines beneath the table, or alone where there are no columns."""

    columns: tuple[str, ...] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()


def print_sheets(console: Console, sheets: Sequence[Sheet]) -> None:
    for sheet in sheets:
        if sheet.columns:
            table = Table(*sheet.columns)
            for row in sheet.rows:
                table.add_row(*row)
            console.print(table)
        for note in sheet.notes:
            console.print(note, markup=False)


def markdown(sheets: Sequence[Sheet]) -> str:
    """The sheets as Markdown tables, their notes as paragraphs.

    >>> print(markdown([Sheet(("case", "ms"), [["a|b", "1"]], ["Two rounds."])]))
    | case | ms |
    |---|---|
    | a\\\\|b | 1 |
    <BLANKLINE>
    Two rounds.
    <BLANKLINE>
    """
    parts: list[str] = []
    for sheet in sheets:
        if sheet.columns:
            lines = [sheet.columns, ["---"] * len(sheet.columns), *sheet.rows]
            cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
            table = [f"| {' | '.join(line)} |" for line in cells]
            table[1] = f"|{'---|' * len(sheet.columns)}"
            parts.append("\n".join(table) + "\n")
        parts += [f"{note}\n" for note in sheet.notes]
    return "\n".join(parts)
