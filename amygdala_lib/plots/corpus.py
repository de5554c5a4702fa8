"""Corpus: how many texts there are, and how long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .style import MANY, readable


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
    ax.set_yticks(range(len(table)), [readable(name) for name in table.index])
    ax.invert_yaxis()
    ax.set(xlabel="texts")
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    least = table.sum(axis=1)
    what = "cluster" if many else "concept"
    ax.set_title(
        f"Every {what} has at least {int(least.min())} texts, "
        f"{readable(least.idxmin())} the fewest",
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
