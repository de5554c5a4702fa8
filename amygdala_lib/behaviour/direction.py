"""The direction of a behaviour: how its two answers differ, on average over the pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..artefacts import provenance
from ..directions import Directions
from ..errors import AmygdalaError
from ..models import LanguageModel, weight_hash
from .pairs import Behaviour, Pair
from .reading import AnswerPool, read_answers


def behaviour_directions(
    lm: LanguageModel,
    behaviour: Behaviour,
    layers: Iterable[int] | None = None,
    *,
    pool: AnswerPool = "mean",
    chat_template: bool = False,
    progress: bool = True,
) -> Directions:
    """The direction from a behaviour's second pole to its first, from its training pairs.

    mean over pairs of h(first answer) - h(second answer), unit norm, where h is the residual stream
    over the answer's own tokens (`mean`; a behaviour is spread over a whole answer) or at the last
    one. The conversation is read and never pooled. There is one row, named after the first pole:
    the second pole is the same row at a negative strength. `residual_norms` are of the answers'
    tokens; `means` and `stds` of their projections, both poles together.

    Source: contrastive activation addition (Panickssery et al., arXiv 2312.06681).

    `chat_template` puts the conversation in the model's own form; best for a model that was trained
    to chat. Raises AmygdalaError if the answers do not differ where they are read (every last token
    the same full stop, at the embeddings), and ModelError as `read_answers` does.
    """
    answers = read_answers(
        lm, behaviour.train, layers, pool=pool, chat_template=chat_template, progress=progress
    )
    vectors, means, stds = {}, {}, {}
    for layer, values in answers.values.items():
        if not differences(values).mean(0).any():
            raise AmygdalaError(
                f"the answers of {behaviour.name} do not differ at layer {layer} with "
                f"pool={pool!r}: read another layer, or their means with pool='mean'"
            )
        vectors[layer] = unit_difference(values)
        projections = values.flatten(0, 1) @ vectors[layer].T
        means[layer], stds[layer] = projections.mean(0), projections.std(0)
    first, second = behaviour.poles
    return Directions(
        concepts=[first],
        vectors=vectors,
        residual_norms=answers.norms,
        means=means,
        stds=stds,
        provenance=provenance(
            model=lm.name,
            revision=lm.revision,
            weight_hash=weight_hash(lm.model),
            n_layers=len(lm.layers),
            behaviour=behaviour.name,
            corpus_hash=behaviour.hash,
            opposite=second,
            method="behaviour",
            pool=pool,
            chat_template=chat_template,
        ),
    )


def unit_difference(
    values: Float[Tensor, "pairs 2 hidden"], signs: Int[Tensor, " pairs"] | int = 1
) -> Float[Tensor, "1 hidden"]:
    """The mean over pairs of the difference, as a unit row; a sign of -1 swaps a pair's poles."""
    mean = (signs * differences(values).T).mean(1)
    return torch.nn.functional.normalize(mean, dim=0)[None]


def differences(values: Float[Tensor, "pairs 2 hidden"]) -> Float[Tensor, "pairs hidden"]:
    """The first answer less the second."""
    return values[:, 0] - values[:, 1]


def groups_of(pairs: Sequence[Pair]) -> np.ndarray:
    """A number per pair, the same for a pair and its mirrors: (pairs,) int64 from 0."""
    return np.unique([pair.group for pair in pairs], return_inverse=True)[1]
