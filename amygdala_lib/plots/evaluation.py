"""Evaluation: what an `Evaluation` found, and how scores follow a dose."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import permutations
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from jaxtyping import Float
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from scipy.stats import rankdata

from ..errors import AmygdalaError
from .frames import check_frame, check_measured
from .style import (
    BLUE,
    GREEN,
    LEGEND_PAD,
    MANY,
    ORANGE,
    RED,
    SEQUENTIAL,
    Colour,
    every,
    hatch_missing,
    layer_name,
    layer_phrase,
    legend_above,
    missing_handle,
    readable,
    set_suptitle,
    set_title,
)

BASELINES = {
    "embedding_auroc": ("same method on the embeddings", "x", ORANGE),
    "words_auroc": ("bag of words", "|", GREEN),
}
"""Column, name, marker and colour of what a concept is compared with."""
HARD = ("auroc", "against hard negatives", "o", RED)
ORDINARY = ("ordinary_auroc", "the same texts against ordinary ones", "s", BLUE)
SIGNIFICANT = 0.05

WIDE = 50
"""Doses whose largest is more than this many times the smallest are drawn on a log scale."""
CURVES = 5
"""More curves than this in one panel cannot be told apart: the others are faint."""
SHAPES, DASHES = "os^Dv", ["-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1))]
SHUFFLES, EXACT = 9999, 7
"""Of more points than `EXACT` not all orders are gone through, but so many."""
DIRECTIONS: dict[int, tuple[Colour, str]] = {
    1: (RED, "expected to rise"),
    -1: (BLUE, "expected to fall"),
    0: ((0.45, 0.45, 0.45), "nothing expected"),
}


def auroc_forest(
    concepts: pd.DataFrame,
    *,
    null: tuple[float, float] | None = None,
    title: str | None = None,
) -> Figure:
    """One row per concept, the highest AUROC first: the point, its 95% interval, the baselines.

    `concepts`: rows of `Evaluation.concepts` of one method, layer and split, with `concept`,
    `auroc`, `auroc_low`, `auroc_high` and `significant`; `embedding_auroc` and `words_auroc` are
    small marks where there. Concepts that are not significant are hollow; without an AUROC they
    are left out, and the axis says how many. `null` (low, high) is a band: where directions of
    chance lie, `single_low` and `single_high` of `Evaluation.nulls`. More than `MANY` concepts
    stand in columns. Raises AmygdalaError for absent columns, no rows, several methods, layers or
    splits, a concept in two rows, what is no AUROC, or no AUROC at all.
    """
    figures = ["auroc", "auroc_low", "auroc_high"]
    place = ["method", "layer", "split"]
    check_frame(concepts, "auroc_forest", [*place, "concept", *figures, "significant"])
    beside = [name for name in BASELINES if name in concepts]
    problems = _several(concepts, "auroc_forest", place, each="concept")
    problems += _no_auroc(concepts, "auroc_forest", [*figures, *beside])
    if null is not None and not 0 <= null[0] <= null[1] <= 1:
        problems.append(f"auroc_forest got null {null}: give (low, high), AUROCs from 0 to 1")
    _refuse(problems)
    check_measured(concepts["auroc"], "auroc_forest")
    method, layer, split = concepts[place].iloc[0]
    if layer < 0:
        beside = [name for name in beside if name != "embedding_auroc"]  # the same once more
    beside = [name for name in beside if concepts[name].notna().any()]
    rows = concepts.dropna(subset="auroc").set_index("concept")
    rows = rows.sort_values("auroc", ascending=False, kind="stable")
    rows[[*figures, *beside]] = rows[[*figures, *beside]].astype(float)

    n = len(rows)
    columns = 1 if n <= MANY else 2 if n <= 2 * MANY else 3
    height, size = -(-n // columns), 8.0 if columns == 1 else 6.5
    figure, axes = plt.subplots(
        1,
        columns,
        figsize=(7.5 if columns == 1 else 4.2 * columns, 0.0195 * size * height + 2.0),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for i, ax in enumerate(axes[0]):
        _draw_forest(ax, rows.iloc[i * height : (i + 1) * height], beside, null, height, size)
    values = np.append(rows[[*figures, *beside]].to_numpy().ravel(), [0.5, *(null or ())])
    axes[0, 0].set_xlim(np.nanmin(values) - 0.02, max(np.nanmax(values), 0.9) + 0.012)
    label = f"AUROC ({readable(method)} at {layer_phrase(layer)}, split {readable(split)})"
    if left_out := len(concepts) - n:
        label += f"; {left_out} of {len(concepts)} concepts not measured"
    axes[0, (columns - 1) // 2].set_xlabel(label, fontsize=9)
    figure.legend(
        handles=_forest_handles(rows, beside, null),
        loc="outside lower center",
        ncols=3 if columns == 1 else 6,
        frameon=False,
        fontsize=8,
    )
    set_suptitle(figure, _forest_finding(rows, beside) if title is None else title)
    return figure


def _draw_forest(
    ax: Axes,
    rows: pd.DataFrame,
    beside: list[str],
    null: tuple[float, float] | None,
    height: int,
    size: float,
) -> None:
    y = np.arange(len(rows))
    if null is not None:
        ax.axvspan(*null, color="0.9", linewidth=0, zorder=0)
    ax.axvline(0.5, color="black", linewidth=0.8, linestyle=":", zorder=1)
    ax.hlines(y, rows["auroc_low"], rows["auroc_high"], color=BLUE, linewidth=1.2, zorder=2)
    significant = rows["significant"].astype(bool).to_numpy()
    for is_full, face in ((True, BLUE), (False, "white")):
        own = significant == is_full
        ax.scatter(
            rows["auroc"][own], y[own], s=(0.6 * size) ** 2, facecolor=face, edgecolor=BLUE,
            linewidth=1, zorder=4,
        )  # fmt: skip
    for name in beside:
        _, marker, colour = BASELINES[name]
        ax.scatter(
            rows[name], y, marker=marker, color=[colour], s=(0.65 * size) ** 2, linewidth=1.4,
            zorder=3,
        )  # fmt: skip
    ax.set_yticks(y, [readable(name) for name in rows.index], fontsize=size)
    ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    ax.tick_params(axis="x", labelsize=8, length=2)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", color="0.93", linewidth=0.5)
    ax.set_axisbelow(True)
    ax.set_ylim(height - 0.4, -0.6)
    sns.despine(ax=ax, left=True)


def _forest_handles(
    rows: pd.DataFrame, beside: list[str], null: tuple[float, float] | None
) -> list[Artist]:
    point = {"marker": "o", "color": BLUE, "markersize": 4.5, "linewidth": 1.2}
    handles: list[Artist] = [Line2D([], [], **point, label="AUROC and 95% interval")]
    if not rows["significant"].all():
        hollow = point | {"markerfacecolor": "white"}
        handles.append(Line2D([], [], **hollow, label="not significant"))
    for name in beside:
        label, marker, colour = BASELINES[name]
        look = {"marker": marker, "color": colour, "linestyle": "", "markersize": 5, "mew": 1.4}
        handles.append(Line2D([], [], **look, label=label))
    if null is not None:
        handles.append(Patch(color="0.9", label="directions of chance"))
    handles.append(Line2D([], [], color="black", linewidth=0.8, linestyle=":", label="chance"))
    return handles


def _forest_finding(rows: pd.DataFrame, beside: list[str]) -> str:
    significant, n = rows["significant"].astype(bool), len(rows)
    found = f"{significant.sum() or 'None'} of {n} concepts do significantly better than chance"
    if significant.all():
        who = f"All {n} concepts do" if n > 1 else f"{readable(rows.index[0])} does"
        found = f"{who} significantly better than chance"
    if n > 1:
        first, last = rows.iloc[0], rows.iloc[-1]
        found += (
            f" (median AUROC {rows['auroc'].median():.2f}, from {readable(last.name)} "
            f"{last['auroc']:.2f} to {readable(first.name)} {first['auroc']:.2f})"
        )
    if beside:
        above = (rows["auroc"] > rows[beside].max(axis=1)) & rows[beside].notna().any(axis=1)
        names = {"embedding_auroc": "the embeddings", "words_auroc": "the bag of words"}
        found += f"; {above.sum() or 'none'} above {' and '.join(names[name] for name in beside)}"
    return found


def cluster_confusion(confusion: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """Which cluster texts (rows) are recognised as which (columns): colour is the share of a row.

    `confusion` (clusters, clusters) holds counts, which are written in the cells where there is
    room; the best recognised cluster comes first. A cluster without texts is hatched. Raises
    AmygdalaError for an empty frame, rows that are not the columns, a cluster twice, counts that
    are missing or negative, or no text at all.
    """
    check_frame(confusion, "cluster_confusion", each="cluster")
    _check_confusion(confusion)
    counts = confusion[confusion.index].to_numpy(float)
    of = counts.sum(1, keepdims=True)
    shares = np.divide(counts, of, out=np.full_like(counts, np.nan), where=of > 0)
    order = np.argsort(-np.diag(shares), kind="stable")  # NaN, clusters without texts, come last
    names, of = confusion.index[order], of[order, 0]
    counts, shares = counts[np.ix_(order, order)], shares[np.ix_(order, order)]
    n = len(names)
    if ax is None:
        side = min(10.0, max(3.0, 0.42 * n))
        _, ax = plt.subplots(figsize=(side + 2.8, side + 2.0), layout="constrained")
    image = ax.imshow(shares, cmap=SEQUENTIAL, vmin=0, vmax=1, interpolation="nearest")
    hatch_missing(ax)
    shown = every(n, MANY)
    size = 9 if n <= 30 else 7
    rows = [f"{readable(name)} ({count:.0f})" for name, count in zip(names, of, strict=True)]
    ax.set_yticks(range(n)[shown], rows[shown], fontsize=size)
    across = [readable(name) for name in names[shown]]
    ax.set_xticks(range(n)[shown], across, fontsize=size, rotation=90)
    ax.tick_params(length=0)
    some = "" if shown.step == 1 else f", one in {shown.step} named"
    ax.set(xlabel=f"recognised as{some}", ylabel=f"cluster of the text (number of texts){some}")
    sns.despine(ax=ax, left=True, bottom=True)
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.02)
    bar.set_label("share of the row's texts")
    if np.isnan(shares).any():
        legend_above(ax, [missing_handle("no texts")])
    set_title(ax, _confusion_finding(counts, names), pad=LEGEND_PAD)
    written = {(i, j): f"{counts[i, j]:.0f}" for i, j in np.argwhere(counts)}
    _write_cells(ax, image, written, shares, np.arange(n))
    return ax.figure


def _check_confusion(confusion: pd.DataFrame) -> None:
    problems = []
    if not confusion.columns.is_unique:
        name = confusion.columns[confusion.columns.duplicated()][0]
        problems.append(f"cluster_confusion draws one column per cluster: {name!r} is there twice")
    if odd := sorted(map(str, set(confusion.index) ^ set(confusion.columns))):
        problems.append(
            "cluster_confusion needs the same clusters as rows and as columns: "
            f"{', '.join(odd)} is only one of them"
        )
    if not all(pd.api.types.is_numeric_dtype(kind) for kind in confusion.dtypes):
        problems.append("cluster_confusion draws counts: a column holds what is no number")
    else:
        wrong = ~(confusion >= 0) | np.isinf(confusion)
        if wrong.to_numpy().any():
            row, column = np.argwhere(wrong.to_numpy())[0]
            problems.append(
                f"cluster_confusion draws counts: row {confusion.index[row]}, column "
                f"{confusion.columns[column]} has {confusion.iloc[row, column]}"
            )
        elif not confusion.to_numpy().any():
            problems.append("cluster_confusion has nothing to draw: all counts are 0")
    _refuse(problems)


def _confusion_finding(counts: np.ndarray, names: pd.Index) -> str:
    n_texts = counts.sum()
    share = np.trace(counts) / n_texts
    found = f"{share:.0%} of {n_texts:.0f} texts are recognised as of their cluster"
    others = np.where(np.eye(len(counts), dtype=bool), 0, counts)
    if not others.any():
        return found
    row, column = np.unravel_index(np.argmax(others), others.shape)
    times = others[row, column]
    return (
        f"{found}; the most frequent confusion: {readable(names[row])} taken for "
        f"{readable(names[column])} ({times:.0f} {'text' if times == 1 else 'texts'})"
    )


def method_by_layer(
    summary: pd.DataFrame, *, value: str = "median_auroc", ax: Axes | None = None
) -> Figure:
    """Methods (rows) by layers (columns) of one split: the value in each cell, the best framed.

    `summary`: rows of `Evaluation.summary` of one split, with `method`, `layer`, `split` and
    `value`, of which more is better. The embeddings, layer -1, are a baseline: they stand apart and
    are framed only if there is nothing else. A NaN is hatched. Raises AmygdalaError for absent
    columns, no rows, several splits, a method and layer in two rows, or no value at all.
    """
    check_frame(summary, "method_by_layer", ["method", "layer", "split", value])
    problems = _several(summary, "method_by_layer", ["split"])
    twice = summary.duplicated(["method", "layer", "split"])
    if twice.any():
        method, layer = summary.loc[twice, ["method", "layer"]].iloc[0]
        problems.append(f"method_by_layer draws one cell each: {method} at {layer} is twice")
    if not pd.api.types.is_numeric_dtype(summary[value]):
        problems.append(f"method_by_layer draws numbers: {value!r} has {summary[value].iloc[0]!r}")
    _refuse(problems)
    check_measured(summary[value], "method_by_layer")
    table = summary.pivot(index="method", columns="layer", values=value).astype(float)
    table = table.loc[list(dict.fromkeys(summary["method"])), sorted(table.columns)]
    n, layers = len(table), [layer for layer in table.columns if layer >= 0]
    apart = len(table.columns) > len(layers) > 0
    places = np.arange(len(table.columns)) + np.where(np.array(table.columns) >= 0, 0.4 * apart, 0)
    if ax is None:
        cell = float(np.clip(15 / len(places), 0.21, 0.5))
        size = (max(6.5, cell * len(places) + 2.6), max(0.36, 0.8 * cell) * n + 1.9)
        _, ax = plt.subplots(figsize=size, layout="constrained")

    array = table.to_numpy()
    low, high = np.floor(20 * np.nanmin(array)) / 20, np.ceil(20 * np.nanmax(array)) / 20
    scale = {"cmap": SEQUENTIAL, "vmin": low, "vmax": high if high > low else low + 0.05}
    for block in (slice(0, 1), slice(1, None)) if apart else (slice(None),):
        extent = (places[block][0] - 0.5, places[block][-1] + 0.5, n - 0.5, -0.5)
        image = ax.imshow(array[:, block], extent=extent, aspect="auto", **scale)
    ax.set(xlim=(-0.5, places[-1] + 0.5), ylim=(n - 0.5, -0.5))
    hatch_missing(ax)
    if apart:
        ax.axvspan(0.5, 0.9, color="white", linewidth=0)
    row, column, finding = _best_cell(table, value, summary["split"].iloc[0])
    corner = (places[column] - 0.5, row - 0.5)
    frame = Rectangle(corner, 1, 1, fill=False, edgecolor=ORANGE, linewidth=2.2, clip_on=False)
    ax.add_patch(frame)
    frame.set_zorder(3)
    ax.set_yticks(range(n), [readable(method) for method in table.index], fontsize=9)
    ax.tick_params(length=0)
    sns.despine(ax=ax, left=True, bottom=True)
    ax.set(xlabel="layer")
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.04, pad=0.02)
    bar.set_label(_worded(value))
    handles = [missing_handle("not measured")] if np.isnan(array).any() else []
    if handles:
        legend_above(ax, handles)
    set_title(ax, finding, pad=LEGEND_PAD if handles else 8)
    _label_layers(ax, places, list(table.columns))
    measured = np.argwhere(np.isfinite(array))
    written = {(i, j): _two_digits(array[i, j]) for i, j in measured}
    _write_cells(ax, image, written, array, places)
    return ax.figure


def _best_cell(table: pd.DataFrame, value: str, split: str) -> tuple[int, int, str]:
    """Row and column of the highest value, with the embeddings only if there is nothing else."""
    ranked = table[[layer for layer in table if layer >= 0]]
    if not ranked.notna().to_numpy().any():
        ranked = table
    best = ranked.stack().dropna()
    method, layer = best.idxmax()
    top, runner_up = best.max(), best.drop((method, layer))
    digits = 3 if top > 0.98 else 2
    finding = f"{readable(method)} at {layer_phrase(layer)} is best"
    if runner_up.empty:
        finding = f"{readable(method)} at {layer_phrase(layer)}"
    finding += f" on the split {readable(split)}: {_worded(value)} {top:.{digits}f}"
    if -1 in table and layer >= 0 and pd.notna(baseline := table.loc[method, -1]):
        finding += f"; {baseline:.{digits}f} on the embeddings"
    elif not runner_up.empty:
        other, there = runner_up.idxmax()
        finding += (
            f", before {readable(other)} at {layer_phrase(there)} ({runner_up.max():.{digits}f})"
        )
    return table.index.get_loc(method), table.columns.get_loc(layer), finding


def _label_layers(ax: Axes, places: np.ndarray, layers: list[int]) -> None:
    """Every layer, or as many as there is room for; the embeddings always, on a line below."""
    step = every(len(layers), 40).step
    ticks = [(x, layer) for x, layer in zip(places, layers, strict=True) if layer >= 0][::step]
    ticks += [(x, layer) for x, layer in zip(places, layers, strict=True) if layer < 0]
    names = [layer_name(layer) for _, layer in ticks]
    ax.set_xticks([x for x, _ in ticks], names, fontsize=9 if len(layers) <= 24 else 8)
    width = _cell_points(ax)[0]
    for label in ax.get_xticklabels():
        if label.get_text() == "embed" and width < 32:
            label.set_rotation(90)


def hard_negatives(hard: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """AUROC against hard negatives of each kind beside that against ordinary texts.

    `hard`: rows of `Evaluation.hard` of one method and layer, with `kind`, `n_hard`, `auroc` and
    `ordinary_auroc`, and `_low` and `_high` of both, 95% intervals over concepts. The positives of
    a pair are the same. Raises AmygdalaError for absent columns, no rows, several methods or
    layers, a kind in two rows, what is no AUROC, or no AUROC at all.
    """
    figures = [f"{of}{end}" for of in ("auroc", "ordinary_auroc") for end in ("", "_low", "_high")]
    check_frame(hard, "hard_negatives", ["method", "layer", "kind", "n_hard", *figures])
    problems = _several(hard, "hard_negatives", ["method", "layer"], each="kind")
    _refuse(problems + _no_auroc(hard, "hard_negatives", figures))
    check_measured(hard["auroc"], "hard_negatives")
    rows = hard.dropna(subset="auroc").set_index("kind")
    rows[figures] = rows[figures].astype(float)
    if ax is None:
        _, ax = plt.subplots(figsize=(max(6.5, 1.7 * len(rows) + 1.6), 4.4), layout="constrained")
    x = np.arange(len(rows))
    for (of, label, marker, colour), side in ((HARD, -1), (ORDINARY, 1)):
        at, value = x + 0.14 * side, rows[of]
        ax.vlines(at, rows[f"{of}_low"], rows[f"{of}_high"], color=colour, linewidth=2, alpha=0.6)
        ax.plot(at, value, marker=marker, color=colour, linestyle="", markersize=8, label=label)
        for there, height in zip(at, value, strict=True):
            if np.isfinite(height):
                ax.annotate(
                    f"{height:.2f}", (there, height), xytext=(8 * side, 0), fontsize=9,
                    textcoords="offset points", ha="right" if side < 0 else "left", va="center",
                )  # fmt: skip
    ax.axhline(0.5, color="black", linewidth=0.8, linestyle=":", zorder=0)
    ax.annotate(
        "chance", (1, 0.5), xycoords=("axes fraction", "data"), ha="right", va="bottom",
        xytext=(0, 2), textcoords="offset points", fontsize=8, color="0.3",
    )  # fmt: skip
    names = [
        f"{readable(kind)}\n({count:.0f} {'text' if count == 1 else 'texts'})"
        for kind, count in rows["n_hard"].items()
    ]
    ax.set_xticks(x, names)
    low = np.nanmin(np.append(rows[figures].to_numpy(), 0.5))
    method, layer = hard[["method", "layer"]].iloc[0]
    ax.set(
        xlim=(-0.6, len(rows) - 0.25),  # the word at the right covers no point
        ylim=(max(-0.01, low - 0.05), 1.01),
        ylabel=f"AUROC ({readable(method)} at {layer_phrase(layer)})",
    )
    sns.despine(ax=ax)
    legend_above(ax, ax.get_legend_handles_labels()[0])
    set_title(ax, _hard_finding(rows), pad=LEGEND_PAD)
    return ax.figure


def _hard_finding(rows: pd.DataFrame) -> str:
    hardest = rows["auroc"].idxmin()
    row = rows.loc[hardest]
    found = f"{readable(hardest)[:1].upper() + readable(hardest)[1:]} texts"
    found += " are the hardest to tell apart" if len(rows) > 1 else " as negatives"
    found += f": AUROC {row['auroc']:.2f}"
    ordinary = ""
    if np.isfinite(row["ordinary_auroc"]):
        ordinary = f"{row['ordinary_auroc']:.2f} against ordinary texts"
    if row["auroc_high"] < 0.5:
        found += ", below chance: they score above the concepts' own texts"
        return f"{found} ({ordinary})" if ordinary else found
    if row["auroc_low"] <= 0.5:
        found += ", which may be chance"
        return f"{found}, and {ordinary}" if ordinary else found
    return f"{found}, and {ordinary}" if ordinary else found


class Trend(NamedTuple):
    """How one curve follows the dose."""

    concept: str
    expected: int | None
    rho: float
    p: float

    def __str__(self) -> str:
        if np.isnan(self.rho):
            return f"{readable(self.concept)}: no ρ"
        p = "p < 0.001" if self.p < 0.001 else f"p = {self.p:.{3 if self.p < 0.1 else 2}f}"
        return f"{readable(self.concept)}: ρ = {self.rho:+.2f}, {p}"


def dose_curves(curves: pd.DataFrame, *, title: str | None = None) -> Figure:
    """A panel per scenario: scores over the dose, with Spearman's correlation and its p value.

    `curves` has one row per point: `scenario`, `concept`, `dose` (in the scenario's own unit) and
    `score` (standard deviations), and may have `expected`: 1 for a score that should rise with the
    dose, -1 for one that should fall, 0 or NaN for a control. It gives the colour, and p is
    one-sided in its direction; else p is two-sided. p is the share of shuffles of the scores that
    correlate as strongly (all of them up to 7 points, else 9999), not adjusted for the number of
    curves. Doses of more than a factor of `WIDE` are on a log scale. Of more than `CURVES` concepts
    in a panel those that follow the dose most strongly are named. NaN scores are left out. Raises
    AmygdalaError for absent columns, no rows, doses that are not finite numbers, or an `expected`
    that is none of these or not the same for all points of a curve.
    """
    check_frame(curves, "dose_curves", ["scenario", "concept", "dose", "score"])
    _check_doses(curves)
    check_measured(curves["score"], "dose_curves")
    scenarios = list(dict.fromkeys(curves["scenario"]))
    panels = {name: curves[curves["scenario"] == name] for name in scenarios}
    trends = {name: _trends(panel) for name, panel in panels.items()}
    n, lines = len(panels), [min(len(held), CURVES + 1) for held in trends.values()]
    columns = min(n, 4 if n <= 12 else 5)
    rows = -(-n // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(max(6.5, 2.8 * columns), rows * (1.95 + 0.15 * max(lines)) + 1.1),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for ax, (scenario, panel) in zip(axes.flat, panels.items(), strict=False):
        _draw_scenario(ax, panel, trends[scenario])
        wide = int(12.5 * max(6.5, 2.8 * columns) / columns)
        name = textwrap.fill(readable(scenario), wide, max_lines=2, placeholder="…")
        pad = 4 + 11 * min(len(trends[scenario]), CURVES + 1)
        ax.set_title(name, fontsize=9, loc="left", pad=pad, weight="bold")
    for ax in axes.flat[n:]:
        ax.set_visible(False)
    for ax in axes.flat[max(0, n - columns) : n]:  # the lowest of each column
        ax.set_xlabel("dose", fontsize=8)
    figure.supylabel("score (standard deviations)", fontsize=10)
    every_trend = [trend for held in trends.values() for trend in held]
    there = {trend.expected for trend in every_trend}
    handles = [
        Line2D([], [], color=colour, linewidth=2, label=label)
        for expected, (colour, label) in DIRECTIONS.items()
        if expected in there
    ]
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9
        )  # fmt: skip
    set_suptitle(figure, _dose_finding(every_trend) if title is None else title)
    return figure


def _check_doses(curves: pd.DataFrame) -> None:
    problems = []
    for column in ("dose", "score"):
        if not pd.api.types.is_numeric_dtype(curves[column]):
            held = curves[column].tolist()[0]
            problems.append(f"dose_curves needs numbers as {column}: there is {held!r}")
        elif not np.isfinite(curves[column] if column == "dose" else curves[column].dropna()).all():
            row = curves[~np.isfinite(curves[column])].iloc[0]
            problems.append(
                f"dose_curves needs a finite {column}: {row['scenario']} has {row[column]}"
            )
    if "expected" in curves:
        expected = pd.to_numeric(curves["expected"], errors="coerce")
        wrong = ~curves["expected"].isna() & ~expected.isin(list(DIRECTIONS))
        if wrong.any():
            held = curves.loc[wrong, "expected"].tolist()[0]
            problems.append(f"dose_curves expects 1, -1, 0 or NaN, not {held!r}")
        kinds = expected.fillna(0).groupby([curves["scenario"], curves["concept"]]).nunique()
        if (kinds > 1).any():
            scenario, concept = kinds.idxmax()
            problems.append(
                f"dose_curves expects one direction of a curve: {concept} in {scenario} has several"
            )
    _refuse(problems)


def _trends(panel: pd.DataFrame) -> list[Trend]:
    """Of one scenario, in the order of the frame or, if there are many, the strongest first."""
    found = []
    for concept, points in panel.groupby("concept", sort=False):
        points = points.dropna(subset="score")
        expected = None
        if "expected" in panel:
            held = panel.loc[panel["concept"] == concept, "expected"].iloc[0]
            expected = 0 if pd.isna(held) else int(held)
        dose, score = points["dose"].to_numpy(float), points["score"].to_numpy(float)
        found.append(Trend(str(concept), expected, *_rank_correlation(dose, score, expected or 0)))
    if len(found) > CURVES:
        found.sort(key=lambda trend: -abs(np.nan_to_num(trend.rho)))
    return found


def _rank_correlation(
    dose: Float[np.ndarray, " n"], score: Float[np.ndarray, " n"], sign: int
) -> tuple[float, float]:
    """Spearman's rho and its p value from shuffles: one-sided for a sign, two-sided for 0.

    Both are NaN for fewer than 3 points, or if all doses or all scores are the same.
    """
    x, y = rankdata(dose), rankdata(score)
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.nan, np.nan
    x, y = (x - x.mean()) / x.std(), (y - y.mean()) / y.std()
    rho = float(x @ y / len(x))
    shuffled = y[_orders(len(y))] @ x / len(x)
    if not sign:
        sign, shuffled, own = 1, np.abs(shuffled), abs(rho)
    else:
        own = sign * rho
    as_strong = np.count_nonzero(sign * shuffled >= own - 1e-9)
    # Where not all orders are listed, the one that was found counts as a shuffle too.
    added = 0 if len(x) <= EXACT else 1
    return rho, (as_strong + added) / (len(shuffled) + added)


@cache
def _orders(n: int) -> np.ndarray:
    """Orders (orders, n) of n things: all of them up to `EXACT`, else some at random."""
    if n <= EXACT:
        return np.array(list(permutations(range(n))))
    return np.random.default_rng(0).permuted(np.tile(np.arange(n), (SHUFFLES, 1)), axis=1)


def _draw_scenario(ax: Axes, panel: pd.DataFrame, trends: Sequence[Trend]) -> None:
    ax.axhline(0, color="0.85", linewidth=0.8, zorder=0)
    handles: list[Line2D] = []
    for i, trend in enumerate(trends):
        points = panel[panel["concept"].astype(str) == trend.concept].dropna(subset="score")
        colour = BLUE if trend.expected is None else DIRECTIONS[trend.expected][0]
        means = points.groupby("dose")["score"].mean()
        if i >= CURVES:
            ax.plot(means, color=colour, linewidth=0.5, alpha=0.2, zorder=1)
            continue
        look = {"color": colour, "linestyle": DASHES[i], "linewidth": 1.3, "markersize": 3.5}
        look |= {"markeredgecolor": "white", "markeredgewidth": 0.4}
        ax.plot(means, **look)
        ax.plot(points["dose"], points["score"], **look | {"linestyle": ""}, marker=SHAPES[i])
        handles.append(Line2D([], [], **look, marker=SHAPES[i], label=str(trend)))
    if others := len(trends) - len(handles):
        label = f"{others} other{'s' if others > 1 else ''}, less strongly"
        handles.append(Line2D([], [], color="0.75", linewidth=0.5, label=label))
    ax.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=7.5,
        borderaxespad=0.1, borderpad=0.1, labelspacing=0.15, handlelength=2.2, handletextpad=0.5,
    )  # fmt: skip
    _scale_doses(ax, panel["dose"].to_numpy(float))
    ax.yaxis.set_major_locator(MaxNLocator(4))
    ax.tick_params(labelsize=8, length=2, labelleft=ax.get_subplotspec().is_first_col())
    sns.despine(ax=ax)


def _scale_doses(ax: Axes, doses: np.ndarray) -> None:
    """Log where doses span more than `WIDE`; with 0 among them linear up to the smallest other."""
    positive = doses[doses > 0]
    wide = doses.min() >= 0 and len(positive) and positive.max() > WIDE * positive.min()
    if not wide:
        ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    else:
        if doses.min() > 0:
            ax.set_xscale("log")
        else:
            ax.set_xscale("symlog", linthresh=positive.min(), linscale=0.5)
        powers = np.arange(np.ceil(np.log10(positive.min())), np.floor(np.log10(doses.max())) + 1)
        powers = powers[:: max(1, -(-len(powers) // 4))]
        zero = [0.0] if doses.min() == 0 else []
        ax.xaxis.set_major_locator(FixedLocator([*zero, *10**powers]))
        ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(_short))


def _short(value: float, _position: int | None = None) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(unit, 1e4):
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def _dose_finding(trends: Sequence[Trend]) -> str:
    if trends[0].expected is None:
        return f"{_moved(trends)} with the dose (p < {SIGNIFICANT})"
    tried = [trend for trend in trends if trend.expected]
    controls = [trend for trend in trends if not trend.expected]
    found = f"{_moved(tried)} with the dose as expected (p < {SIGNIFICANT})" if tried else ""
    if not controls:
        return found
    moved = sum(trend.p < SIGNIFICANT for trend in controls)
    verb = "move" if moved > 1 else "moves"
    among = f"of {len(controls)} where nothing is expected {moved or 'none'} {verb}"
    return f"{found}; {among}" if tried else f"{among[0].upper()}{among[1:]} with the dose"


def _moved(trends: Sequence[Trend]) -> str:
    moved, n = sum(trend.p < SIGNIFICANT for trend in trends), len(trends)
    if n == 1:
        return "The score moves" if moved else "The score does not move"
    if moved in (0, n):
        return f"All {n} scores move" if moved else f"None of {n} scores moves"
    return f"{moved} of {n} scores {'move' if moved > 1 else 'moves'}"


def _several(
    frame: pd.DataFrame, figure: str, columns: Sequence[str], *, each: str | None = None
) -> list[str]:
    """A problem per column that holds several values, and for a thing that has several rows."""
    problems = []
    for column in columns:
        held = list(dict.fromkeys(frame[column].tolist()))
        if len(held) > 1:
            problems.append(
                f"{figure} draws one {column}, the frame has {', '.join(map(str, held))}: "
                f"choose one, frame[frame[{column!r}] == {held[0]!r}]"
            )
    # With several methods, say, a concept has several rows for that reason.
    if each and not problems and frame[each].duplicated().any():
        name = frame.loc[frame[each].duplicated(), each].iloc[0]
        times = int((frame[each] == name).sum())
        problems.append(f"{figure} draws one row per {each}: {name!r} has {times}")
    return problems


def _no_auroc(frame: pd.DataFrame, figure: str, columns: Sequence[str]) -> list[str]:
    problems = []
    for column in columns:
        values = pd.to_numeric(frame[column], errors="coerce")
        wrong = frame[column].notna() & ~values.between(0, 1)
        if wrong.any():
            held = frame.loc[wrong, column].tolist()[0]
            problems.append(f"{figure} draws AUROCs, from 0 to 1: {column} has {held!r}")
    return problems


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise AmygdalaError("\n".join(problems))


def _worded(column: str) -> str:
    return readable(column).replace("auroc", "AUROC")


def _cell_points(ax: Axes) -> tuple[float, float]:
    """Width and height of one unit of the axes in typographic points, as it will be drawn."""
    figure = ax.figure.get_figure(root=True)
    figure.draw_without_rendering()
    corners = ax.transData.transform([(0, 0), (1, 1)])
    width, height = np.abs(corners[1] - corners[0]) * 72 / figure.dpi
    return float(width), float(height)


def _two_digits(value: float) -> str:
    """.87 and -.20, where the nought would only take room; 1.00 and 12.5."""
    if abs(value) >= 10:
        return f"{value:.3g}"
    words = f"{value:.2f}"
    return words.replace("0.", ".") if words.lstrip("-").startswith("0.") else words


def _write_cells(
    ax: Axes,
    image: AxesImage,
    written: Mapping[tuple[int, int], str],
    values: np.ndarray,
    places: np.ndarray,
) -> None:
    """Words in cells (row, column), columns at their places; none if there is no room."""
    longest = max(map(len, written.values()), default=1)
    width, height = _cell_points(ax)
    # A digit is about 0.62 of the type size wide, and a line 1.2 high.
    size = min(9.0, 0.92 * width / (0.62 * longest), height / 1.2)
    if size < 6:
        return
    for (row, column), words in written.items():
        red, green, blue, _ = image.to_rgba(values[row, column])
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
        ax.text(
            places[column], row, words, fontsize=size, ha="center", va="center",
            color="white" if dark else "black",
        )  # fmt: skip
