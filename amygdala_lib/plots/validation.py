"""Validation: how well directions tell a concept's texts from others."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..errors import AmygdalaError
from .frames import check_frame, check_measured
from .style import (
    PALETTE,
    darkened,
    every,
    layer_name,
    layer_phrase,
    readable,
    set_title,
    spread_evenly,
)

MOST_METHODS = 9
"""More lines than this cannot be told apart."""
MARKERS = "os^DvPX*<"
COLOURS = [colour for i, colour in enumerate(PALETTE) if i != 8]  # yellow is faint on white


def separation_by_layer(aurocs: pd.DataFrame, n_layers: int, *, ax: Axes | None = None) -> Figure:
    """AUROC (concepts by layer indices) over depth: every concept faint, the median bold."""
    if ax is None:
        _, ax = plt.subplots(figsize=(8, 4))
    depth = list(aurocs.columns)
    ax.plot(depth, aurocs.T.to_numpy(), color="0.75", linewidth=0.8, zorder=1)
    median = aurocs.median()
    ax.plot(
        depth,
        median,
        color=sns.color_palette("colorblind")[0],
        linewidth=2.5,
        marker="o",
        label="median concept",
    )
    worst = aurocs[median.idxmax()].idxmin()
    ax.plot(
        depth,
        aurocs.loc[worst],
        color=sns.color_palette("colorblind")[3],
        linewidth=1.5,
        label=f"weakest there: {readable(worst)}",
    )
    ax.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    ax.set_xticks(depth, [layer_name(layer) for layer in depth])
    ax.set(
        xlabel=f"layer (of {n_layers})",
        ylabel="AUROC",
        ylim=(min(0.45, aurocs.min().min() - 0.02), 1.01),
    )
    best = median.idxmax()
    ax.set_title(
        f"Concepts stand out best at {layer_phrase(best)}: median AUROC {median[best]:.2f}",
        loc="left",
    )
    ax.legend(frameon=False, loc="best")
    sns.despine(ax=ax)
    return ax.figure


def projections(scores: pd.DataFrame, concept: str, *, ax: Axes | None = None) -> Figure:
    """Where texts fall along one direction: columns `z` and `positive` (bool), one row per text."""
    if ax is None:
        _, ax = plt.subplots(figsize=(8, 3.2))
    sns.histplot(
        scores.assign(text=np.where(scores["positive"], readable(concept), "all others")),
        x="z", hue="text", stat="density", common_norm=False, bins=40, palette="colorblind", ax=ax,
    )  # fmt: skip
    gap = scores.loc[scores["positive"], "z"].mean() - scores.loc[~scores["positive"], "z"].mean()
    ax.set(xlabel="projection on the direction (standard deviations)", ylabel="density")
    ax.set_title(
        f"Texts of {readable(concept)} lie {gap:.1f} standard deviations above the others",
        loc="left",
    )
    sns.despine(ax=ax)
    return ax.figure


def method_comparison(
    scores: pd.DataFrame,
    *,
    ylabel: str = "AUROC on held-out texts",
    chance: float | None = 0.5,
) -> Figure:
    """The median concept by method and layer, with the quartiles as a band.

    `scores` has one row per method, layer and concept, in columns `method`, `layer` (-1 is the
    embeddings) and `score`, of which more is better. A NaN score is left out; a method with none
    at a layer has a gap in its line. With a single layer the methods stand side by side. Raises
    AmygdalaError for absent columns, no rows, no score at all, or more than `MOST_METHODS` methods.
    """
    check_frame(scores, "method_comparison", ["method", "layer", "score"])
    check_measured(scores["score"], "method_comparison")
    methods = list(dict.fromkeys(scores["method"]))
    if len(methods) > MOST_METHODS:
        raise AmygdalaError(
            f"method_comparison can tell {MOST_METHODS} methods apart, not {len(methods)}: "
            f"choose among {', '.join(map(str, methods))}"
        )
    quartiles = scores.groupby(["method", "layer"])["score"].quantile([0.25, 0.5, 0.75]).unstack()
    medians = quartiles[0.5].unstack("method")[methods]
    figure, ax = plt.subplots(figsize=(8.5, 4.6), layout="constrained")
    if len(medians) == 1:
        _methods_side_by_side(ax, quartiles, methods)
    else:
        _methods_over_layers(ax, quartiles, medians)
    if chance is not None and ax.get_ylim()[0] <= chance <= ax.get_ylim()[1]:
        ax.axhline(chance, color="black", linewidth=0.8, linestyle=":", zorder=0)
        ax.annotate(
            "chance", (1, chance), xycoords=("axes fraction", "data"), ha="right",
            xytext=(0, 2), textcoords="offset points", fontsize=8, color="0.3",
        )  # fmt: skip
    ax.set(ylabel=ylabel)
    sns.despine(ax=ax)
    set_title(ax, _best_method(medians))
    return figure


def _methods_over_layers(ax: Axes, quartiles: pd.DataFrame, medians: pd.DataFrame) -> None:
    layers = list(medians.index)
    ends = {}
    for i, method in enumerate(medians):
        found = quartiles.loc[method].reindex(layers)
        colour = COLOURS[i]
        ax.fill_between(layers, found[0.25], found[0.75], color=colour, alpha=0.12, linewidth=0)
        ax.plot(
            layers, found[0.5], color=colour, marker=MARKERS[i], markersize=5,
            markeredgecolor="white", markeredgewidth=0.6, linewidth=1.8, label=str(method),
        )  # fmt: skip
        if found[0.5].notna().any():
            ends[method] = (found[0.5].last_valid_index(), found[0.5].dropna().iloc[-1])
    shown = layers[every(len(layers), 16)]
    ax.set_xticks(shown, [layer_name(layer) for layer in shown])
    ax.set(xlabel="layer")
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    heights = np.array([y for _, y in ends.values()])
    line = (high - low) * 0.05
    places = spread_evenly(heights, line, low + line / 2, high - line / 2)
    ax.set_ylim(low, high)
    edge = layers[-1] + 0.05 * (layers[-1] - layers[0])
    for (method, (x, y)), place in zip(ends.items(), places, strict=True):
        colour, marker = COLOURS[list(medians).index(method)], MARKERS[list(medians).index(method)]
        ax.plot([x, edge], [y, place], color=colour, linewidth=0.6, clip_on=False)
        ax.plot(edge, place, color=colour, marker=marker, markersize=5, clip_on=False)
        ax.annotate(
            readable(method), (edge, place), xytext=(6, 0), textcoords="offset points",
            va="center", color=darkened(colour), fontsize=9, annotation_clip=False,
        )  # fmt: skip
    ax.set_xlim(left, right)


def _methods_side_by_side(ax: Axes, quartiles: pd.DataFrame, methods: Sequence[str]) -> None:
    layer = quartiles.index.get_level_values("layer")[0]
    quartiles = quartiles.droplevel("layer")
    quartiles = quartiles.reindex(quartiles[0.5].sort_values(ascending=False).index)
    for place, (method, (low, median, high)) in enumerate(quartiles.iterrows()):
        colour, marker = COLOURS[methods.index(method)], MARKERS[methods.index(method)]
        ax.vlines(place, low, high, color=colour, linewidth=2.5, alpha=0.5)
        ax.plot(place, median, marker=marker, color=colour, markersize=8)
    ax.set_xticks(range(len(quartiles)), [readable(name) for name in quartiles.index])
    ax.set(xlabel=f"method, at {layer_phrase(layer)}", xlim=(-0.5, len(quartiles) - 0.5))


def _best_method(medians: pd.DataFrame) -> str:
    best = medians.max()
    top = best.max()
    layer = medians[best.idxmax()].idxmax()
    digits = 3 if top > 0.98 else 2
    alike = [readable(n) for n in best.index if round(best[n], digits) == round(top, digits)]
    value = f"median {top:.{digits}f}"
    if len(alike) > 1 and len(alike) == len(best):
        return f"All methods do equally well at their best layer ({value})"
    if len(alike) > 1:
        return f"{', '.join(alike[:-1])} and {alike[-1]} do best, equally well ({value})"
    place = f"{alike[0]} does best, at {layer_phrase(layer)}: {value}"
    if len(best.dropna()) < 2:
        return place
    others = best.drop(best.idxmax())
    return f"{place}, before {readable(others.idxmax())} ({others.max():.{digits}f})"
