"""Several short documents in one row."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put documents into rows of ``capacity`` tokens: the longest first, each into the fullest row that still takes it.

    Best-fit decreasing needs at most 11/9 of the optimal number of rows plus a constant (Johnson, 1974). The result
    depends on the lengths and their order alone: equal lengths go in order, each row lists its documents in order, and
    rows are ordered by their first document, so that packed data keeps the source's order as far as it can.

    Args:
        lengths: tokens of each document, 1 to ``capacity``.
        capacity: tokens of a row.

    Returns:
        For each row the indices of its documents.

    Raises:
        ValueError: a document is longer than a row.
    """
    rows: list[list[int]] = []
    rooms: list[int] = []  # distinct free spaces of open rows, ascending
    rows_with_room: defaultdict[int, list[int]] = defaultdict(list)
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if not 0 < length <= capacity:
            raise ValueError(f"document {index} has {length} tokens, a row takes 1 to {capacity}")
        position = bisect_left(rooms, length)
        if position == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[position]
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                del rooms[position]
        rows[row].append(index)
        if left := room - length:
            if not rows_with_room[left]:
                insort(rooms, left)
            rows_with_room[left].append(row)
    return sorted(sorted(row) for row in rows)
