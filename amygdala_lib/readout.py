"""A readout: how strongly each concept shows in the residual stream."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from .capture import Activations
from .directions import Directions
from .errors import ModelError


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


def _tokens_of(acts: Activations) -> list[list[str]]:
    if acts.tokens is None:
        raise ModelError(f"pool={acts.pool!r} keeps no tokens: capture with pool='tokens'")
    return acts.tokens
