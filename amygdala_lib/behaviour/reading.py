"""What a model makes of an answer: its activations over the answer alone, and how likely it is."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from ..capture import residual_stream
from ..errors import ModelError
from ..models import LanguageModel, check_layers
from .pairs import Pair, rendered

AnswerPool = Literal["mean", "last"]
ANSWER_POOLS = ("mean", "last")


class Answers(NamedTuple):
    """The residual stream of both answers of every pair, pooled over the answer's own tokens.

    `values[layer]` is (pairs, 2, hidden) float32 on the CPU; `norms[layer]` the mean L2 norm over
    those tokens.
    """

    values: dict[int, Float[Tensor, "pairs 2 hidden"]]
    norms: dict[int, float]


@torch.no_grad()
def read_answers(
    lm: LanguageModel,
    pairs: Sequence[Pair],
    layers: Iterable[int] | None = None,
    *,
    pool: AnswerPool = "mean",
    chat_template: bool = False,
    progress: bool = True,
) -> Answers:
    """The residual stream of each answer in its conversation: over its tokens, or at the last.

    One forward per answer, so that nothing is padded. Raises ModelError for layers the model does
    not have, another pool, answers that do not fit into the model, or activations that overflow.
    """
    wanted = check_layers(layers, len(lm.layers))
    if pool not in ANSWER_POOLS:
        raise ModelError(f"no pool {pool!r} of an answer: choose one of {', '.join(ANSWER_POOLS)}")
    rows = _tokenized(lm, pairs, chat_template)
    found = {layer: [] for layer in wanted}
    norm_sums, n_tokens = dict.fromkeys(wanted, 0.0), 0
    names = ", ".join(map(str, wanted))
    with residual_stream(lm, wanted) as stream:
        for row in _shown(rows, f"reading {len(rows)} answers at layers {names}", progress):
            lm.model(input_ids=row.ids[None].to(lm.device), use_cache=False)
            n_tokens += int(row.own.sum())
            for layer in wanted:
                tokens = stream[layer][0][row.own.to(stream[layer].device)].float().cpu()
                norm_sums[layer] += tokens.norm(dim=1).sum().item()
                found[layer].append(tokens.mean(0) if pool == "mean" else tokens[-1])
    values = {n: torch.stack(held).unflatten(0, (-1, 2)) for n, held in found.items()}
    if wild := [n for n, held in values.items() if not held.isfinite().all()]:
        raise ModelError(
            f"the residual stream of {lm.name} is not finite at layers {wild}: load the model "
            "with dtype=torch.bfloat16 or torch.float32"
        )
    return Answers(values, {n: total / n_tokens for n, total in norm_sums.items()})


@torch.no_grad()
def log_probabilities(
    lm: LanguageModel, pairs: Sequence[Pair], *, chat_template: bool = False
) -> Float[np.ndarray, "pairs 2"]:
    """The mean log-probability (nats per token) of each answer after its conversation.

    Raises ModelError for a model that does not write, or answers that do not fit into it.
    """
    if lm.model.get_output_embeddings() is None:
        raise ModelError(f"{lm.name} reads and does not write: nothing to steer its answers by")
    found = []
    for row in _tokenized(lm, pairs, chat_template):
        logits = lm.model(input_ids=row.ids[None].to(lm.device), use_cache=False).logits[0]
        own = row.own.nonzero()[:, 0].to(logits.device)
        chances = logits[own - 1].float().log_softmax(-1)
        targets = row.ids.to(logits.device)[own]
        found.append(chances.gather(1, targets[:, None]).mean().item())
    return np.array(found).reshape(-1, 2)


class _Row(NamedTuple):
    """A conversation with one answer: token ids, and which tokens are the answer's own."""

    ids: Int[Tensor, " tokens"]
    own: Bool[Tensor, " tokens"]


def _tokenized(lm: LanguageModel, pairs: Sequence[Pair], chat_template: bool) -> list[_Row]:
    """Two rows per pair; raises ModelError naming every pair that does not fit into the model."""
    config = lm.model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or sys.maxsize
    rows, problems = [], []
    for pair in pairs:
        for answer in pair.answers:
            before, after = rendered(pair.context, answer, lm.tokenizer if chat_template else None)
            # A chat template writes special tokens itself; with the tokenizer's there were two.
            encoded = lm.tokenizer(
                before + after, add_special_tokens=not chat_template, return_offsets_mapping=True
            )
            # Special tokens span nothing: they end at 0.
            own = [end > len(before) for _, end in encoded["offset_mapping"]]
            if len(own) > longest:
                problems.append(
                    f"{pair.id} has {len(own)} tokens, {lm.name} reads {longest}: shorten it"
                )
            rows.append(_Row(torch.tensor(encoded["input_ids"]), torch.tensor(own)))
    if problems:
        raise ModelError("\n".join(dict.fromkeys(problems)))
    return rows


def _shown(rows: list[_Row], title: str, progress: bool) -> Iterator[_Row]:
    interval = 0.1 if sys.stderr.isatty() else 10
    return iter(tqdm(rows, title, unit="answer", mininterval=interval, disable=not progress))
