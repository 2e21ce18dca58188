"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def aligned_table(rows: Sequence[Sequence[str]]) -> str:
    """A header, a rule under it, and the other rows: the first column to the left, the others to the right."""
    header, *body = rows
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        return "  ".join([row[0].ljust(widths[0]), *cells]).rstrip()

    return "\n".join([line(header), "─" * (sum(widths) + 2 * (len(widths) - 1)), *map(line, body)])
