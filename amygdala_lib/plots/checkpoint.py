"""Checkpoints: where a model's bytes changed, by how much, and what keeping the change takes."""

from __future__ import annotations

import re
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from ..errors import AmygdalaError
from .frames import check_frame, check_measured
from .style import (
    LEGEND_PAD,
    MANY,
    ORANGE,
    PALETTE,
    SEQUENTIAL,
    every,
    hatch_missing,
    layer_phrase,
    legend_above,
    readable,
    set_title,
)
from .training import GROUPS, group_of, label_map, place_of, short_name

_LAYER = re.compile(r"\.(\d+)\.(.+)$")
_MARKERS = "osD^vPX"


def change_map(
    changes: pd.DataFrame,
    of: Literal["elements", "blocks"] = "elements",
    *,
    ax: Axes | None = None,
    title: str | None = None,
) -> Figure:
    """The share of elements, or of 4 KB blocks, that changed: layers by parts.

    `changes` is `Difference.to_frame()`. The experts of a layer are taken together; the largest
    share is framed, if there is only one. Hatched where a layer has no such part, white where
    nothing changed. What is in no layer stands below the map.

    Raises AmygdalaError for absent columns, no rows, a tensor in two rows, or tensors of no layer
    only.
    """
    changed = f"changed_{of}"
    check_frame(changes, "change_map", [of, changed], each="tensor")
    placed = _placed(changes)
    outside = placed["layer"].isna()
    if outside.all():
        raise AmygdalaError(
            "change_map draws layers, but these tensors are in none: "
            f"{', '.join(map(str, changes.index[:5]))}"
        )
    sums = placed[~outside].groupby(["layer", "part"])[[of, changed]].sum()
    values = (sums[changed] / sums[of]).unstack("part")
    values = values[sorted(values.columns, key=place_of)]
    check_measured(values, "change_map")
    array = values.to_numpy(float)
    if ax is None:
        cell = max(0.15, min(0.36, 9.5 / len(values)))
        size = (max(7.0, 0.36 * values.shape[1] + 2.2), cell * len(values) + 2.6)
        _, ax = plt.subplots(figsize=size, layout="constrained")
    colours = plt.get_cmap(SEQUENTIAL).with_extremes(under="white")
    # The smallest share there is must not look like none.
    high = np.nanmax(array) or 1.0
    least = min(np.nanmin(array[array > 0], initial=high) / 2, high / 100)
    image = ax.imshow(
        array, cmap=colours, vmin=least, vmax=high, aspect="auto", interpolation="nearest"
    )
    hatch_missing(ax)
    highest = np.argwhere(array == high)
    if len(highest) == 1:
        corner = (highest[0, 1] - 0.5, highest[0, 0] - 0.5)
        ax.add_patch(
            Rectangle(corner, 1, 1, fill=False, edgecolor=ORANGE, linewidth=2, clip_on=False)
        )
    label_map(ax, values, [group_of(part) for part in values.columns])
    bar = ax.figure.colorbar(
        image, ax=ax, fraction=0.05, pad=0.02, format=PercentFormatter(1.0, _decimals(high))
    )
    bar.set_label(f"{of} changed")
    ax.set_xlabel(_beside(placed[outside], of), fontsize=9)
    total = changes[changed].sum() / changes[of].sum()
    found = f"{_percent(total)} of the {of} changed"
    if len(highest) == 1:
        row, column = highest[0]
        where = f"{short_name(values.columns[column])} of {layer_phrase(int(values.index[row]))}"
        found += f", most in {where} ({_percent(high)})"
    elif len(highest):
        cells = np.isfinite(array).sum()
        found += f", {_percent(high)} of them in {len(highest)} of {cells} cells"
    set_title(ax, found if title is None else title, pad=LEGEND_PAD)
    return ax.figure


def change_by_component(
    changes: pd.DataFrame, *, ax: Axes | None = None, title: str | None = None
) -> Figure:
    """The largest |change| of any element of each part, over all layers, on a log scale.

    `changes` is `Difference.to_frame()`. Beside each bar stands the share of the part's elements
    that changed; parts without a change have no bar and are left out. Raises AmygdalaError for
    absent columns, no rows, a tensor in two rows, or no change of a floating-point element.
    """
    columns = ["elements", "changed_elements", "largest_change"]
    check_frame(changes, "change_by_component", columns, each="tensor")
    grouped = _placed(changes).groupby("part")
    rows = grouped[columns[:2]].sum().assign(largest=grouped["largest_change"].max())
    rows = rows[rows["largest"] > 0].sort_values("largest", ascending=False, kind="stable")
    if rows.empty:
        raise AmygdalaError("change_by_component has nothing to draw: no element changed")
    if np.isinf(rows["largest"]).any():
        names = rows.index[np.isinf(rows["largest"])]
        raise AmygdalaError(f"values that are not finite come or go in {', '.join(names)}")
    shares = rows["changed_elements"] / rows["elements"]
    groups = [group_of(part) for part in rows.index]
    if ax is None:
        height = 1.6 + 0.26 * min(len(rows), MANY)
        _, ax = plt.subplots(figsize=(7.5, height), layout="constrained")
    places = np.arange(len(rows))[::-1]
    ax.barh(places, rows["largest"], height=0.7, color=[GROUPS[group] for group in groups])
    ax.set_xscale("log")
    ax.set_xlim(rows["largest"].min() / 4, rows["largest"].max() * 4)
    short = pd.Series({part: short_name(part) for part in rows.index})
    label = short.where(~short.duplicated(keep=False), short.index)
    shown = every(len(rows), MANY)
    for place, end, share in list(zip(places, rows["largest"], shares, strict=True))[shown]:
        ax.annotate(
            _percent(share), (end, place), (4, 0), textcoords="offset points", va="center",
            fontsize=8, color="0.3",
        )  # fmt: skip
    ax.set_yticks(places[shown], list(label.iloc[shown]))
    ax.tick_params(axis="y", length=0, labelsize=9)
    ax.set(ylim=(-0.7, len(rows) - 0.3))
    ax.set_xlabel("largest |change| of an element; beside it, share of elements changed")
    present = [group for group in GROUPS if group in groups]
    legend_above(ax, [Patch(color=GROUPS[group], label=group) for group in present])
    widest, narrowest = shares.idxmax(), shares.idxmin()
    found = (
        f"An element moved by {rows['largest'].iloc[0]:.2g} at most, in {label.iloc[0]}; "
        f"most elements of {label[widest]} moved ({_percent(shares[widest])}), fewest of "
        f"{label[narrowest]} ({_percent(shares[narrowest])})"
    )
    set_title(ax, found if title is None else title, pad=LEGEND_PAD)
    sns.despine(ax=ax, left=True)
    return ax.figure


def delta_sizes(
    sizes: pd.DataFrame, *, whole: float, ax: Axes | None = None, title: str | None = None
) -> Figure:
    """Bytes of deltas against what makes them grow, on log scales: a line per column.

    `sizes` has the bytes, its index the number of steps, the density of changes or the like, above
    0, and is named for it. `whole` is the bytes of everything, a dotted line. Sizes of 0 have no
    place on a log scale and are left out. Raises AmygdalaError for no rows, two rows of one index,
    an index that is not above 0, no size above 0, or a `whole` that is not above 0.
    """
    check_frame(sizes, "delta_sizes", each=str(sizes.index.name or "size"))
    positive = sizes.where(sizes > 0).sort_index()
    check_measured(positive, "delta_sizes")
    if not (sizes.index > 0).all() or not whole > 0:
        least = sizes.index.min()
        raise AmygdalaError(
            f"delta_sizes has log scales: its index begins at {least}, the whole is {whole} bytes; "
            "both must be above 0"
        )
    if ax is None:
        _, ax = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    for number, column in enumerate(positive):
        ax.plot(
            positive.index, positive[column], label=readable(column),
            color=PALETTE[number % len(PALETTE)], marker=_MARKERS[number % len(_MARKERS)],
            markersize=5, linestyle=("-", "--")[number % 2],
        )  # fmt: skip
    ax.axhline(whole, color="0.4", linestyle=":", linewidth=1.2, label="everything")
    ax.set(xscale="log", yscale="log", xlabel=sizes.index.name, ylabel="size")
    ax.set_xticks(positive.index, [f"{value:g}" for value in positive.index])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _bytes(value)))
    ax.grid(axis="y", color="0.9")
    ax.legend(
        loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9, borderaxespad=0
    )
    last = positive.iloc[-1].dropna()
    found = (
        f"At {positive.index[-1]:g} {sizes.index.name or ''}, {readable(last.idxmin())} takes "
        f"{_percent(last.min() / whole)} of everything, {readable(last.idxmax())} "
        f"{_percent(last.max() / whole)}"
    )
    set_title(ax, found if title is None else title)
    sns.despine(ax=ax)
    return ax.figure


def _placed(changes: pd.DataFrame) -> pd.DataFrame:
    """With layer and part of each tensor, by its name; experts, which are numbered, as one part."""
    layers, parts = [], []
    for name in changes.index:
        found = _LAYER.search(f".{name}")
        layers.append(int(found[1]) if found else None)
        part = (found[2] if found else str(name)).removesuffix(".weight")
        parts.append(re.sub(r"\.\d+(?=\.|$)", "", part))
    return changes.assign(layer=pd.array(layers, dtype="Int64"), part=parts)


def _beside(outside: pd.DataFrame, of: str) -> str:
    """Of the tensors that are in no layer, what a cell would say."""
    shares = outside[f"changed_{of}"] / outside[of]
    names = [part.split(".")[-1] for part in outside["part"]]
    named = [f"{name} {_percent(share)}" for name, share in zip(names, shares, strict=True)]
    return f"in no layer: {', '.join(named)}" if named else ""


def _percent(share: float) -> str:
    return f"{share:.{_decimals(share)}%}"


def _decimals(share: float) -> int:
    """Digits after the point for a share as a percentage, so that two figures are seen."""
    if share == 0 or 0.1 <= share <= 0.99 or share >= 1:
        return 0
    if 0.99 < share < 1:  # short of 100% is not 100%
        return int(max(1, -np.floor(np.log10(100 * (1 - share)))))
    return int(min(6, max(1, 1 - np.floor(np.log10(100 * share)))))


def _bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g} B"
