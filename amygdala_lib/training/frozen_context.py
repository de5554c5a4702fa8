"""The context-frozen step: gradient through what should be said, none through what was said.

The context runs once, without gradient, into a cache; the continuation runs on that cache with
gradient. Memory and the backward pass scale with the continuation, however long the context is.
Frozen keys and values still shape the gradient of the queries that read them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ..errors import ModelError, TrainingError
from ..models import LanguageModel
from .objectives import SFT, Losses, Objective, SequenceLogProbs, as_objective

Ids = Sequence[int] | Tensor

_FILLER = 0
"""What stands where a row has no token; masked, or after the last one, so never read."""


def frozen_context_loss(
    lm: LanguageModel | PreTrainedModel,
    context_ids: Ids | Sequence[Ids],
    continuation_ids: Ids | Sequence[Ids],
    *,
    objective: str | Objective = "sft",
    rejected_ids: Ids | Sequence[Ids] | None = None,
    reference: Float[Tensor, "rows 2"] | None = None,
) -> Float[Tensor, ""]:
    """The mean loss of one example, or of a batch, with gradient through the continuations only.

    Token ids are one sequence, or one sequence per row; rows differ in length as they like, and
    give what they give alone. DPO and DPOP take the `reference` totals, (rows, 2) for chosen and
    rejected: those of `token_log_probabilities` summed, before the first step.

    The last token of the context predicts the first of the continuation, so that position is in the
    gradient. An empty context is allowed, and nothing is put in its place: the first token of the
    continuation then has no loss. The model's mode is left alone; models come in evaluation mode,
    without dropout. A model that is sharded over processes (FSDP2) runs forwards in step: give each
    process a context of two tokens or more.

    Raises TrainingError, naming all that is wrong, for rows that do not pair up, an empty
    continuation, an only token that nothing predicts, ids outside the vocabulary, rows longer than
    the model reads, a lacking `rejected_ids` or `reference`, or gradient checkpointing in training
    mode (transformers then drops the cache); ModelError for a model that does not write or has no
    cache to continue from.
    """
    objective = as_objective(objective)
    contexts, chosen = _as_rows(context_ids), _as_rows(continuation_ids)
    rejected = [None] * len(chosen) if rejected_ids is None else _as_rows(rejected_ids)
    if objective.needs_rejected and rejected_ids is None:
        raise TrainingError(f"{_named(objective)} needs rejected_ids: what should not be said")
    if objective.needs_reference and (
        reference is None or tuple(reference.shape) != (len(chosen), 2)
    ):
        shape = None if reference is None else tuple(reference.shape)
        raise TrainingError(
            f"{_named(objective)} needs a reference of shape ({len(chosen)}, 2), not {shape}: sum "
            "token_log_probabilities of chosen and rejected before the first step"
        )
    losses, _ = example_losses(lm, contexts, chosen, rejected, objective, reference)
    return losses.mean()


def example_losses(
    lm: LanguageModel | PreTrainedModel,
    contexts: Sequence[Sequence[int]],
    chosen: Sequence[Sequence[int]],
    rejected: Sequence[Sequence[int] | None],
    objective: Objective,
    reference: Float[Tensor, "rows 2"] | None = None,
) -> Losses:
    """One loss per example, and what the objective reports of those it compares.

    Examples without a rejected continuation count by their negative log-likelihood (replay, among
    preferences). Chosen and rejected share one run of their context. Raises as
    `frozen_context_loss` does.
    """
    if len(rejected) != len(chosen):
        raise TrainingError(f"{len(chosen)} continuations, {len(rejected)} rejected: pair them up")
    pairs = [i for i, row in enumerate(rejected) if row is not None and objective.needs_rejected]
    scores = SequenceLogProbs.of(
        *token_log_probabilities(
            lm, [*contexts, *(contexts[i] for i in pairs)], [*chosen, *(rejected[i] for i in pairs)]
        )
    )
    first = scores[: len(chosen)]
    if not pairs:
        return SFT()(first)
    against = None if reference is None else reference.to(first.total)[pairs]
    compared, report = objective(first[pairs], scores[len(chosen) :], against)
    losses, _ = SFT()(first)
    return losses.index_copy(0, torch.tensor(pairs, device=losses.device), compared), report


def token_log_probabilities(
    lm: LanguageModel | PreTrainedModel,
    context_ids: Ids | Sequence[Ids],
    continuation_ids: Ids | Sequence[Ids],
) -> tuple[Float[Tensor, "rows tokens"], Bool[Tensor, "rows tokens"]]:
    """log p(token | context, tokens before) of each continuation, float32, and which there are.

    logit - logsumexp, with gradient through the continuation unless within `torch.no_grad()`.
    Where the mask is off (after the end, and at a first token that no context predicts) they are 0.
    Contexts that are alike run once. Raises as `frozen_context_loss` does.
    """
    model = lm.model if isinstance(lm, LanguageModel) else lm
    contexts, continuations = _as_rows(context_ids), _as_rows(continuation_ids)
    check_model(model)
    if model.training and getattr(model, "is_gradient_checkpointing", False):
        raise TrainingError(
            "gradient checkpointing makes transformers drop the cache, and with it the context: "
            "call model.gradient_checkpointing_disable(), the context costs no memory here"
        )
    check_rows(model, contexts, continuations)
    device = model.get_input_embeddings().weight.device
    cache, seen = _read_contexts(model, contexts, device)
    ids, positions, shown = _segment(contexts, continuations, device)
    logits = model(
        input_ids=ids,
        attention_mask=torch.cat([seen, shown], 1),
        past_key_values=cache,
        use_cache=cache is not None,
        **_accepted(model, position_ids=positions),
    ).logits
    targets, mask = _targets(contexts, continuations, logits.device)
    predicted = logits[:, : mask.shape[1]][mask].float()
    own = predicted.gather(1, targets[mask][:, None])[:, 0] - predicted.logsumexp(1)
    log_probs = own.new_zeros(mask.shape)
    log_probs[mask] = own
    return log_probs, mask


class FrozenCache(Cache):
    """A cache of which autograd may keep what it is handed: no state in it is written in place.

    The caches of transformers copy convolution and recurrent states into the tensors before them,
    which the backward pass needs. What follows a frozen context is needed once, and not kept.
    """

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **options
    ) -> Tensor:
        return torch.cat([self.layers[layer_idx].conv_states[state_idx], conv_states], dim=-1)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **options
    ) -> Tensor:
        return recurrent_states


def _read_contexts(
    model: PreTrainedModel, contexts: list[tuple[int, ...]], device: torch.device
) -> tuple[FrozenCache | None, Int[Tensor, "rows positions"]]:
    """All of the contexts but their last tokens: the cache, row for row, and its attention mask.

    Padded on the left: a row is then one piece with its continuation, and states of linear
    attention have seen nothing but zeros before it (the mask makes them zeros). None if no context
    is longer than one token.
    """
    distinct = list(dict.fromkeys(context[:-1] for context in contexts))
    numbers = {context: number for number, context in enumerate(distinct)}
    rows = torch.tensor([numbers[context[:-1]] for context in contexts], device=device)
    width = max(map(len, distinct))
    ids = [[_FILLER] * (width - len(c)) + list(c) for c in distinct]
    ids = torch.tensor(ids, dtype=torch.long, device=device)
    starts = torch.tensor([width - len(c) for c in distinct], device=device)[:, None]
    positions = torch.arange(width, device=device) - starts
    seen = (positions >= 0).long()
    if width == 0:
        return None, seen[rows]
    with torch.no_grad():
        cache = model(
            input_ids=ids,
            attention_mask=seen,
            use_cache=True,
            **_accepted(model, position_ids=positions.clamp(min=0), logits_to_keep=1),
        ).past_key_values
    if not isinstance(cache, Cache):
        raise ModelError(
            f"{type(model).__name__} gives no cache to continue a context from: upgrade "
            "transformers, or train another model"
        )
    if len(distinct) < len(contexts):
        cache.reorder_cache(rows)  # repeats rows, whatever kind of state a layer holds
    return FrozenCache(layers=cache.layers), seen[rows]


def _segment(
    contexts: list[tuple[int, ...]], continuations: list[tuple[int, ...]], device: torch.device
) -> tuple[Int[Tensor, "rows width"], Int[Tensor, "rows width"], Int[Tensor, "rows width"]]:
    """The last context token and all but the last of the continuation: ids, positions, mask.

    At least two wide: the kernels for a single token write the state in place or have no backward.
    Positions after the end repeat the last, which is one the model has.
    """
    width = max(2, *map(len, continuations))
    ids = torch.full((len(contexts), width), _FILLER)
    for row, context, continuation in zip(ids, contexts, continuations, strict=True):
        row[: len(continuation)] = torch.tensor([*(context[-1:] or [_FILLER]), *continuation[:-1]])
    starts = torch.tensor([len(c) - 1 for c in contexts])[:, None]
    lasts = starts + torch.tensor([len(c) - 1 for c in continuations])[:, None]
    positions = starts + torch.arange(width)
    shown = (positions >= 0).long()
    positions = positions.clamp(min=0).minimum(lasts)
    return ids.to(device), positions.to(device), shown.to(device)


def _targets(
    contexts: list[tuple[int, ...]], continuations: list[tuple[int, ...]], device: torch.device
) -> tuple[Int[Tensor, "rows tokens"], Bool[Tensor, "rows tokens"]]:
    """The continuations, padded right, and which of their tokens something predicts."""
    width = max(map(len, continuations))
    targets = torch.tensor([[*c, *[_FILLER] * (width - len(c))] for c in continuations])
    mask = torch.arange(width) < torch.tensor([len(c) for c in continuations])[:, None]
    mask[:, 0] &= torch.tensor([len(c) > 0 for c in contexts])
    return targets.to(device), mask.to(device)


def _accepted(model: PreTrainedModel, **options: object) -> dict[str, object]:
    """Those of the options that this family takes: Bloom, say, works out positions by itself."""
    taken = inspect.signature(model.forward).parameters
    return {name: value for name, value in options.items() if name in taken}


def _as_rows(ids: Ids | Sequence[Ids]) -> list[tuple[int, ...]]:
    """Token ids as rows; a flat sequence is a single row."""
    if isinstance(ids, Tensor):
        ids = ids.tolist()
    rows = [row.tolist() if isinstance(row, Tensor) else row for row in ids]
    if not any(isinstance(row, Sequence) for row in rows):
        rows = [rows]
    return [tuple(row) for row in rows]


def check_model(model: PreTrainedModel) -> None:
    """Raises ModelError for a model that does not write."""
    if not model.can_generate():
        raise ModelError(f"{type(model).__name__} does not write: load a causal language model")


def check_rows(
    model: PreTrainedModel,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
) -> None:
    """Raises TrainingError with all that is wrong with the rows."""
    if len(contexts) != len(continuations):
        raise TrainingError(
            f"{len(contexts)} contexts, {len(continuations)} continuations: give one of each a row"
        )
    problems = []
    vocabulary = model.get_input_embeddings().weight.shape[0]
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for number, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
        both = (*context, *continuation)
        if not continuation:
            problems.append(f"row {number} has an empty continuation: leave it out")
        elif len(both) == 1:
            problems.append(
                f"row {number} has one token and no context, so nothing predicts it: give it a "
                "context (a beginning-of-text token, say) or leave it out"
            )
        elif min(both) < 0 or max(both) >= vocabulary:
            wrong = sorted({i for i in both if not 0 <= i < vocabulary})
            problems.append(
                f"row {number} has token ids {wrong}, the model 0 to {vocabulary - 1}: tokenise "
                "with the model's own tokenizer"
            )
        if longest and len(both) > longest:
            problems.append(
                f"row {number} has {len(both)} tokens, the model reads {longest}: shorten its "
                "context"
            )
    if problems:
        raise TrainingError("\n".join(problems))


def _named(objective: Objective) -> str:
    return type(objective).__name__
