"""A model's own attempts: sampled from a context, judged, and the failures kept as negatives."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ..capture import residual_stream
from ..errors import TrainingError
from ..models import LanguageModel, check_layers
from .examples import Example, check_examples, end_ids
from .random_streams import random_bits, stream_key

TEMPERATURES = (0.5, 0.8, 1.1)


@dataclass(frozen=True)
class Attempt:
    """What the model itself wrote after a context, at a temperature.

    `continuation_ids` end with the end token if the model stopped; `text` is without it.
    """

    context_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...]
    temperature: float
    text: str


@dataclass(frozen=True)
class Failures:
    """A model's own failures as `triplets`, and how often it failed at each temperature.

    A triplet is an Example whose `rejected_ids` are the model's own; `failed` and `attempts` count
    by temperature, repeated failures included.
    """

    triplets: list[Example]
    failed: dict[float, int]
    attempts: dict[float, int]

    @property
    def rate(self) -> float:
        """Share of all attempts that failed."""
        return sum(self.failed.values()) / sum(self.attempts.values())


class ConceptReadout(Protocol):
    """What `readout_score` needs of a readout, as `amy.Readout` has it."""

    @property
    def directions(self) -> Any: ...

    def project(self, hidden: Tensor, layer: int) -> Float[Tensor, "*batch concepts"]: ...


@torch.no_grad()
def sample(
    lm: LanguageModel,
    context_ids: Sequence[int],
    *,
    temperatures: Sequence[float] = TEMPERATURES,
    samples: int = 4,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> list[Attempt]:
    """Let the model go on from a context, `samples` times at each temperature.

    From the whole distribution softmax(logits / T), without top-k or top-p; T = 0 takes the
    likeliest token. All attempts run as one batch on one cached context. Each has random numbers of
    its own, made from `seed`, the context, the temperature and its number, so it does not depend on
    what else is sampled; global random state is neither read nor moved. Hooks apply: within
    `amy.steer`, these are steered attempts.

    Raises TrainingError, naming everything that is wrong, for an empty context, settings out of
    range, more tokens than the model reads, or a model in training mode (dropout is random too);
    and if the logits are not finite.
    """
    context_ids = tuple(context_ids)
    _check(lm, [context_ids], temperatures, samples, max_new_tokens)
    rows = [(t, number) for t in temperatures for number in range(samples)]
    written = _write(
        lm,
        context_ids,
        [t for t, _ in rows],
        [stream_key(seed, context_ids, float(t), number) for t, number in rows],
        max_new_tokens,
    )
    texts = lm.tokenizer.batch_decode(written, skip_special_tokens=True)
    return [
        Attempt(context_ids, ids, t, text)
        for ids, (t, _), text in zip(written, rows, texts, strict=True)
    ]


def own_failures(
    lm: LanguageModel,
    examples: Sequence[Example],
    judge: Callable[[Attempt], bool],
    *,
    temperatures: Sequence[float] = TEMPERATURES,
    samples: int = 4,
    max_new_tokens: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> Failures:
    """Triplets of context, chosen continuation and what the model wrote instead.

    `judge` says whether an attempt will do; with a score, `lambda a: score(a) > 0.5`, and
    `readout_score` is one. Failures that say the same after the same context are kept once, and
    one that is the chosen continuation not at all. Sampling is that of `sample`: give every round
    its own seed.

    Raises TrainingError as `sample` does, before anything is sampled, and if the judge's answer is
    neither True nor False.
    """
    if not examples:
        raise TrainingError("no examples whose contexts the model could go on from")
    check_examples(lm, examples)
    _check(lm, [e.context_ids for e in examples], temperatures, samples, max_new_tokens)
    triplets: dict[Example, None] = {}
    failed, attempts = dict.fromkeys(temperatures, 0), dict.fromkeys(temperatures, 0)
    bar = tqdm(
        examples,
        desc=f"sampling {samples} at temperatures {', '.join(map(str, temperatures))}",
        unit="context",
        mininterval=0.1 if sys.stderr.isatty() else 10,
        disable=not progress,
    )
    for example in bar:
        for attempt in sample(
            lm,
            example.context_ids,
            temperatures=temperatures,
            samples=samples,
            max_new_tokens=max_new_tokens,
            seed=seed,
        ):
            attempts[attempt.temperature] += 1
            if _accepts(judge, attempt):
                continue
            failed[attempt.temperature] += 1
            if attempt.continuation_ids != example.continuation_ids:
                triplets[replace(example, rejected_ids=attempt.continuation_ids)] = None
        bar.set_postfix(failures=f"{sum(failed.values())}/{sum(attempts.values())}")
    return Failures(list(triplets), failed, attempts)


def readout_score(
    lm: LanguageModel, readout: ConceptReadout, concept: str, layer: int
) -> Callable[[Attempt], float]:
    """A score for judges: the concept's mean z-score over the tokens the model wrote.

    Raises AmygdalaError for a concept the readout does not hold, or a layer the model does not
    have.
    """
    column = readout.directions.index(concept)
    check_layers([layer], len(lm.layers))

    @torch.no_grad()
    def score(attempt: Attempt) -> float:
        ids = torch.tensor([attempt.context_ids + attempt.continuation_ids], device=lm.device)
        with residual_stream(lm, [layer]) as stream:
            lm.model(input_ids=ids, use_cache=False)
        own = stream[layer][0, len(attempt.context_ids) :]
        return readout.project(own, layer)[:, column].mean().item()

    return score


@dataclass
class TemperatureLoop:
    """A sampling temperature that follows what the model can do.

    After each round, the share of failures moves it by a factor of `step`, within `lowest` and
    `highest`. Within `edge` the model both fails and succeeds, it is at the edge of its ability:
    the temperature falls, so that the failures found are ever more what it would really say. Above,
    failures are common, its likeliest answers among them: the temperature rises to look further
    afield. Below, they are rare: it rises, too, as there is nothing to learn from here.

    It settles where the share of failures crosses a bound of `edge`; begin low where only chance
    gets it right. Where all is failure at any temperature it goes to `highest`: choose that so that
    the model still writes sense.
    """

    temperature: float = 0.8
    lowest: float = 0.3
    highest: float = 1.3
    step: float = 1.1
    edge: tuple[float, float] = (0.2, 0.8)

    def __post_init__(self) -> None:
        """Raises TrainingError, naming all settings that do not go together."""
        problems = []
        if not 0 < self.lowest <= self.temperature <= self.highest < math.inf:
            problems.append(
                f"lowest {self.lowest}, temperature {self.temperature}, highest {self.highest}: "
                "must be above 0 and ascend"
            )
        if not 1 < self.step < math.inf:
            problems.append(f"step is {self.step}: a factor above 1")
        if not 0 <= self.edge[0] < self.edge[1] <= 1:
            problems.append(f"edge is {self.edge}: two ascending shares of 0 to 1")
        if problems:
            raise TrainingError("\n".join(problems))

    def update(self, failure_rate: float) -> float:
        """The temperature of the next round, given the share of failures (0 to 1) in this one."""
        if not 0 <= failure_rate <= 1:
            raise TrainingError(f"the share of failures is {failure_rate}: it is 0 to 1")
        at_the_edge = self.edge[0] <= failure_rate <= self.edge[1]
        moved = self.temperature / self.step if at_the_edge else self.temperature * self.step
        self.temperature = min(max(moved, self.lowest), self.highest)
        return self.temperature


def _check(
    lm: LanguageModel,
    contexts: Iterable[tuple[int, ...]],
    temperatures: Sequence[float],
    samples: int,
    max_new_tokens: int,
) -> None:
    """Raises TrainingError with all that is wrong."""
    problems = []
    longest = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    known = lm.model.get_input_embeddings().num_embeddings
    for number, context in enumerate(contexts):
        if not context:
            problems.append(f"context {number} is empty: the model needs a token to go on from")
        if outside := [token for token in context if not 0 <= token < known]:
            problems.append(f"context {number}: {outside} are not in the vocabulary of {known}")
        if longest is not None and len(context) + max_new_tokens > longest:
            problems.append(
                f"context {number} has {len(context)} tokens: with {max_new_tokens} new ones that "
                f"is more than the {longest} {lm.name} reads"
            )
    if not temperatures or not all(0 <= t < math.inf for t in temperatures):
        problems.append(f"temperatures are {temperatures}: give finite numbers from 0 on")
    elif len(set(temperatures)) < len(temperatures):
        problems.append(f"temperatures {temperatures} hold one twice: raise samples instead")
    for name, number in {"samples": samples, "max_new_tokens": max_new_tokens}.items():
        if number < 1:
            problems.append(f"{name} is {number}: give 1 or more")
    if lm.model.training:
        problems.append(f"{lm.name} is in training mode: call `lm.model.eval()` first")
    if problems:
        raise TrainingError("\n".join(problems))


def _write(
    lm: LanguageModel,
    context_ids: tuple[int, ...],
    temperatures: list[float],
    keys: list[int],
    max_new_tokens: int,
) -> list[tuple[int, ...]]:
    """One continuation per temperature and random stream, all from the same context."""
    last_only = "logits_to_keep" in inspect.signature(lm.model.forward).parameters
    out = lm.model(
        input_ids=torch.tensor([context_ids], device=lm.device),
        use_cache=True,
        **({"logits_to_keep": 1} if last_only else {}),
    )
    cache, logits = out.past_key_values, out.logits[:, -1].expand(len(keys), -1)
    cache.reorder_cache(torch.zeros(len(keys), dtype=torch.long, device=lm.device))  # repeats it
    ends, written, going_on = end_ids(lm), [[] for _ in keys], set(range(len(keys)))
    for place in range(max_new_tokens):
        drawn = _draw(logits, temperatures, keys, place)
        for row in list(going_on):
            written[row].append(drawn[row])
            if drawn[row] in ends:
                going_on.remove(row)
        if not going_on or place == max_new_tokens - 1:
            break
        step = torch.tensor(drawn, device=lm.device)[:, None]
        out = lm.model(input_ids=step, past_key_values=cache, use_cache=True)
        logits = out.logits[:, -1]
    return [tuple(ids) for ids in written]


def _draw(
    logits: Float[Tensor, "rows vocabulary"],
    temperatures: list[float],
    keys: list[int],
    place: int,
) -> list[int]:
    """A token for each row: where the cumulative distribution passes a uniform random number."""
    if not torch.isfinite(logits).all():
        raise TrainingError(
            f"the logits are not finite in {logits.dtype}: load the model with "
            "dtype=torch.bfloat16 or torch.float32"
        )
    if logits.device.type == "mps":  # which has no float64
        logits = logits.cpu()
    heat = torch.tensor(temperatures, dtype=torch.float64, device=logits.device)[:, None]
    logits = logits.double()
    # Less the maximum first: a low temperature then underflows instead of overflowing.
    chances = ((logits - logits.amax(1, keepdim=True)) / heat.where(heat > 0, 1)).softmax(1)
    passed = chances.cumsum(1)
    bits = random_bits(torch.tensor(keys, device=logits.device), place, 1)
    uniform = ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53
    found = torch.searchsorted(passed, uniform * passed[:, -1:], right=True)
    found = found.clamp(max=logits.shape[1] - 1)
    return torch.where(heat > 0, found, logits.argmax(1, keepdim=True))[:, 0].tolist()


def _accepts(judge: Callable[[Attempt], bool], attempt: Attempt) -> bool:
    verdict = judge(attempt)
    if not isinstance(verdict, (bool, np.bool_)):
        raise TrainingError(
            f"the judge said {verdict!r} of {attempt.text[:40]!r}: it must say True or False; "
            "compare a score with a threshold"
        )
    return bool(verdict)
