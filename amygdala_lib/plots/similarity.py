"""Similarity: which concepts, and which layers, are like which."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from ..errors import AmygdalaError
from .frames import check_frame, check_measured
from .style import (
    DIVERGING,
    LEGEND_PAD,
    MANY,
    PALETTE,
    SEQUENTIAL,
    cluster_colours,
    cluster_handles,
    every,
    hatch_missing,
    layer_name,
    layer_phrase,
    legend_above,
    missing_handle,
    readable,
    set_title,
    wrapped,
)

STEADY = 0.9
"""Layers whose similarities correlate at least this much have the same geometry."""
SPAN = 3
"""Fewer layers than this, or than a third of all, are no stretch over which geometry stays."""


def similarity_heatmap(
    cosines: Float[np.ndarray, "n n"],
    concepts: Sequence[str],
    clusters: Sequence[str] | None = None,
    *,
    title: str = "Cosine similarity between concept directions",
    ax: Axes | None = None,
) -> Figure:
    """Cosines (n, n) between concepts, like beside like, diverging around 0.

    With `clusters` (one name per concept) rows are grouped by cluster, and by likeness within one;
    without, by likeness alone. More than `MANY` concepts are labelled by cluster.
    """
    cosines, order, names = _ordered(cosines, concepts, clusters)
    grouped = [clusters[i] for i in order] if clusters is not None else None
    n = len(names)
    if ax is None:
        side = min(11.0, 3.0 + 0.27 * n)
        _, ax = plt.subplots(figsize=(side + 1.4, side))
    # The diagonal is 1 by definition and would set the scale for everything else.
    off_diagonal = cosines[~np.eye(n, dtype=bool)]
    limit = max(0.05, float(np.abs(off_diagonal).max())) if n > 1 else 1.0
    shown = np.where(np.eye(n, dtype=bool), np.nan, cosines)
    image = ax.imshow(shown, cmap=DIVERGING, vmin=-limit, vmax=limit, interpolation="nearest")
    ax.set_facecolor("0.85")
    _label_square(ax, names, grouped)
    ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.02, label="cosine (diagonal left out)")
    ax.set_title(wrapped(title), loc="left")
    return ax.figure


def similarity_clustermap(
    cosines: Float[np.ndarray, "n n"],
    concepts: Sequence[str],
    clusters: Sequence[str],
    *,
    title: str = "Concepts grouped by the model, coloured by the manifest",
) -> Figure:
    """Cosines (n, n) with the tree of average linkage; each concept's cluster is a colour."""
    n = len(concepts)
    colours = cluster_colours(clusters)
    names = [readable(concept) for concept in concepts]
    strip = pd.Series([colours[c] for c in clusters], index=names, name="cluster")
    frame = pd.DataFrame(cosines, index=names, columns=names)
    limit = max(0.05, float(np.abs(cosines[~np.eye(n, dtype=bool)]).max()))
    tree = _tree(cosines)
    side = min(12.0, 4.0 + 0.27 * n)
    named = n <= MANY
    grid = sns.clustermap(
        frame.mask(np.eye(n, dtype=bool)),
        row_linkage=tree,
        col_linkage=tree,
        row_colors=strip,
        cmap=DIVERGING,
        vmin=-limit,
        vmax=limit,
        figsize=(side + 2.2, side),
        xticklabels=named,
        yticklabels=named,
        dendrogram_ratio=0.12,
        colors_ratio=0.02,
        cbar_pos=None,
    )
    grid.ax_col_dendrogram.set_visible(False)
    grid.ax_heatmap.set(xlabel="", ylabel="")
    grid.ax_heatmap.set_facecolor("0.85")
    grid.ax_heatmap.tick_params(labelsize=9, length=0)
    handles = cluster_handles(colours)
    grid.figure.legend(
        handles=handles,
        title="cluster",
        loc="upper left",
        bbox_to_anchor=(1.0, 0.88),
        frameon=False,
        fontsize=9,
    )
    bar = grid.figure.add_axes((1.02, 0.08, 0.02, 0.2))
    grid.figure.colorbar(grid.ax_heatmap.collections[0], cax=bar, label="cosine")
    grid.figure.suptitle(wrapped(title), x=0.12, y=0.93, ha="left")
    return grid.figure


def layer_likeness(rsa: pd.DataFrame) -> Figure:
    """Which layers see the concepts alike: a square of correlations, the steady stretch framed.

    `rsa` (layers, layers), symmetric: Spearman correlations between the layers' matrices of
    concept similarities (representational similarity analysis, Kriegeskorte et al. 2008). Layer
    -1 is the embeddings; NaN is hatched. Raises AmygdalaError if rows and columns are not the same
    layers, or if the frame is not symmetric, is empty or has no value off its diagonal.
    """
    check_frame(rsa, "layer_likeness", each="layer")
    _check_symmetric(rsa)
    layers = sorted(rsa.index)
    rsa = rsa.loc[layers, layers]
    values, n = rsa.to_numpy(float), len(layers)
    check_measured(rsa.mask(np.eye(n, dtype=bool)), "layer_likeness")
    side = min(9.0, 3.4 + 0.2 * n)
    figure, ax = plt.subplots(figsize=(side + 1.2, side))
    # Between layers correlations are mostly far above 0, where only the upper range tells.
    low = float(np.nanmin(values))
    scale = (
        {"cmap": DIVERGING, "vmin": -1, "vmax": 1}
        if low < 0
        else {"cmap": SEQUENTIAL, "vmin": min(np.floor(10 * low) / 10, 0.9), "vmax": 1}
    )
    image = ax.imshow(values, interpolation="nearest", **scale)
    hatch_missing(ax)
    start = _steady_from(values)
    if start is not None:
        ax.add_patch(
            Rectangle(
                (start - 0.5, start - 0.5), n - start, n - start,
                fill=False, edgecolor=PALETTE[8], linewidth=2.5, clip_on=False,
            )
        )  # fmt: skip
    shown = every(n, 24)
    names = [layer_name(layer) for layer in layers]
    ax.set_xticks(range(n)[shown], names[shown], rotation=90 if n > 9 else 0)
    ax.set_yticks(range(n)[shown], names[shown])
    ax.tick_params(length=0, labelsize=9)
    ax.set(xlabel="layer", ylabel="layer")
    sns.despine(ax=ax, left=True, bottom=True)
    bar = figure.colorbar(image, ax=ax, fraction=0.046, pad=0.03)
    bar.set_label("Spearman correlation of concept similarities")
    missing = bool(np.isnan(values).any())
    if missing:
        legend_above(ax, [missing_handle("not measured")])
    set_title(ax, _likeness_finding(values, layers, start), pad=LEGEND_PAD if missing else None)
    return figure


def _check_symmetric(rsa: pd.DataFrame) -> None:
    if set(rsa.index) != set(rsa.columns) or rsa.shape[0] != rsa.shape[1]:
        raise AmygdalaError(
            f"layer_likeness draws layers by layers: rows are {list(rsa.index)}, columns "
            f"{list(rsa.columns)}"
        )
    if len(rsa) < 2:
        raise AmygdalaError(f"layer_likeness compares layers: there is only {list(rsa.index)}")
    values = rsa[rsa.index].to_numpy(float)
    alike = np.isclose(values, values.T, atol=1e-4, equal_nan=True)
    if not alike.all():
        row, column = np.argwhere(~alike)[0]
        a, b = rsa.index[row], rsa.index[column]
        raise AmygdalaError(
            f"layer_likeness draws a symmetric frame: {a} with {b} is {values[row, column]:.3f}, "
            f"{b} with {a} is {values[column, row]:.3f}"
        )


def _steady_from(values: Float[np.ndarray, "n n"]) -> int | None:
    """The first layer from which on all correlate; None if that is no stretch worth naming."""
    n = len(values)
    for start in range(n):
        # Rounded as the title rounds; a layer is like itself whatever its entry says.
        block = values[start:, start:][~np.eye(n - start, dtype=bool)].round(2)
        if (block >= STEADY).all():
            return start if n - start >= min(n, max(SPAN, n / 3)) else None
    return None


def _likeness_finding(
    values: Float[np.ndarray, "n n"], layers: Sequence[int], start: int | None
) -> str:
    if start == 0:
        weakest = np.nanmin(values)
        return f"All layers see the concepts alike: any two correlate at least {weakest:.2f}"
    beside = np.diagonal(values, 1)
    if start is None and (beside.round(2) >= STEADY).all() and not np.isnan(values[0, -1]):
        return (
            "The geometry of the concepts drifts slowly: neighbouring layers correlate at least "
            f"{beside.min():.2f}, the first and the last {values[0, -1]:.2f}"
        )
    change = ""
    if not np.isnan(beside).all():
        i = int(np.nanargmin(beside))
        a, b = layer_phrase(layers[i]), layer_phrase(layers[i + 1])
        change = f"changes most between {a} and {b} (correlation {beside[i]:.2f})"
    if start is None:
        return f"The geometry of the concepts {change or 'has gaps: neighbours were not compared'}"
    stays = (
        f"From {layer_phrase(layers[start])} on the geometry of the concepts stays "
        f"(correlations of at least {STEADY:g})"
    )
    return f"{stays}; it {change}" if change else stays


def _ordered(
    cosines: np.ndarray, concepts: Sequence[str], clusters: Sequence[str] | None
) -> tuple[np.ndarray, list[int], list[str]]:
    order = list(leaves_list(_tree(cosines))) if len(concepts) > 2 else list(range(len(concepts)))
    if clusters is not None:
        # Clusters in the order in which likeness meets them, so that neighbours stay neighbours.
        position = {
            c: np.mean([order.index(i) for i, d in enumerate(clusters) if d == c])
            for c in set(clusters)
        }
        order.sort(key=lambda i: (position[clusters[i]], clusters[i]))
    return cosines[np.ix_(order, order)], order, [concepts[i] for i in order]


def _tree(cosines: np.ndarray) -> np.ndarray:
    distance = 1 - (cosines + cosines.T) / 2
    np.fill_diagonal(distance, 0)
    return linkage(
        squareform(np.clip(distance, 0, None), checks=False), "average", optimal_ordering=True
    )


def _label_square(ax: Axes, names: Sequence[str], grouped: Sequence[str] | None) -> None:
    starts = [i for i in range(len(names)) if grouped and (i == 0 or grouped[i] != grouped[i - 1])]
    if len(names) <= MANY or grouped is None:
        step = max(1, len(names) // MANY)
        ticks, labels = range(0, len(names), step), [readable(name) for name in names[::step]]
    else:
        ends = [*starts[1:], len(names)]
        ticks = [(a + b - 1) / 2 for a, b in zip(starts, ends, strict=True)]
        labels = [readable(grouped[a]) for a in starts]
    for boundary in starts[1:]:
        ax.axhline(boundary - 0.5, color="white", linewidth=0.9)
        ax.axvline(boundary - 0.5, color="white", linewidth=0.9)
    ax.set_xticks(ticks, labels, rotation=60, ha="right", rotation_mode="anchor")
    ax.set_yticks(ticks, labels)
    ax.tick_params(length=0, labelsize=9)
    sns.despine(ax=ax, left=True, bottom=True)
