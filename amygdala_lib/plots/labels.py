"""Labels: names beside points, where they cover nothing."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from matplotlib.axes import Axes

from .style import readable

DISTANCES = (4, 11, 20, 30)
"""From a point to its name, in typographic points; from the second on a line joins them."""
SIDES = np.array([(1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1)])


def label_points(ax: Axes, points: pd.DataFrame, *, most: int, size: float) -> None:
    """Name points (the frame's index; two columns) without a name on another name or a point.

    Those far from one another come first; a name that fits nowhere is left out, and at most `most`
    are given. Call it when limits and size of the axes are final.
    """
    figure = ax.figure.get_figure(root=True)
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
    unit = figure.dpi / 72
    ax.autoscale_view()  # limits are only brought up to date when asked for
    dots = ax.transData.transform(points.to_numpy())
    frame = ax.get_window_extent()
    taken = np.empty((0, 4))
    for k in _far_apart_first(dots):
        if len(taken) >= most:
            break
        text = readable(points.index[k])
        width, height = _measured(ax, text, size)
        for distance in DISTANCES:
            corners = dots[k] + unit * distance * SIDES + (SIDES - 1) / 2 * (width, height)
            boxes = np.hstack([corners, corners + (width, height)])
            others = np.delete(dots, k, axis=0)
            free = (boxes[:, 0] > frame.x0) & (boxes[:, 2] < frame.x1)
            free &= (boxes[:, 1] > frame.y0) & (boxes[:, 3] < frame.y1)
            free &= ~_holds(_grown(boxes, 3 * unit), others) & ~_meets(boxes, taken)
            # The line that joins name and point keeps clear of names as well.
            steps = np.linspace(0, 1, 6)[:, None, None]
            line = dots[k] + steps * unit * distance * SIDES
            free &= ~np.any([_inside(taken, at) for at in line], axis=0)
            if free.any():
                side = int(np.argmax(free))
                _annotate(ax, text, points.iloc[k], distance * SIDES[side], SIDES[side], size)
                taken = np.vstack([taken, _grown(boxes[side : side + 1], unit)])
                break


def _far_apart_first(dots: Float[np.ndarray, "n 2"]) -> list[int]:
    """All points, each next one the farthest from those before it."""
    order = [int(np.argmax(np.linalg.norm(dots - dots.mean(0), axis=1)))]
    distance = np.linalg.norm(dots - dots[order[0]], axis=1)
    while len(order) < len(dots):
        distance[order[-1]] = -1
        order.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(dots - dots[order[-1]], axis=1))
    return order


def _measured(ax: Axes, text: str, size: float) -> tuple[float, float]:
    """Width and height of a text in pixels."""
    probe = ax.text(0, 0, text, fontsize=size)
    box = probe.get_window_extent()
    probe.remove()
    return box.width, box.height


def _annotate(ax: Axes, text, point, offset, side, size) -> None:
    joined = np.abs(offset).max() > DISTANCES[0]
    ax.annotate(
        text,
        tuple(point),
        xytext=tuple(offset),
        textcoords="offset points",
        fontsize=size,
        ha={1: "left", 0: "center", -1: "right"}[int(side[0])],
        va={1: "bottom", 0: "center", -1: "top"}[int(side[1])],
        arrowprops=(
            {"arrowstyle": "-", "color": "0.55", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
            if joined
            else None
        ),
    )


def _grown(boxes: Float[np.ndarray, "n 4"], by: float) -> Float[np.ndarray, "n 4"]:
    return boxes + by * np.array([-1, -1, 1, 1])


def _meets(
    boxes: Float[np.ndarray, "n 4"], others: Float[np.ndarray, "m 4"]
) -> Bool[np.ndarray, " n"]:
    a, b = boxes[:, None], others[None]
    return ((a[..., :2] < b[..., 2:]) & (b[..., :2] < a[..., 2:])).all(-1).any(1)


def _holds(
    boxes: Float[np.ndarray, "n 4"], dots: Float[np.ndarray, "m 2"]
) -> Bool[np.ndarray, " n"]:
    a, b = boxes[:, None], dots[None]
    return ((a[..., :2] < b) & (b < a[..., 2:])).all(-1).any(1)


def _inside(
    boxes: Float[np.ndarray, "m 4"], dots: Float[np.ndarray, "n 2"]
) -> Bool[np.ndarray, " n"]:
    """Which dots lie in any of the boxes."""
    a, b = boxes[None], dots[:, None]
    return ((a[..., :2] < b) & (b < a[..., 2:])).all(-1).any(1)
