"""Drawings beside and below each other on one sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tvit_cli.report.drawing import Drawing, Line, Shape

GAP = 24.0


def sheet(title: str, drawings: Sequence[Drawing], *, columns: int = 2) -> Drawing:
    """One drawing of all, row by row, each in a cell as large as the largest."""
    width, height = max(d.width for d in drawings) + GAP, max(d.height for d in drawings) + GAP
    shapes = [
        moved(shape, number % columns * width, number // columns * height)
        for number, drawing in enumerate(drawings)
        for shape in drawing.shapes
    ]
    rows = -(-len(drawings) // columns)
    return Drawing(title, min(columns, len(drawings)) * width, rows * height - GAP, shapes)


def moved(shape: Shape, right: float, down: float) -> Shape:
    """The same shape elsewhere."""
    if isinstance(shape, Line):
        return replace(shape, points=[(x + right, y + down) for x, y in shape.points])
    return replace(shape, at=(shape.at[0] + right, shape.at[1] + down))
