"""Training: where a gradient went, layer by layer and part by part, and what came of runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from ..errors import AmygdalaError
from .components import KINDS
from .frames import check_frame, check_measured
from .style import (
    BLUE,
    LEGEND_PAD,
    MANY,
    ORANGE,
    PALETTE,
    SEQUENTIAL,
    Colour,
    darkened,
    every,
    hatch_missing,
    layer_phrase,
    legend_above,
    number,
    readable,
    set_suptitle,
    set_title,
    wrapped,
)

GROUPS = {**KINDS, "MLP": BLUE, "norms": (0.55, 0.55, 0.55), "other": PALETTE[4]}
"""What a parameter is part of, in the order of the columns of a map."""
DECADES = 6
"""So far below the largest, colours go."""
_ORDER = [
    *("q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "in_proj_b"),
    *("in_proj_a", "A_log", "dt_bias", "conv1d", "out_proj", "gate_proj", "up_proj", "down_proj"),
]


def gradient_map(
    changes: pd.DataFrame,
    of: Literal["gradient", "change"] = "gradient",
    *,
    ax: Axes | None = None,
    title: str | None = None,
) -> Figure:
    """The gradient, or the change, relative to the weights: layers by parts, on a log scale.

    `changes` is `TrainingResult.changes`. A cell is the norm of the gradient (change) over the norm
    of the weights, the experts of a layer taken together; the largest is framed. Parts are grouped
    as in `GROUPS`, so that hybrid layers show by what they have; hatched where a layer has no such
    part, or one of zeros only; white is 0, or six decades below the largest. What is in no layer
    stands below the map.

    Raises AmygdalaError for absent columns, no rows, a parameter in two rows, parameters of no
    layer only, or nothing measured.
    """
    check_frame(changes, "gradient_map", ["layer", "part", "norm", of], each="parameter")
    check_measured(changes[of], "gradient_map")
    outside = changes["layer"].isna()
    if outside.all():
        raise AmygdalaError(
            "gradient_map draws layers, but these parameters are in none: "
            f"{', '.join(map(str, changes.index[:5]))}"
        )
    values = _relative(changes[~outside], of).unstack("part")
    values = values[sorted(values.columns, key=place_of)]
    groups = [group_of(part) for part in values.columns]
    array = values.to_numpy(float)
    colours = _log_colours(array)
    least = colours["norm"].vmin
    if ax is None:
        cell = max(0.15, min(0.36, 9.5 / len(values)))
        size = (max(7.0, 0.36 * values.shape[1] + 2.2), cell * len(values) + 2.6)
        _, ax = plt.subplots(figsize=size, layout="constrained")
    # A logarithm has no place for 0, and would leave it out as if there were nothing.
    drawn = np.maximum(array, least / 10)
    image = ax.imshow(drawn, aspect="auto", interpolation="nearest", **colours)
    hatch_missing(ax)
    row, column = np.unravel_index(np.nanargmax(array), array.shape)
    corner = (column - 0.5, row - 0.5)
    ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=ORANGE, linewidth=2, clip_on=False))
    label_map(ax, values, groups)
    below = "min" if (array < least).any() else "neither"
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.05, pad=0.02, extend=below)
    bar.set_label(f"{of} / weights (norms)")
    ax.set_xlabel(_beside(changes[outside], of), fontsize=9)
    low = np.unravel_index(np.nanargmin(array), array.shape)
    found = (
        f"For its weights the {of} is largest in {_named(values, (row, column))}, smallest in "
        f"{_named(values, low)}"
    )
    set_title(ax, found if title is None else title, pad=LEGEND_PAD)
    return ax.figure


def part_bars(
    frame: pd.DataFrame, *, unit: str, ax: Axes | None = None, title: str | None = None
) -> Figure:
    """One bar per part, the longest at the top, coloured by what the part belongs to.

    `frame` has a row per part (`self_attn.q_proj`). Bars are its last column; columns before it, if
    there are any, are marked on the bars. Raises AmygdalaError for no rows, no columns, a part in
    two rows, or nothing measured in the last column.
    """
    check_frame(frame, "part_bars", each="part")
    column = frame.columns[-1]
    check_measured(frame[column], "part_bars")
    rows = frame.dropna(subset=column).sort_values(column, ascending=False, kind="stable")
    groups = [group_of(part) for part in rows.index]
    if ax is None:
        height = 1.6 + 0.26 * min(len(rows), MANY)
        width = max(7.5, 2.0 + 1.3 * (len(set(groups)) + frame.shape[1] - 1))  # for the legend
        _, ax = plt.subplots(figsize=(width, height), layout="constrained")
    places = np.arange(len(rows))[::-1]
    ax.barh(places, rows[column], height=0.7, color=[GROUPS[group] for group in groups])
    handles = [Patch(color=GROUPS[group], label=group) for group in GROUPS if group in groups]
    for earlier, marker in zip(frame.columns[:-1], "|x+.", strict=False):
        marks = ax.plot(
            rows[earlier], places, linestyle="", marker=marker, color=ORANGE, markersize=9,
            markeredgewidth=2, label=str(earlier),
        )  # fmt: skip
        handles += marks
    shown = every(len(rows), MANY)
    ax.set_yticks(places[shown], [short_name(part) for part in rows.index[shown]])
    ax.tick_params(axis="y", length=0, labelsize=9)
    ax.set(xlabel=unit, ylim=(-0.7, len(rows) - 0.3))
    if rows.min(axis=None) >= 0:
        ax.set_xlim(left=0)
    else:
        ax.axvline(0, color="0.3", linewidth=0.8)
    legend_above(ax, handles)
    first, last = rows.index[0], rows.index[-1]
    found = (
        f"{unit[:1].upper()}{unit[1:]}: {short_name(first)} {_figure(rows[column].iloc[0])}, "
        f"{short_name(last)} {_figure(rows[column].iloc[-1])}"
    )
    set_title(ax, found if title is None else title, pad=LEGEND_PAD)
    sns.despine(ax=ax, left=True)
    return ax.figure


def training_curves(frame: pd.DataFrame, *, unit: str = "", title: str | None = None) -> Figure:
    """What was measured between the steps of one or more runs: a panel per measure, a line per run.

    `frame` is indexed by run and step, with a column per measure, all in `unit`; a dotted line is
    where the first run began. Raises AmygdalaError for another index, no rows, a step of a run in
    two rows, or columns in which nothing was measured.
    """
    check_frame(frame, "training_curves")
    problems = []
    if list(frame.index.names) != ["run", "step"]:
        held = ", ".join(map(str, frame.index.names))
        problems.append(f"training_curves needs the index run, step: the frame has {held}")
    elif not frame.index.is_unique:
        twice = frame.index[frame.index.duplicated()][0]
        problems.append(f"training_curves draws one point per run and step: {twice} is there twice")
    if empty := [str(column) for column in frame if frame[column].isna().all()]:
        problems.append(f"training_curves has nothing to draw of {', '.join(empty)}")
    if problems:
        raise AmygdalaError("\n".join(problems))
    runs = list(dict.fromkeys(frame.index.get_level_values("run")))
    palette = dict(zip(runs, PALETTE * (1 + len(runs) // len(PALETTE)), strict=False))
    rows = math.ceil(frame.shape[1] / 3)
    columns = math.ceil(frame.shape[1] / rows)
    figure, axes = plt.subplots(
        rows, columns, figsize=(max(6.0, 1.0 + 3.6 * columns), 0.7 + 2.6 * rows), squeeze=False,
        sharex=True, layout="constrained",
    )  # fmt: skip
    for ax in axes.flat[frame.shape[1] :]:
        ax.set_axis_off()
    for ax, column in zip(axes.flat, frame, strict=False):
        for run in runs:
            curve = frame.xs(run, level="run")[column].sort_index().dropna()
            style = {"marker": "o", "markersize": 4} if len(curve) <= 30 else {}
            ax.plot(curve.index, curve, color=palette[run], label=readable(run), **style)
        ax.axhline(frame[column].dropna().iloc[0], color="0.5", linewidth=0.8, linestyle=":")
        ax.set_title(readable(column), loc="left", fontsize=10)
        ax.set_xlabel("step")
        ax.tick_params(labelbottom=True)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        sns.despine(ax=ax)
    if len(runs) > 1:
        figure.legend(
            *axes[0, 0].get_legend_handles_labels(), loc="outside lower center",
            ncols=min(len(runs), 4), frameon=False, fontsize=9,
        )  # fmt: skip
    figure.supylabel(unit, fontsize=10)
    set_suptitle(figure, _course(frame, runs) if title is None else title)
    return figure


def sweep_grid(
    frame: pd.DataFrame,
    x: str,
    *,
    labels: Mapping[str, str],
    title: str,
    along: str | None = None,
    log_x: bool = False,
    baseline: Mapping[str, float] | None = None,
) -> Figure:
    """Small multiples of a sweep: a row per measure, a column per panel, a line per run.

    `frame` has a row per point: the columns panel, run, measure, `x`, value, and low and high, the
    ends of its interval (NaN for none). Panels, runs and measures stand in the order they first
    have. A run's points are joined in the order of the column `along`: `x`, if there is none, or
    the dose where `x` is an effect. `labels` are the axes' by name of a measure, and that of `x`; a
    measure's panels share its scale. `baseline` is where a measure was before anything was done, a
    dotted line.

    Raises AmygdalaError for absent columns, no rows, two points of a run at one `along`, a measure
    or x without a label, nothing measured, or an x of 0 or less on a logarithmic axis.
    """
    along = x if along is None else along
    _check_sweep(frame, x, along, labels, log_x)
    panels, runs, measures = (list(dict.fromkeys(frame[c])) for c in ("panel", "run", "measure"))
    figure, axes = plt.subplots(
        len(measures), len(panels), squeeze=False, sharex=True, sharey="row", layout="constrained",
        figsize=(max(7.0, 1.2 + 2.5 * len(panels)), 1.3 + 2.0 * len(measures)),
    )  # fmt: skip
    palette = dict(zip(runs, PALETTE * (1 + len(runs) // len(PALETTE)), strict=False))
    for (measure, panel), ax in zip(product(measures, panels), axes.flat, strict=True):
        if baseline and measure in baseline:
            ax.axhline(baseline[measure], color="0.5", linewidth=0.8, linestyle=":", zorder=0)
        rows = frame[(frame["measure"] == measure) & (frame["panel"] == panel)]
        for run, line in rows.groupby("run", sort=False):
            _draw_run(ax, line.sort_values(along), x, palette[run], band=along == x)
        if log_x:
            ax.set_xscale("log")
            ticks = sorted(frame[x].unique())
            ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
            ax.minorticks_off()
        sns.despine(ax=ax)
    for ax, panel in zip(axes[0], panels, strict=True):
        ax.set_title(readable(panel), loc="left", fontsize=10, weight="bold")
    for ax, measure in zip(axes[:, 0], measures, strict=True):
        ax.set_ylabel(wrapped(labels[measure], 26), fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel(labels[x], fontsize=9)
    handles = [Line2D([], [], color=palette[r], marker="o", label=readable(r)) for r in runs]
    handles = handles if len(runs) > 1 else []
    if frame["low"].notna().any():
        style = {"label": "95% interval", "color": "0.75"}
        handles.append(Patch(**style) if along == x else Line2D([], [], **style))
    if baseline:
        handles.append(Line2D([], [], color="0.5", linewidth=0.8, linestyle=":", label="before"))
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", frameon=False, fontsize=9,
            ncols=min(len(handles), int(figure.get_figwidth() / 1.5)),
        )  # fmt: skip
    set_suptitle(figure, title)
    return figure


def interval_panels(frame: pd.DataFrame, *, labels: Mapping[str, str], title: str) -> Figure:
    """What several ways lead to: a row per way, a panel per measure, a dot with its interval.

    `frame` has a row per dot: the columns way, measure, value, and low and high, the ends of its
    interval (NaN for none). Ways and measures stand in the order they first have; a dotted line
    goes down from the first way, what the others are held against. `labels` are the axes' by name
    of a measure. Raises AmygdalaError for absent columns, no rows, a way twice in a measure, a
    measure without a label, or nothing measured.
    """
    check_frame(frame, "interval_panels", ["way", "measure", "value", "low", "high"])
    check_measured(frame["value"], "interval_panels")
    ways, measures = (list(dict.fromkeys(frame[column])) for column in ("way", "measure"))
    problems = []
    if frame.duplicated(["way", "measure"]).any():
        twice = frame[frame.duplicated(["way", "measure"])].iloc[0]
        place = f"{twice['way']}, {twice['measure']}"
        problems.append(
            f"interval_panels draws one dot per way and measure: {place} is there twice"
        )
    if unnamed := [name for name in measures if name not in labels]:
        problems.append(f"interval_panels needs labels of {', '.join(unnamed)}")
    if problems:
        raise AmygdalaError("\n".join(problems))
    figure, axes = plt.subplots(
        1, len(measures), squeeze=False, sharey=True, layout="constrained",
        figsize=(2.0 + 2.4 * len(measures), 1.3 + 0.3 * len(ways)),
    )  # fmt: skip
    height = {way: len(ways) - 1 - place for place, way in enumerate(ways)}
    for ax, measure in zip(axes[0], measures, strict=True):
        rows = frame[frame["measure"] == measure].set_index("way")
        if ways[0] in rows.index:
            ax.axvline(rows.loc[ways[0], "value"], color="0.5", linewidth=0.8, linestyle=":")
        for way, row in rows.iterrows():
            colour = "0.45" if way == ways[0] else BLUE
            ax.plot([row["low"], row["high"]], [height[way]] * 2, color=colour, linewidth=2)
            ax.plot(row["value"], height[way], color=colour, marker="o", markersize=6)
        ax.set_xlabel(labels[measure], fontsize=9)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="y", color="0.93", linewidth=0.8)
        sns.despine(ax=ax, left=True)
    axes[0, 0].set_yticks(list(height.values()), [readable(way) for way in ways])
    axes[0, 0].set_ylim(-0.6, len(ways) - 0.4)
    set_suptitle(figure, title)
    return figure


def group_of(part: str) -> str:
    """The one of `GROUPS` a part belongs to, by how models name theirs."""
    owner = part.lower().split(".")[0]
    if "norm" in owner or owner.startswith("ln_"):
        return "norms"  # "post_attention_layernorm" too
    if "linear_attn" in owner:
        return "GatedDeltaNet"
    if "attn" in owner or "attention" in owner:
        return "attention"
    return "MLP" if any(word in owner for word in ("mlp", "moe", "feed_forward")) else "other"


def _check_sweep(
    frame: pd.DataFrame, x: str, along: str, labels: Mapping[str, str], log_x: bool
) -> None:
    """Raises AmygdalaError as `sweep_grid` says."""
    columns = ["panel", "run", "measure", x, along, "value", "low", "high"]
    check_frame(frame, "sweep_grid", dict.fromkeys(columns))
    check_measured(frame["value"], "sweep_grid")
    problems = []
    point = ["panel", "run", "measure", along]
    if (again := frame.duplicated(point)).any():
        place = ", ".join(map(str, frame.loc[again, point].iloc[0]))
        problems.append(f"sweep_grid draws one point of a run at one {along}: {place} is twice")
    if unnamed := [name for name in [*frame["measure"].unique(), x] if name not in labels]:
        problems.append(f"sweep_grid needs labels of {', '.join(unnamed)}")
    if log_x and (least := frame[x].min()) <= 0:
        problems.append(f"sweep_grid cannot draw {x} {least:g} on a logarithmic axis")
    if problems:
        raise AmygdalaError("\n".join(problems))


def _draw_run(ax: Axes, line: pd.DataFrame, x: str, colour: Colour, *, band: bool) -> None:
    """One run's points, joined, with their intervals."""
    if band:
        ax.fill_between(line[x], line["low"], line["high"], color=colour, alpha=0.18, linewidth=0)
    else:  # where x goes back and forth a band would cross itself
        ax.vlines(line[x], line["low"], line["high"], color=colour, alpha=0.4)
    ax.plot(line[x], line["value"], color=colour, marker="o", markersize=4)


def _relative(changes: pd.DataFrame, of: str) -> pd.Series:
    """Norm over norm, of all that is one part of one layer; NaN for weights that are all 0."""
    squares = changes[[of, "norm"]].astype(float) ** 2
    # Experts are numbered: `mlp.experts.17.up_proj`.
    parts = changes["part"].str.replace(r"\.\d+(?=\.|$)", "", regex=True).rename("part")
    sums = squares.groupby([changes["layer"], parts]).sum(min_count=1)
    return (sums[of] / sums["norm"].where(sums["norm"] > 0)) ** 0.5


def place_of(part: str) -> tuple[int, int, str]:
    name = part.removesuffix(".bias").split(".")[-1]
    known = _ORDER.index(name) if name in _ORDER else len(_ORDER)
    return list(GROUPS).index(group_of(part)), known, part


def _log_colours(array: np.ndarray) -> dict:
    if not (array > 0).any():
        which = "weights" if np.isnan(array).all() else "values"
        raise AmygdalaError(f"gradient_map has nothing to draw: all {which} are 0")
    high = np.nanmax(array)
    low = max(np.nanmin(array[array > 0]), high / 10**DECADES)
    colours = plt.get_cmap(SEQUENTIAL).with_extremes(under="white")
    return {"cmap": colours, "norm": LogNorm(min(low, high / 10), high)}


def label_map(ax: Axes, values: pd.DataFrame, groups: list[str]) -> None:
    rows, columns = values.shape
    shown = every(rows, 32)
    ax.set_yticks(range(rows)[shown], list(values.index[shown]))
    ax.set_xticks(range(columns), [short_name(part) for part in values.columns], rotation=90)
    ax.tick_params(length=0, labelsize=9)
    ax.set_ylabel("layer")
    for group in dict.fromkeys(groups):
        places = np.flatnonzero(np.array(groups) == group)
        ax.text(
            places.mean(), -0.62, group, ha="center", va="bottom", fontsize=9,
            color=darkened(GROUPS[group]),
        )  # fmt: skip
        if places[0]:
            ax.axvline(places[0] - 0.5, color="white", linewidth=4)
    sns.despine(ax=ax, left=True, bottom=True)


def _beside(outside: pd.DataFrame, of: str) -> str:
    """Of the parameters that are in no layer, what a cell would say."""
    values = outside[of] / outside["norm"].where(outside["norm"] > 0)
    names = [part.split(".")[-1] for part in outside["part"]]
    named = [f"{name} {_figure(value)}" for name, value in zip(names, values, strict=True)]
    return f"in no layer: {', '.join(named)}" if named else ""


def _named(values: pd.DataFrame, place: tuple[int, int]) -> str:
    part, layer = values.columns[place[1]], int(values.index[place[0]])
    return f"{short_name(part)} of {layer_phrase(layer)} ({_figure(values.iat[place])})"


def short_name(part: str) -> str:
    """A part within its group: `q_proj` of `self_attn.q_proj`; a part alone keeps its name."""
    first, _, rest = str(part).partition(".")
    return rest if rest and rest != "bias" else first


def _figure(value: float) -> str:
    return number(value, signed=False)


def _course(frame: pd.DataFrame, runs: list[str]) -> str:
    """By how much each measure changed, from the first to the last step; a range over runs."""
    found = []
    for column in frame:
        curves = [frame.xs(r, level="run")[column].sort_index().dropna() for r in runs]
        by = sorted({number(c.iloc[-1] - c.iloc[0]) for c in curves if len(c)}, key=float)
        found.append(f"{readable(column)} {' to '.join(dict.fromkeys((by[0], by[-1])))}")
    last = int(frame.index.get_level_values("step").max())
    return f"After {last} steps: {', '.join(found)}"
