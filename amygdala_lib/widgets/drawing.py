"""Drawing: what panels show, as HTML, from values alone."""

from __future__ import annotations

import hashlib
import html
import io
import re
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..models import depth_label
from ..plots.readout import coloured_tokens, draw_top_states
from ..plots.style import number, readable
from .continuation import Continuation

GRID = (
    "display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24em, 100%), 1fr)); "
    "gap: 0.5em 2em; color: var(--jp-content-font-color1, inherit); "
    "font-family: var(--jp-content-font-family, inherit)"
)


def draw_comparison(
    plain: Continuation | None,
    steered: Continuation | None,
    concept: str,
    steering: str,
    *,
    figures: bool = True,
) -> str:
    """Both continuations side by side as HTML, coloured by one concept on one scale.

    Each with its top states over time, unless `figures` is off: while text is being written, say.
    None stands for one that is yet to come. `steering` says what was done to the second.
    """
    limit = _limit([c.zscores[concept] for c in (plain, steered) if c is not None])
    columns = [("Unsteered", plain), (f"Steered: {steering}", steered)]
    sections = "".join(
        _column(heading, found, concept, limit, figures) for heading, found in columns
    )
    return f'<div style="{GRID}">{sections}</div>'


def draw_reading(zscores: pd.DataFrame, concept: str) -> str:
    """A text coloured by one concept, above its top states over time, as HTML.

    `zscores` are tokens (the index) by concepts.
    """
    text = coloured_tokens(list(zscores.index), zscores[concept].to_numpy(), concept)
    sections = f"<section>{text}</section><section>{_figure(zscores)}</section>"
    return f'<div style="{GRID}">{sections}</div>'


def draw_message(message: str, *, error: bool = False) -> str:
    """A line of what goes on, or what went wrong; read out by screen readers as it changes."""
    role, colour = ("alert", "error-color1") if error else ("status", "content-font-color2")
    return (
        f'<div role="{role}" aria-live="polite" style="white-space: pre-wrap; '
        f'color: var(--jp-{colour}, inherit)">{html.escape(message)}</div>'
    )


def steering_phrase(strengths: Mapping[str, float], layers: tuple[int, ...], n_layers: int) -> str:
    """`afraid +0.50, calm -0.20 at layer 4 of 8 (50%)`."""
    turned = [f"{readable(c)} {number(s)}" for c, s in strengths.items() if s]
    if not turned:
        return "all strengths are 0"
    where = depth_label(layers[0], n_layers)
    if len(layers) > 1:
        where = f"{len(layers)} layers, {where} to {depth_label(layers[-1], n_layers)}"
    return f"{', '.join(turned)} at {where}"


def as_svg(figure: Figure) -> str:
    """A figure as an SVG element whose black is the page's own text colour; no background."""
    written = io.StringIO()
    figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    # Its style sheet would be the page's.
    left_out = r"<!--.*?-->|<style.*?</style>|<metadata.*?</metadata>"
    svg = re.sub(left_out, "", written.getvalue(), flags=re.S)
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups()
    body = svg[svg.index(">", svg.index("<svg")) + 1 :].replace("#000000", "currentColor")
    title = html.escape(" ".join(ax.get_title(loc="left") for ax in figure.axes))
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}" fill="currentColor" '
        f'stroke-linejoin="round" style="width: 100%; max-width: {width}pt; height: auto">'
        f"{_renamed(body)}"
    )


def _renamed(svg: str) -> str:
    """With ids that depend on what is drawn alone: matplotlib's are random, or in every figure."""
    found = dict.fromkeys(re.findall(r' id="([^"]+)"', svg))
    names = {name: str(number) for number, name in enumerate(found)}

    def rename(prefix: str) -> str:
        return re.sub(
            r'( id="|href="#|url\(#)([^")]+)', lambda m: f"{m[1]}{prefix}-{names[m[2]]}", svg
        )

    return rename(hashlib.sha256(rename("").encode()).hexdigest()[:12])


def _column(
    heading: str, found: Continuation | None, concept: str, limit: float, figures: bool
) -> str:
    title = html.escape(heading)
    inside = "…"
    if found is not None and len(found.zscores):
        values = found.zscores[concept].to_numpy()
        inside = coloured_tokens(found.tokens, values, concept, limit=limit)
        if figures:
            inside += _figure(found.zscores, found.written_from)
    return (
        f'<section aria-label="{title}"><h4 style="margin: 0.2em 0">{title}</h4>{inside}</section>'
    )


def _figure(zscores: pd.DataFrame, written_from: int | None = None) -> str:
    if not zscores.notna().to_numpy().any():
        return ""
    figure = Figure(figsize=(7.5, 3.8), layout="constrained")  # not pyplot's: cells would show it
    draw_top_states(figure, zscores, written_from=written_from)
    return as_svg(figure)


def _limit(values: list[pd.Series]) -> float | None:
    together = np.concatenate([np.abs(v.dropna().to_numpy()) for v in values] or [np.empty(0)])
    return float(np.quantile(together, 0.98)) if len(together) else None
