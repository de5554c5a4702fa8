"""Spectrum: how the variance of each concept's texts is shared among principal components."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..errors import AmygdalaError
from .frames import check_frame, check_measured
from .style import (
    BLUE,
    LEGEND_PAD,
    MANY,
    RED,
    SEQUENTIAL,
    every,
    hatch_missing,
    legend_above,
    missing_handle,
    readable,
    set_suptitle,
    set_title,
)

PANELS = 24
"""Up to this many concepts each have a panel of their own."""


def eigenvalue_spectra(
    shares: pd.DataFrame, cut: pd.Series, *, of: str = "variance", title: str | None = None
) -> Figure:
    """How much of the variance each component has, and how many it takes to 90% of it.

    `of` names what is shared if it is not the variance.
    `shares` (concepts, components): shares of each concept's total variance, descending, NaN
    beyond its last component, as `Spectrum.shares` gives them. `cut` (by concept): the components
    it takes, NaN where there is no variance. Up to `PANELS` concepts have a panel each; more are
    rows of one image, the steepest spectrum first. Raises AmygdalaError if a concept has no cut or
    two rows, or if a value is no share.
    """
    check_frame(shares, "eigenvalue_spectra", each="concept")
    check_measured(shares, "eigenvalue_spectra")
    _check_shares(shares, cut)
    cut = cut.reindex(shares.index).astype(float)
    title = _cut_finding(cut, of) if title is None else title
    if len(shares) <= PANELS:
        return _panel_each(shares, cut, of, title)
    return _one_image(shares, cut, of, title)


def _check_shares(shares: pd.DataFrame, cut: pd.Series) -> None:
    problems = []
    if absent := [concept for concept in shares.index if concept not in cut.index]:
        problems.append(f"eigenvalue_spectra got no cut for {', '.join(map(str, absent))}")
    outside = (shares < -1e-6) | (shares > 1 + 1e-6)
    if outside.to_numpy().any():
        concept = outside.any(axis=1).idxmax()
        value = shares.loc[concept][outside.loc[concept]].iloc[0]
        problems.append(
            f"eigenvalue_spectra draws shares, from 0 to 1: {concept} has {value:.4g}. "
            "Divide variances by their sum, as Spectrum.shares does"
        )
    if problems:
        raise AmygdalaError("\n".join(problems))


def _cut_finding(cut: pd.Series, of: str) -> str:
    cut = cut.dropna()
    if cut.empty:
        return "No concept has texts enough for a cut"
    least, most = cut.min(), cut.max()
    median = cut.quantile(interpolation="lower")  # some concept's: no half components
    if least == most:
        who = "Every concept" if len(cut) > 1 else readable(cut.index[0])
        return f"{who} needs {least:.0f} components for 90% of the {of}"
    return (
        f"The median concept needs {median:.0f} components for 90% of the {of}: "
        f"{readable(cut.idxmin())} only {least:.0f}, {readable(cut.idxmax())} {most:.0f}"
    )


def _panel_each(shares: pd.DataFrame, cut: pd.Series, of: str, title: str) -> Figure:
    n = len(shares)
    columns = min(n, 6 if n > 20 else 5 if n > 8 else 4)
    rows = -(-n // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(max(6.5, 2.0 * columns), 1.55 * rows + 1.3),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for ax, concept in zip(axes.flat, shares.index, strict=False):
        _draw_panel(ax, shares.loc[concept].to_numpy(float), cut[concept])
        ax.set_title(readable(concept), fontsize=9, loc="left", pad=3)
    for ax in axes.flat[n:]:
        ax.set_visible(False)
    for ax in axes.flat[max(0, n - columns) : n]:  # the lowest of each column
        ax.tick_params(labelbottom=True)
        ax.set_xlabel("component", fontsize=8)
    axes[0, 0].xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes[0, 0].set_xlim(0.3, shares.shape[1] + 0.7)
    axes[0, 0].set_ylim(0, 1.08)
    figure.supylabel(f"share of the concept's {of}", fontsize=10)
    handles = [
        Patch(color=BLUE, label=f"needed for 90% of the {of}"),
        Patch(color="0.75", label="the others"),
        Line2D([], [], color="0.2", marker=".", linewidth=1, label="cumulative, up to the last"),
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9
    )  # fmt: skip
    set_suptitle(figure, title)
    return figure


def _draw_panel(ax: Axes, shares: np.ndarray, cut: float) -> None:
    held = shares[~np.isnan(shares)]
    sns.despine(ax=ax)
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set_yticks([0, 0.5, 0.9])
    ax.tick_params(labelsize=8, length=2)
    if not len(held):
        ax.text(
            0.5, 0.5, "not measured", transform=ax.transAxes,
            ha="center", va="center", fontsize=8, color="0.4",
        )  # fmt: skip
        return
    component = np.arange(1, len(held) + 1)
    colours = [BLUE if k <= cut else "0.75" for k in component]
    ax.bar(component, held, color=colours, width=0.85 if len(shares) <= 40 else 1.0)
    cumulative = held.cumsum()
    ax.axhline(0.9, color="0.6", linewidth=0.7, linestyle=":")
    ax.plot(component, cumulative, color="0.2", linewidth=1)
    ax.plot(component[-1], cumulative[-1], marker=".", color="0.2", clip_on=False)
    of = f"{cut:.0f} of {len(held)}" if np.isfinite(cut) else f"? of {len(held)}"
    ax.text(0.98, 0.6, of, transform=ax.transAxes, ha="right", va="center", fontsize=8, color=BLUE)


def _one_image(shares: pd.DataFrame, cut: pd.Series, of: str, title: str) -> Figure:
    order = shares.iloc[:, 0].sort_values(ascending=False, na_position="last").index
    shares, cut = shares.loc[order], cut[order]
    n, components = shares.shape
    figure, ax = plt.subplots(figsize=(8.5, min(11.0, 2.2 + 0.14 * n)), layout="constrained")
    values = shares.to_numpy(float)
    image = ax.imshow(
        values,
        cmap=SEQUENTIAL,
        # Shares fall off steeply: on a linear scale all but the first would look alike.
        norm=PowerNorm(0.5, vmin=0, vmax=float(np.nanmax(values))),
        aspect="auto",
        interpolation="nearest",
        extent=(0.5, components + 0.5, n - 0.5, -0.5),
    )
    hatch_missing(ax)
    edges = np.stack([np.arange(n) - 0.5, np.arange(n) + 0.5])
    ax.plot(np.repeat(cut + 0.5, 2), edges.T.ravel(), color=RED, linewidth=0.5)
    ax.vlines(cut + 0.5, *edges, color=RED, linewidth=2.2)
    shown = every(n, MANY)
    size = 8 if n <= 40 else 7
    ax.set_yticks(range(n)[shown], [readable(name) for name in order[shown]], fontsize=size)
    ax.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    ax.tick_params(axis="y", length=2)
    ylabel = "concept" if shown.step == 1 else f"concept (one in {shown.step} named)"
    ax.set(xlabel="component", ylabel=f"{ylabel}, largest first share at the top")
    sns.despine(ax=ax, left=True, bottom=True)
    bar = figure.colorbar(image, ax=ax, fraction=0.04, pad=0.02, format=PercentFormatter(1, 0))
    bar.set_label(f"share of the concept's {of} (square-root scale)")
    handles = [Line2D([], [], color=RED, label=f"90% of the {of}, reached at the left of the line")]
    if np.isnan(values).any():
        handles.append(missing_handle("no such component"))
    legend_above(ax, handles)
    set_title(ax, title, pad=LEGEND_PAD)
    return figure
