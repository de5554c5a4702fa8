"""Readout panel: a text, coloured by what the model holds at each token."""

from __future__ import annotations

from collections.abc import Callable

import ipywidgets
import pandas as pd
import torch

from ..models import LanguageModel, depth_label
from ..plots.style import readable
from ..readout import Readout
from ..readout.generation import check_length
from .continuation import Replaced
from .drawing import draw_message, draw_reading
from .model import with_own_hooks
from .panel import LABELLED, Panel


class ReadoutPanel(Panel):
    """A text box; below, its tokens coloured by one concept, and the top states over time.

    The text is read when it changes, in a thread; another concept or layer is only drawn anew. At
    first the concept is the one that peaks highest and the layer the one nearest two thirds of
    depth, unless they are given. The panel runs the same weights in modules of its own.

    Raises ModelError for a concept or layer the readout does not have, or another model's readout.
    """

    def __init__(
        self,
        lm: LanguageModel,
        readout: Readout,
        text: str,
        *,
        concept: str | None = None,
        layer: int | None = None,
        allow_other_model: bool = False,
    ):
        super().__init__()
        self._lm = with_own_hooks(lm)
        self._readout = readout
        self._other = {"allow_other_model": allow_other_model}
        layers, depth = readout.directions.layers, len(lm.layers)
        if layer is None:
            layer = min(layers, key=lambda index: abs(index + 1 - depth * 2 / 3))
        concepts = None if concept is None else [concept]
        readout.fitted(lm, layers=[layer], concepts=concepts, **self._other)
        self._found: dict[int, pd.DataFrame] | None = None
        self._choose = concept is None

        self.text = ipywidgets.Textarea(
            value=text,
            description="Text",
            continuous_update=False,
            style=LABELLED,
            rows=6,
            layout={"width": "100%"},
        )
        concepts = readout.directions.concepts
        self.concept = ipywidgets.Dropdown(
            options=[(readable(name), name) for name in concepts],
            value=concept or concepts[0],
            description="Concept",
            style=LABELLED,
        )
        self.layer = ipywidgets.Dropdown(
            options=[(depth_label(index, depth), index) for index in layers],
            value=layer,
            description="Layer",
            style=LABELLED,
        )
        controls = ipywidgets.HBox([self.concept, self.layer], layout={"flex_flow": "row wrap"})
        self.widget = ipywidgets.VBox([self.text, controls, self.status, self.output])
        self.text.observe(lambda change: self.start(), names="value")
        for control in (self.concept, self.layer):
            control.observe(lambda change: self._draw(), names="value")

    def html(self) -> str:
        self._found = self._read(self.text.value, lambda: False)
        self._choose_concept()
        where = depth_label(self.layer.value, len(self._lm.layers))
        return draw_message(f"Read at {where}.") + self._drawn()

    def start(self) -> None:
        text = self.text.value

        def job(replaced: Callable[[], bool]) -> None:
            try:
                self._found = self._read(text, replaced)
            except Replaced:
                return
            self._choose_concept()
            self._draw()
            self.status.value = ""

        self._submit(job, "reading …")

    def _read(self, text: str, replaced: Callable[[], bool]) -> dict[int, pd.DataFrame]:
        inputs = self._lm.tokenizer(text, return_tensors="pt").to(self._lm.device)
        check_length(self._lm, inputs["input_ids"].shape[1])
        with self._readout.attach(self._lm, **self._other) as live, torch.no_grad():
            self._lm.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        if replaced():
            raise Replaced
        return {layer: live.zscores(layer) for layer in live.layers}

    def _choose_concept(self) -> None:
        """The concept that peaks highest, the first time."""
        if self._choose:
            self._choose = False
            self.concept.value = self._found[self.layer.value].max().idxmax()

    def _drawn(self) -> str:
        return draw_reading(self._found[self.layer.value], self.concept.value)

    def _draw(self) -> None:
        if self._found is not None:
            self.output.value = self._drawn()
