"""Readouts: which states show at each token, as coloured text and over time."""

from __future__ import annotations

import html
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from jaxtyping import Float
from matplotlib.figure import Figure

from ..errors import AmygdalaError
from .frames import check_frame, check_measured
from .style import PALETTE, every, number, readable, set_title, spread_evenly

HIGH, LOW = (214, 69, 65), (33, 118, 199)
"""Red and blue, told apart by people who do not see red; over the page's own background."""
OPAQUE = 0.55
"""At the ends of the scale: text stays readable on it, dark on white and white on black."""
NOT_READ = "chosen last, and not read"


def coloured_tokens(
    tokens: Sequence[str],
    values: Sequence[float] | Float[np.ndarray, " tokens"],
    concept: str,
    *,
    limit: float | None = None,
) -> str:
    """A text as HTML, each token coloured by how strongly a concept shows there.

    `values` are z-scores: red above 0, blue below, none at 0, full at `limit` and beyond (98% of
    the values are within it by default). NaN, a token the model chose and never read, is
    underlined. The value stands in each token's title; a legend and a line in words are below.
    Colours are laid over the page's own background, so it reads in light and dark mode alike.

    Raises AmygdalaError if there are no tokens, not as many as values, or infinite values.
    """
    values = np.asarray(values, dtype=float)
    if not len(tokens) or values.shape != (len(tokens),):
        raise AmygdalaError(f"{len(tokens)} tokens, values {values.shape}: pass one value a token")
    if np.isinf(values).any():
        raise AmygdalaError(f"{np.isinf(values).sum()} values are infinite: a deviation may be 0")
    measured = np.abs(values[~np.isnan(values)])
    if limit is None:
        limit = float(np.quantile(measured, 0.98)) if len(measured) else 0.0
    limit = limit or 1.0
    name = html.escape(readable(concept))
    spans = "".join(
        _span(token, value, name, limit) for token, value in zip(tokens, values, strict=True)
    )
    scale = f"rgba{(*LOW, OPAQUE)}, transparent, rgba{(*HIGH, OPAQUE)}"
    summary = _strongest(tokens, values)
    return (
        f'<figure role="group" aria-label="Text coloured by {name}. {summary}" '
        'style="margin: 0; color: var(--jp-content-font-color1, inherit)">'
        f'<div style="white-space: pre-wrap; line-height: 1.7; overflow-wrap: anywhere">{spans}'
        '</div><figcaption style="font-size: 85%; margin-top: 0.4em; '
        'color: var(--jp-content-font-color2, inherit)">'
        f"<b>{name}</b>, standard deviations: {number(-limit)} "
        f'<span aria-hidden="true" style="display: inline-block; width: 8em; height: 0.8em; '
        f"vertical-align: middle; border: 1px solid var(--jp-border-color1, gray); "
        f'background: linear-gradient(to right, {scale})"></span> {number(limit)}. {summary}'
        "</figcaption></figure>"
    )


def _span(token: str, value: float, name: str, limit: float) -> str:
    text = html.escape(token)
    if np.isnan(value):
        style, told = "text-decoration: underline dotted", NOT_READ
    else:
        strength = min(1.0, abs(float(value)) / limit)
        colour = HIGH if value > 0 else LOW
        style = f"background: rgba{(*colour, round(OPAQUE * strength, 3))}"
        told = f"{name} {number(value)}"
    return f'<span style="{style}; border-radius: 2px" title="{told}">{text}</span>'


def _strongest(tokens: Sequence[str], values: Float[np.ndarray, " tokens"]) -> str:
    """In words, for those who do not see colours; escaped."""
    if np.isnan(values).all():
        return "No token was read."
    high, low = int(np.nanargmax(values)), int(np.nanargmin(values))
    quoted = [html.escape(_word(tokens, place) or "a space") for place in (high, low)]
    return (
        f"Highest at “{quoted[0]}” ({number(values[high])}), "
        f"lowest at “{quoted[1]}” ({number(values[low])})."
    )


def top_states(
    values: pd.DataFrame, *, most: int = 6, written_from: int | None = None, title: str = ""
) -> Figure:
    """The states that peak highest, over the tokens of a text; the others as a band.

    `values` are z-scores, tokens (the index, in reading order) by concepts, as `live.zscores` and
    `Readout.frame` give them. Lines are means over a few tokens around each, by which peaks are
    judged too: single tokens are noisy. Of up to 150 tokens each is a dot besides. `written_from`
    is the place of the first token that the model wrote. The title says the finding unless one is
    given.

    Raises AmygdalaError for an empty frame, or one without a number in it.
    """
    rows = len(values)
    figure = plt.figure(figsize=(min(13, 6 + 0.09 * rows), 4.2), layout="constrained")
    draw_top_states(figure, values, most=most, written_from=written_from, title=title)
    return figure


def draw_top_states(
    figure: Figure,
    values: pd.DataFrame,
    *,
    most: int = 6,
    written_from: int | None = None,
    title: str = "",
) -> None:
    """`top_states` in a figure that is already there, so that pyplot need not know of it."""
    check_frame(values, "top_states")
    check_measured(values, "top_states")
    tokens = [str(token) for token in values.index]
    n = len(tokens)
    values = values.reset_index(drop=True)
    window = int(np.clip(n // 12, 1, 9))
    smooth = values.rolling(window, min_periods=1, center=True).mean().where(values.notna())
    peaks = smooth.max().nlargest(min(most, len(PALETTE)))
    shown = list(peaks.index)
    ax = figure.add_subplot()
    others = smooth.drop(columns=shown)
    if others.shape[1] > 1:
        low, high = others.quantile(0.05, axis=1), others.quantile(0.95, axis=1)
        ax.fill_between(smooth.index, low, high, color="0.5", alpha=0.18, linewidth=0)
        ax.plot([], [], color="0.5", alpha=0.3, linewidth=6, label="the other states (90%)")
    ax.axhline(0, color="0.5", linewidth=0.6)
    for colour, concept in zip(PALETTE, shown, strict=False):
        ax.plot(smooth.index, smooth[concept], color=colour, linewidth=1.8)
        if window > 1 and n <= 150:  # more would be a cloud
            ax.scatter(values.index, values[concept], color=colour, s=5, alpha=0.35, linewidths=0)
    if written_from is not None and 0 < written_from < n:
        ax.axvline(written_from - 0.5, color="0.5", linewidth=0.8, linestyle="--")
        ax.annotate(
            "written by the model →", (written_from - 0.5, 1), xycoords=("data", "axes fraction"),
            xytext=(4, -3), textcoords="offset points", fontsize=8, va="top",
        )  # fmt: skip
    ticks = range(n)[every(n, 40)]
    labels = [_label(tokens[place]) for place in ticks]
    ax.set_xticks(ticks, labels, rotation=60, ha="right", fontsize=8)
    ax.set_xlim(-0.5, n - 0.5)
    ax.tick_params(length=2)
    span = f", means of {window} tokens" if window > 1 else ""
    ax.set_ylabel(f"standard deviations{span}", fontsize=9)
    _label_ends(ax, smooth[shown])
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)
    sns.despine(ax=ax)
    set_title(ax, title or _finding(values, smooth[shown], window, tokens), pad=18)


def _word(tokens: Sequence[str], place: int) -> str:
    """The whole word that a token is part of, where tokens tell words apart."""
    first = last = place
    if any(token[:1].isspace() for token in tokens):
        while first > 0 and (tokens[first - 1][-1:] + tokens[first][:1]).isalnum():
            first -= 1
        while last + 1 < len(tokens) and (tokens[last][-1:] + tokens[last + 1][:1]).isalnum():
            last += 1
    return "".join(tokens[first : last + 1]).strip()


def _label(token: str) -> str:
    """As a figure can show it: a pair of dollars would be taken for a formula."""
    shown = "".join(c if c.isprintable() else "·" for c in token.strip())
    return shown.replace("$", r"\$") or "·"


def _label_ends(ax: plt.Axes, lines: pd.DataFrame) -> None:
    """Names beside the ends of lines, apart from one another."""
    low, high = ax.get_ylim()
    ends = lines.ffill().iloc[-1].to_numpy()
    gap = 0.065 * (high - low)
    places = spread_evenly(ends, gap, low + gap / 2, high - gap / 2)
    ax.set_ylim(low, high)
    right = len(lines) - 0.5
    beyond = right + 0.025 * len(lines)
    for colour, concept, end, place in zip(PALETTE, lines, ends, places, strict=False):
        last = lines[concept].last_valid_index()
        ax.plot([last, beyond], [end, place], color=colour, linewidth=0.6, clip_on=False)
        ax.plot(beyond, place, "o", color=colour, markersize=4, clip_on=False)
        ax.annotate(
            readable(concept), (beyond, place), xytext=(5, 0), textcoords="offset points",
            va="center", fontsize=9, annotation_clip=False,
        )  # fmt: skip
    ax.set_xlim(-0.5, right)


def _finding(values: pd.DataFrame, lines: pd.DataFrame, window: int, tokens: list[str]) -> str:
    """The two highest peaks, in reading order, each by the word that stands out in it."""
    told = {}
    for concept in lines.columns[:2]:
        peak = int(lines[concept].idxmax())
        around = values[concept].iloc[max(0, peak - window // 2) : peak + window // 2 + 1]
        word = _label(_word(tokens, int(around.idxmax())))
        height = number(lines[concept][peak])
        told[peak, concept] = f"{readable(concept)} peaks around “{word}” ({height})"
    return ", then ".join(told[at] for at in sorted(told))
