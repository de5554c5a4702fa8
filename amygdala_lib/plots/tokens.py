"""Tokens: what is represented at each token of a text."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from .style import DIVERGING, readable, wrapped


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
        ax.set_yticks(range(values.shape[1]), [readable(c) for c in values.columns])
        ax.tick_params(length=0, labelsize=8)
        sns.despine(ax=ax, left=True, bottom=True)
    figure.colorbar(
        image, ax=axes[:, 0].tolist(), fraction=0.03, pad=0.01, label="standard deviations"
    )
    figure.suptitle(wrapped(title, 110), x=0.01, ha="left")
    return figure
