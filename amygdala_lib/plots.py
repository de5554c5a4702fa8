"""Figures: functions of arrays and frames that return the figure, at 20 concepts and at 200."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

DIVERGING = "RdBu_r"
MANY = 60
"""Above this many concepts, clusters are labelled instead of concepts."""


def similarity_heatmap(
    cosines: np.ndarray,
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
    ax.set_title(_wrapped(title), loc="left")
    return ax.figure


def similarity_clustermap(
    cosines: np.ndarray,
    concepts: Sequence[str],
    clusters: Sequence[str],
    *,
    title: str = "Concepts grouped by the model, coloured by the manifest",
) -> Figure:
    """Cosines (n, n) with the tree of average linkage; each concept's cluster is a colour."""
    n = len(concepts)
    colours = _cluster_colours(clusters)
    names = [_readable(concept) for concept in concepts]
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
    handles = _cluster_handles(colours)
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
    grid.figure.suptitle(_wrapped(title), x=0.12, y=0.93, ha="left")
    return grid.figure


def affect_plane(
    points: pd.DataFrame,
    *,
    x: str = "valence",
    y: str = "arousal",
    clusters: Sequence[str] | None = None,
    title: str = "Valence and arousal of the concepts",
    ax: Axes | None = None,
) -> Figure:
    """Concepts (the frame's index) in a plane of two of its columns; if many, a few are named."""
    if ax is None:
        _, ax = plt.subplots(figsize=(8.5, 7))
    clusters = list(clusters) if clusters is not None else ["concept"] * len(points)
    colours = _cluster_colours(clusters)
    ax.axhline(0, color="0.8", linewidth=1, zorder=0)
    ax.axvline(0, color="0.8", linewidth=1, zorder=0)
    ax.scatter(
        points[x],
        points[y],
        c=[colours[c] for c in clusters],
        s=36,
        edgecolor="white",
        linewidth=0.6,
    )
    for name in _spread_subset(points[[x, y]]):
        ax.annotate(
            _readable(name), (points.loc[name, x], points.loc[name, y]),
            xytext=(5, 4), textcoords="offset points", fontsize=8,
        )  # fmt: skip
    if len(colours) > 1:
        ax.legend(
            handles=_cluster_handles(colours),
            loc="upper left",
            bbox_to_anchor=(1.01, 1.0),
            frameon=False,
            fontsize=8,
        )
    ax.set(xlabel=x, ylabel=y)
    ax.margins(x=0.1)  # room for the names on the right
    ax.set_title(_wrapped(title), loc="left")
    sns.despine(ax=ax)
    return ax.figure


def token_heatmap(
    values: pd.DataFrame,
    *,
    title: str = "What is represented, token by token",
    most: int = 6,
    tokens_per_row: int = 36,
) -> Figure:
    """How strongly each concept (column) shows at each token (row, in reading order), in z-scores.

    The `most` concepts with the highest peaks are shown, early ones above late ones.
    Long texts go on in further panels below.
    """
    # Peaks that last: single tokens are noisy.
    lasting = values.reset_index(drop=True).rolling(12, min_periods=4, center=True).mean()
    shown = lasting.max().nlargest(most).index
    values = values[lasting[shown].idxmax().sort_values().index]
    limit = float(np.quantile(np.abs(values.to_numpy()), 0.98))
    tokens = list(values.index)
    panels = [slice(i, i + tokens_per_row) for i in range(0, len(tokens), tokens_per_row)]
    height = 0.24 * values.shape[1] + 1.0
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(12, height * len(panels) + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for ax, panel in zip(axes[:, 0], panels, strict=True):
        block = np.full((values.shape[1], tokens_per_row), np.nan)
        part = values.iloc[panel].to_numpy().T
        block[:, : part.shape[1]] = part
        image = ax.imshow(
            block, cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
        )
        ax.set_xticks(
            range(part.shape[1]), [t.strip() or "·" for t in tokens[panel]], rotation=60, ha="right"
        )
        ax.set_yticks(range(values.shape[1]), [_readable(c) for c in values.columns])
        ax.tick_params(length=0, labelsize=8)
        sns.despine(ax=ax, left=True, bottom=True)
    figure.colorbar(
        image, ax=axes[:, 0].tolist(), fraction=0.03, pad=0.01, label="standard deviations"
    )
    figure.suptitle(_wrapped(title, 110), x=0.01, ha="left")
    return figure


def concept_counts(counts: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """Texts by kind for each concept, or for each cluster with more than `MANY` concepts."""
    kinds = ["story", "direct", "paired"]
    many = len(counts) > MANY
    table = counts.groupby("cluster")[kinds].sum() if many else counts.sort_values("cluster")[kinds]
    if ax is None:
        _, ax = plt.subplots(figsize=(9, 0.24 * len(table) + 1.3))
    left = np.zeros(len(table))
    for kind, colour in zip(kinds, sns.color_palette("colorblind"), strict=False):
        ax.barh(range(len(table)), table[kind], left=left, color=colour, label=kind, height=0.75)
        left += table[kind].to_numpy()
    ax.set_yticks(range(len(table)), [_readable(name) for name in table.index])
    ax.invert_yaxis()
    ax.set(xlabel="texts")
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    least = table.sum(axis=1)
    what = "cluster" if many else "concept"
    ax.set_title(
        f"Every {what} has at least {int(least.min())} texts, "
        f"{_readable(least.idxmin())} the fewest",
        loc="left",
    )
    ax.tick_params(axis="y", length=0)
    sns.despine(ax=ax, left=True)
    return ax.figure


def text_lengths(words: Mapping[str, Sequence[int]], *, ax: Axes | None = None) -> Figure:
    """How many words the texts of each kind have: one histogram per kind on a common axis."""
    if ax is None:
        _, ax = plt.subplots(figsize=(8, 3.4))
    frame = pd.DataFrame(
        [(kind, n) for kind, lengths in words.items() for n in lengths], columns=["kind", "words"]
    )
    sns.histplot(
        frame, x="words", hue="kind", multiple="layer", binwidth=5, palette="colorblind", ax=ax
    )
    ax.set(xlabel="words in a text", ylabel="texts")
    low, high = frame["words"].quantile([0.05, 0.95])
    ax.set_title(f"Nine texts in ten have {low:.0f} to {high:.0f} words", loc="left")
    sns.despine(ax=ax)
    return ax.figure


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
        label=f"weakest there: {_readable(worst)}",
    )
    ax.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    ax.set_xticks(depth, ["embed" if layer < 0 else str(layer) for layer in depth])
    ax.set(
        xlabel=f"layer (of {n_layers})",
        ylabel="AUROC",
        ylim=(min(0.45, aurocs.min().min() - 0.02), 1.01),
    )
    best = median.idxmax()
    place = "the embeddings" if best < 0 else f"layer {best}"
    ax.set_title(f"Concepts stand out best at {place}: median AUROC {median[best]:.2f}", loc="left")
    ax.legend(frameon=False, loc="best")
    sns.despine(ax=ax)
    return ax.figure


def projections(scores: pd.DataFrame, concept: str, *, ax: Axes | None = None) -> Figure:
    """Where texts fall along one direction: columns `z` and `positive` (bool), one row per text."""
    if ax is None:
        _, ax = plt.subplots(figsize=(8, 3.2))
    sns.histplot(
        scores.assign(text=np.where(scores["positive"], _readable(concept), "all others")),
        x="z", hue="text", stat="density", common_norm=False, bins=40, palette="colorblind", ax=ax,
    )  # fmt: skip
    gap = scores.loc[scores["positive"], "z"].mean() - scores.loc[~scores["positive"], "z"].mean()
    ax.set(xlabel="projection on the direction (standard deviations)", ylabel="density")
    ax.set_title(
        f"Texts of {_readable(concept)} lie {gap:.1f} standard deviations above the others",
        loc="left",
    )
    sns.despine(ax=ax)
    return ax.figure


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
        ticks, labels = range(0, len(names), step), [_readable(name) for name in names[::step]]
    else:
        ends = [*starts[1:], len(names)]
        ticks = [(a + b - 1) / 2 for a, b in zip(starts, ends, strict=True)]
        labels = [_readable(grouped[a]) for a in starts]
    for boundary in starts[1:]:
        ax.axhline(boundary - 0.5, color="white", linewidth=0.9)
        ax.axvline(boundary - 0.5, color="white", linewidth=0.9)
    ax.set_xticks(ticks, labels, rotation=60, ha="right", rotation_mode="anchor")
    ax.set_yticks(ticks, labels)
    ax.tick_params(length=0, labelsize=9)
    sns.despine(ax=ax, left=True, bottom=True)


def _cluster_colours(clusters: Sequence[str]) -> dict[str, tuple[float, float, float]]:
    names = sorted(set(clusters))
    palette = sns.color_palette("colorblind")
    if len(names) > len(palette):  # neighbours on the hue circle differ in lightness too
        light, dark = sns.husl_palette(len(names), l=0.72), sns.husl_palette(len(names), l=0.42)
        palette = [(light, dark)[i % 2][i] for i in range(len(names))]
    return dict(zip(names, palette, strict=False))


def _cluster_handles(colours: Mapping[str, tuple[float, float, float]]) -> list[Patch]:
    return [Patch(color=colour, label=_readable(name)) for name, colour in colours.items()]


def _spread_subset(points: pd.DataFrame, most: int = MANY) -> list[str]:
    """Up to `most` names whose points are far from each other: the rest would overlap."""
    if len(points) <= most // 2:
        return list(points.index)
    xy = ((points - points.min()) / (points.max() - points.min()).replace(0, 1)).to_numpy()
    chosen = [int(np.argmax(np.abs(xy - xy.mean(0)).sum(1)))]
    distance = np.linalg.norm(xy - xy[chosen[0]], axis=1)
    while len(chosen) < most and distance.max() > 0.05:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(xy - xy[chosen[-1]], axis=1))
    return [points.index[i] for i in chosen]


def _readable(name: str) -> str:
    return name.replace("_", " ")


def _wrapped(title: str, width: int = 80) -> str:
    return "\n".join(textwrap.wrap(title, width))
