"""Frames: what a figure asks of the one it draws."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from ..errors import AmygdalaError


def check_frame(
    frame: pd.DataFrame, figure: str, columns: Iterable[str] = (), *, each: str | None = None
) -> None:
    """Raises AmygdalaError that names all of: absent columns, no rows, two rows of one thing.

    `each` is what the frame has one row of each for, its index: "concept", say.
    """
    problems = []
    if absent := [column for column in columns if column not in frame.columns]:
        there = ", ".join(map(str, frame.columns)) or "none"
        problems.append(f"{figure} needs the columns {', '.join(absent)}: the frame has {there}")
    if frame.empty:
        rows, held = frame.shape
        problems.append(f"{figure} got an empty frame ({rows} rows, {held} columns)")
    if each and not frame.index.is_unique:
        name = frame.index[frame.index.duplicated()][0]
        times = list(frame.index).count(name)
        problems.append(f"{figure} draws one row per {each}: {name!r} has {times}")
    elif each and frame.index.nlevels > 1:
        held = ", ".join(map(str, frame.index.names))
        problems.append(
            f"{figure} draws one row per {each}, the frame is indexed by {held}: "
            "choose one layer, frame.xs(layer, level='layer')"
        )
    if problems:
        raise AmygdalaError("\n".join(problems))


def check_measured(values: pd.DataFrame | pd.Series, figure: str) -> None:
    """Raises AmygdalaError if there is no number among the values."""
    if not values.notna().to_numpy().any():
        raise AmygdalaError(f"{figure} has nothing to draw: all {values.size} values are missing")
