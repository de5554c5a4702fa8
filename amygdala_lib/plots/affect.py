"""Affect: concepts as points in a plane, such as that of valence and arousal."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..errors import AmygdalaError
from .frames import check_frame, check_measured
from .labels import label_points
from .style import MANY, PALETTE, cluster_colours, readable, set_title

SHAPES = "osD^vP"
APART, FURTHEST = 0.009, 0.025
"""Between points of one place and from it, as shares of the plane: a dot is about 0.013 wide."""


def affect_plane(
    points: pd.DataFrame,
    *,
    x: str = "valence",
    y: str = "arousal",
    clusters: Sequence[str] | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Concepts (the frame's index) in a plane of two of its columns; if many, a few are named.

    Concepts at the very same place are spread around it, by a few hundredths of the plane at most.
    Concepts without a coordinate are left out, and the axes say how many. Raises AmygdalaError for
    absent columns, no rows, a concept in two rows, or clusters of another number than concepts.
    """
    check_frame(points, "affect_plane", [x, y], each="concept")
    if clusters is not None and len(clusters) != len(points):
        raise AmygdalaError(f"affect_plane got {len(clusters)} clusters for {len(points)} concepts")
    check_measured(points[[x, y]].dropna(), "affect_plane")
    groups = pd.Series("concept" if clusters is None else list(clusters), index=points.index)
    measured = points[[x, y]].dropna().astype(float)
    many = len(measured) > MANY
    if ax is None:
        _, ax = plt.subplots(figsize=(10.5, 8.5) if many else (8.5, 7))
    places = pd.DataFrame(apart(measured.to_numpy()), measured.index, [x, y])
    ax.axhline(0, color="0.8", linewidth=1, zorder=0)
    ax.axvline(0, color="0.8", linewidth=1, zorder=0)
    handles = _draw_clusters(ax, places, groups[measured.index])
    ax.set(xlabel=x, ylabel=y)
    ax.margins(x=0.1)  # room for the names on the right
    if left_out := len(points) - len(measured):
        ax.set_xlabel(f"{x}\n({left_out} of {len(points)} concepts not measured)")
    if len(handles) > 1:
        ax.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0),
            frameon=False, fontsize=8,
        )  # fmt: skip
    sns.despine(ax=ax)
    set_title(ax, _correlation(measured) if title is None else title)
    label_points(ax, places, most=MANY, size=7 if many else 8)
    return ax.figure


def apart(points: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
    """The points, those of one place spread around it like the seeds of a sunflower.

    Seed k lies at sqrt(k) times the spacing and k times the golden angle (Vogel 1979, A better way
    to construct the sunflower head); their mean stays where they were.
    """
    extent = np.ptp(points, axis=0)
    extent[extent == 0] = 1
    _, place = np.unique((points / extent).round(6), axis=0, return_inverse=True)
    place, spread = place.ravel(), points.astype(float)
    for rows in (np.flatnonzero(place == k) for k in np.unique(place)):
        seeds = np.arange(len(rows))
        angle = seeds * np.pi * (3 - np.sqrt(5))
        radius = np.sqrt(seeds + 0.5) * min(APART, FURTHEST / np.sqrt(len(rows)))
        offset = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        spread[rows] += (offset - offset.mean(0)) * extent
    return spread


def _draw_clusters(ax: Axes, places: pd.DataFrame, groups: pd.Series) -> list[Line2D]:
    colours = cluster_colours(groups)
    # More clusters than the colours that everyone can tell apart: they differ in shape as well.
    shapes = SHAPES if len(colours) > len(PALETTE) else "o"
    handles = []
    for i, (cluster, colour) in enumerate(colours.items()):
        shape = shapes[i % len(shapes)]
        own = places[groups == cluster].to_numpy()
        ax.scatter(
            *own.T, color=[colour], marker=shape, s=28, edgecolor="white", linewidth=0.5, zorder=2
        )
        handles.append(
            Line2D([], [], color=colour, marker=shape, linestyle="", label=readable(cluster))
        )
    return handles


def _correlation(points: pd.DataFrame) -> str:
    x, y = points.columns
    named = f"{readable(x[:1].upper() + x[1:])} and {readable(y)} of {len(points)} concepts"
    if len(points) < 3 or (points.nunique() < 2).any():
        return named
    return f"{named} correlate at r = {points[x].corr(points[y]):+.2f}"
