"""Steering panel: sliders for states, and what the model writes with and without them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

import ipywidgets

from ..directions import Directions
from ..models import EMBEDDING, LanguageModel
from ..plots.style import readable
from ..readout import Readout
from ..steering import steer
from .continuation import Continuation, Replaced, Request, write
from .drawing import draw_comparison, draw_message, steering_phrase
from .model import with_own_hooks
from .panel import LABELLED, Panel

DRAWN_EVERY = 0.15
"""Seconds between two pictures of a text that is being written."""


class SteeringPanel(Panel):
    """A slider per concept, a prompt, a range of layers and a seed; two continuations below.

    Steered and unsteered text are drawn with the same noise, so where they part is where steering
    made the model choose another word. Each is coloured by one concept, read at `read_layer` (the
    one nearest two thirds of depth), above its top states over time. Whatever changes, the text is
    written anew, and what was being written is given up. Every request holds all strengths as the
    sliders stand: nothing is left of earlier ones.

    `strengths` are what the sliders stand at first, in units of the layer's mean residual norm;
    `layers` the first and the last that are steered at first (the one nearest half of depth). The
    panel runs the same weights in modules of its own: cells that use `lm` are not steered by it.

    Raises SteeringError or ModelError for strengths, layers or directions that cannot be applied.
    """

    def __init__(
        self,
        lm: LanguageModel,
        directions: Directions,
        strengths: Mapping[str, float],
        *,
        prompt: str,
        readout: Readout | None = None,
        layers: Iterable[int] | None = None,
        read_layer: int | None = None,
        seed: int = 0,
        tokens: int = 60,
        temperature: float = 0.8,
        highest: float = 1.0,
        allow_other_model: bool = False,
    ):
        super().__init__()
        self._lm = with_own_hooks(lm)
        self._directions = directions
        self._readout = readout or Readout(directions)
        depth = len(lm.layers)
        steerable = [layer for layer in directions.layers if layer != EMBEDDING] or [EMBEDDING]
        chosen = [_nearest(steerable, depth / 2)] if layers is None else sorted(layers)
        if read_layer is None:
            read_layer = _nearest(self._readout.directions.layers, depth * 2 / 3)
        other = {"allow_other_model": allow_other_model}
        self._readout.fitted(lm, layers=[read_layer], **other)
        with steer(self._lm, directions, strengths, layers=chosen, **other):
            pass  # what is wrong is said now, not when somebody moves a slider
        self._fixed = {
            "tokens": tokens,
            "temperature": temperature,
            "read_layer": read_layer,
            **other,
        }
        self._found: tuple[Request, Continuation | None, Continuation | None] | None = None

        highest = max([highest, *map(abs, strengths.values())])
        self.sliders = {c: _slider(c, s, highest) for c, s in strengths.items()}
        self.prompt = ipywidgets.Textarea(
            prompt, description="Prompt", continuous_update=False, style=LABELLED,
            layout={"width": "100%"},
        )  # fmt: skip
        self.layers = ipywidgets.SelectionRangeSlider(
            options=[(str(layer), layer) for layer in directions.layers],
            value=(chosen[0], chosen[-1]), description="Layers", continuous_update=False,
            style=LABELLED, layout={"width": "22em"},
        )  # fmt: skip
        self.seed = ipywidgets.BoundedIntText(
            seed, min=0, max=2**31 - 1, description="Seed", style=LABELLED,
            layout={"width": "12em"},
        )  # fmt: skip
        concepts = self._readout.directions.concepts
        self.colour = ipywidgets.Dropdown(
            options=[(readable(concept), concept) for concept in concepts],
            value=next((concept for concept in strengths if concept in concepts), concepts[0]),
            description="Coloured by", style=LABELLED,
        )  # fmt: skip
        self.reset = ipywidgets.Button(description="Reset", tooltip="Set every slider to 0")
        self.widget = self._laid_out()
        self._resetting = False
        for control in (*self.sliders.values(), self.prompt, self.layers, self.seed):
            control.observe(self._changed, names="value")
        self.colour.observe(lambda change: self._draw(), names="value")
        self.reset.on_click(self._reset)

    def _laid_out(self) -> ipywidgets.Widget:
        wrapping = {"flex_flow": "row wrap"}
        below = [self.layers, self.seed, self.colour, self.reset]
        return ipywidgets.VBox(
            [
                self.prompt,
                ipywidgets.HBox([*self.sliders.values()], layout=wrapping),
                ipywidgets.HBox(below, layout=wrapping),
                self.status,
                self.output,
            ]
        )

    def html(self) -> str:
        request = self._request()
        steered = self._write(request, self._directions)
        plain = self._write(request, None)
        return draw_message(f"Prompt: {request.prompt}") + self._drawn(request, plain, steered)

    def start(self) -> None:
        request = self._request()

        def job(replaced: Callable[[], bool]) -> None:
            try:
                # The steered text first: it is what was asked for.
                steered = self._shown(request, self._directions, None, replaced)
                plain = self._shown(request, None, steered, replaced)
            except Replaced:
                return
            self._found = request, plain, steered
            self._draw()
            self.status.value = ""

        self._submit(job, "writing …")

    def _request(self) -> Request:
        low, high = self.layers.value
        return Request(
            prompt=self.prompt.value,
            strengths={concept: slider.value for concept, slider in self.sliders.items()},
            layers=tuple(layer for layer in self._directions.layers if low <= layer <= high),
            seed=self.seed.value,
            **self._fixed,
        )

    def _write(self, request: Request, directions: Directions | None, **watching) -> Continuation:
        return write(self._lm, directions, self._readout, request, **watching)

    def _shown(
        self,
        request: Request,
        directions: Directions | None,
        steered: Continuation | None,
        replaced: Callable[[], bool],
    ) -> Continuation:
        """Write while the page shows how far it has come."""
        drawn = 0.0

        def show(so_far: Callable[[], Continuation]) -> None:
            nonlocal drawn
            if time.monotonic() - drawn > DRAWN_EVERY:
                both = (None, so_far()) if directions is not None else (so_far(), steered)
                self.output.value = self._drawn(request, *both, figures=False)
                drawn = time.monotonic()

        return self._write(request, directions, replaced=replaced, on_progress=show)

    def _drawn(
        self,
        request: Request,
        plain: Continuation | None,
        steered: Continuation | None,
        *,
        figures: bool = True,
    ) -> str:
        phrase = steering_phrase(request.strengths, request.layers, len(self._lm.layers))
        return draw_comparison(plain, steered, self.colour.value, phrase, figures=figures)

    def _draw(self) -> None:
        if self._found is not None:
            self.output.value = self._drawn(*self._found)

    def _changed(self, change: object) -> None:
        if not self._resetting:
            self.start()

    def _reset(self, button: object) -> None:
        self._resetting = True  # one text for all sliders, not one for each
        try:
            for slider in self.sliders.values():
                slider.value = 0.0
        finally:
            self._resetting = False
        self.start()


def _slider(concept: str, strength: float, highest: float) -> ipywidgets.FloatSlider:
    name = readable(concept)
    return ipywidgets.FloatSlider(
        strength, min=-highest, max=highest, step=0.05, description=name, style=LABELLED,
        tooltip=f"Strength of {name}, in mean residual norms", continuous_update=False,
    )  # fmt: skip


def _nearest(layers: list[int], depth: float) -> int:
    return min(layers, key=lambda layer: abs(layer + 1 - depth))
