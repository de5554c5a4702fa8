"""A readout: how strongly each concept shows in the residual stream."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ..capture import Activations
from ..directions import Directions
from ..errors import ModelError
from ..models import LanguageModel, check_layers
from .live import LiveReadout
from .streaming import Reading


@dataclass(frozen=True, eq=False)
class Readout:
    """Projections on concept directions, in standard deviations of the texts they came from."""

    directions: Directions

    @classmethod
    def load(cls, folder: Path | str) -> Readout:
        """Load `readout.safetensors` and `readout.json` from a folder.

        `layer_<i>.vectors` and the four fields `concepts`, `layers`, `hidden_size` and `dtype` are
        enough; without means and deviations, z-scores are raw projections. Raises ArtefactError if
        the files are missing, damaged or do not fit each other.
        """
        return cls(Directions.load(folder))

    def project(
        self, hidden: Float[Tensor, "*batch hidden"], layer: int, *, zscore: bool = True
    ) -> Float[Tensor, "*batch concepts"]:
        """Project residual-stream vectors of one layer on every concept, in float32.

        Raises ModelError for a layer the readout does not hold or another hidden size.
        """
        dirs = self.directions
        if layer not in dirs.vectors:
            raise ModelError(
                f"this readout has no layer {layer} (it has {dirs.layers}): extract it first"
            )
        if hidden.shape[-1] != dirs.hidden_size:
            raise ModelError(
                f"vectors of {hidden.shape[-1]} do not fit a readout of {dirs.hidden_size}: "
                f"it was made for {dirs.provenance.get('model', 'another model')}"
            )
        values = hidden.float() @ dirs.vectors[layer].to(hidden.device).T
        if not zscore:
            return values
        return (values - dirs.means[layer].to(hidden.device)) / dirs.stds[layer].to(hidden.device)

    def calibrated(self, acts: Activations) -> Readout:
        """The same readout with z-scores in units of single tokens, those of `acts`.

        Directions come with the spread of whole texts, which pooling makes smaller than that of
        tokens. Raises ModelError unless `acts` was captured with pool="tokens" at all its layers.
        """
        _tokens_of(acts)
        means, stds = {}, {}
        for layer in self.directions.layers:
            values = self.project(torch.cat(acts[layer]), layer, zscore=False)
            means[layer], stds[layer] = values.mean(0), values.std(0)
        return Readout(replace(self.directions, means=means, stds=stds))

    def frame(self, acts: Activations, layer: int) -> list[pd.DataFrame]:
        """z-scores of every token of each text: one frame per text, tokens by concepts.

        Raises ModelError unless `acts` was captured with pool="tokens".
        """
        return [
            pd.DataFrame(
                self.project(hidden, layer).numpy(),
                index=pd.Index(tokens, name="token"),
                columns=self.directions.concepts,
            )
            for hidden, tokens in zip(acts[layer], _tokens_of(acts), strict=True)
        ]

    @contextmanager
    def attach(
        self,
        lm: LanguageModel,
        *,
        layers: Iterable[int] | None = None,
        concepts: Iterable[str] | None = None,
        prompt: bool = False,
        on_token: Callable[[Reading], None] | None = None,
        allow_other_model: bool = False,
    ) -> Iterator[LiveReadout]:
        """Within the block, record what the model holds of each concept at every token.

        Recorded are the tokens that `lm.model.generate` generates, those of its prompts too if
        `prompt`, and all tokens of other forwards (of `lm.model` itself, `lm.model(input_ids=...)`;
        not those within `capture`). What is read is the stream as the model goes on with it:
        steering shows, whichever of the two blocks is the outer one. Greedy search, sampling, beams
        (a sequence's values are those of the beams it was in), batches, padding, caches, several
        calls and models spread over devices are followed. `generate` compiles nothing meanwhile.

        `layers` and `concepts` are all of the readout's by default. `on_token` is called with each
        `Reading` as soon as the model has read the token, in the thread that runs the model; what
        it raises ends the generation. It costs a wait for the device at every token. A readout of a
        model of another name is refused unless `allow_other_model` (if this one was trained from
        that one, say); one of another size always is.

        Raises ModelError for unknown concepts, layers that are not there, or directions of another
        model, before any hook is set; and from `generate`, before it runs, for what cannot be
        followed: `inputs_embeds`, a paged cache, `custom_generate`, and, if there is `on_token`,
        beams and speculation.
        """
        chosen = self.fitted(
            lm, layers=layers, concepts=concepts, allow_other_model=allow_other_model
        )
        live = LiveReadout(chosen, lm, prompt=prompt, on_token=on_token)
        with live.listening():
            yield live

    def fitted(
        self,
        lm: LanguageModel,
        *,
        layers: Iterable[int] | None = None,
        concepts: Iterable[str] | None = None,
        allow_other_model: bool = False,
    ) -> Readout:
        """The readout of these layers and concepts, all by default, if it is one of this model.

        Raises ModelError with all that is wrong: another hidden size or another model's name,
        unknown concepts, layers that are not there.
        """
        if not isinstance(lm, LanguageModel):
            raise ModelError(
                f"a live readout spells tokens, so a {type(lm).__name__} is not enough: "
                "pass what amy.load_model returns"
            )
        dirs, problems = self.directions, _unfit(self.directions, lm, allow_other_model)
        chosen = dirs.concepts if concepts is None else list(concepts)
        if not chosen:
            problems.append("no concepts to read: name some, or leave them out for all")
        for concept in chosen:
            if concept not in dirs.concepts:
                near = difflib.get_close_matches(str(concept), dirs.concepts)
                hint = f"do you mean {' or '.join(near)}?" if near else ", ".join(dirs.concepts)
                problems.append(f"no direction for {concept!r}: {hint}")
        wanted = dirs.layers
        try:
            wanted = check_layers(dirs.layers if layers is None else layers, len(lm.layers))
        except ModelError as error:
            problems.append(str(error))
        if absent := [layer for layer in wanted if layer not in dirs.vectors]:
            problems.append(f"no directions at layers {absent}: there are {dirs.layers}")
        if problems:
            raise ModelError("\n".join(problems))
        return Readout(dirs.select(chosen, wanted))


def _unfit(dirs: Directions, lm: LanguageModel, allow_other_model: bool) -> list[str]:
    """Why directions are not this model's, if they are not."""
    if getattr(lm.model.config, "is_encoder_decoder", False):
        return [f"{lm.name} has an encoder and a decoder: which to read is not clear"]
    made_for = dirs.provenance.get("model")
    made_by = f"they were made for {made_for or 'another model'}, this is {lm.name}"
    if dirs.hidden_size != lm.hidden_size:
        return [
            f"vectors of {dirs.hidden_size} do not fit a residual stream of {lm.hidden_size}: "
            f"{made_by}"
        ]
    if made_for is None or allow_other_model or dirs.provenance.get("revision") == lm.revision:
        return []
    # A hub id and a folder of the same model agree in the last part.
    if made_for.rsplit("/", 1)[-1].casefold() == lm.name.rsplit("/", 1)[-1].casefold():
        return []
    return [
        f"these vectors are another model's: {made_by}; extract them for it, or pass "
        f"allow_other_model=True if it was trained from {made_for}"
    ]


def _tokens_of(acts: Activations) -> list[list[str]]:
    if acts.tokens is None:
        raise ModelError(f"pool={acts.pool!r} keeps no tokens: capture with pool='tokens'")
    return acts.tokens
