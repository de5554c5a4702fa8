"""Replay: a share of every batch from general text, so that old skills are not forgotten."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import count, islice, pairwise

from ..errors import TrainingError
from ..models import LanguageModel
from .examples import Example, check_examples, text_beginning, token_ids


def mixed_batches(
    examples: Sequence[Example],
    replay: Sequence[Example] = (),
    *,
    batch_size: int,
    share: float = 0.25,
    epochs: int = 1,
    seed: int = 0,
) -> list[list[Example]]:
    """Batches of which `share` is replay: every example once an epoch, replay as often as it takes.

    Both are shuffled anew at each pass, by `seed` alone. A share that does not divide the batch is
    carried over: 0.25 of batches of 6 are 1, 2, 1, 2 replayed examples, and after n examples in all
    there were exactly floor(share * n). Only the last batch may be smaller. A run is taken up again
    by leaving out the batches it has had.

    Raises TrainingError, naming everything that is wrong, if there are no examples, no replay for a
    share above 0, or sizes that make no batches.
    """
    problems = []
    if not examples:
        problems.append("no examples to train on")
    if not 0 <= share <= 0.99:
        problems.append(f"share is {share}: replay is 0 to 0.99 of a batch")
    elif share and not replay:
        problems.append(f"no replay for a share of {share}: give general examples, or share=0")
    for name, number in {"batch_size": batch_size, "epochs": epochs}.items():
        if type(number) is not int or number < 1:
            problems.append(f"{name} is {number!r}: give a whole number from 1 on")
    if problems:
        raise TrainingError("\n".join(problems))
    # 1/3 as a float is a little less than a third, and the third of three would not be replayed.
    part = Fraction(share).limit_denominator(10**6)
    general = _shuffled(replay, f"{seed} replay")
    mixed: list[Example] = []
    for example in islice(_shuffled(examples, f"{seed} examples"), epochs * len(examples)):
        mixed.append(example)
        while math.floor((len(mixed) + 1) * part) > math.floor(len(mixed) * part):
            mixed.append(next(general))
    return [mixed[start : start + batch_size] for start in range(0, len(mixed), batch_size)]


def replay_examples(
    lm: LanguageModel,
    texts: Sequence[str],
    *,
    context_share: float = 0.25,
    max_tokens: int = 512,
) -> list[Example]:
    """Examples from plain texts: the first `context_share` of the tokens, then the rest.

    Longer texts are cut into pieces of `max_tokens`, each an example. The cut between context and
    continuation is between tokens of the whole text, and leaves at least one on both sides.

    Raises TrainingError naming every text of fewer than two tokens, and settings out of range.
    """
    problems = []
    if not 0 < context_share < 1:
        problems.append(f"context_share is {context_share}: give a share between 0 and 1")
    if max_tokens < 4:
        problems.append(f"max_tokens is {max_tokens}: give 4 or more, for a context and the rest")
    if isinstance(texts, str):
        problems.append("texts is one string: give a list, [text]")
        texts = []
    beginning, examples = text_beginning(lm), []
    for number, text in enumerate(texts):
        ids = token_ids(lm, text)
        if len(ids) < 2:
            problems.append(f"text {number} ({text[:40]!r}) has fewer than two tokens: remove it")
        if not problems:
            for piece in _pieces(ids, max_tokens):
                cut = min(max(1, round(len(piece) * context_share)), len(piece) - 1)
                examples.append(
                    Example((*beginning, *piece[:cut]), tuple(piece[cut:]), source="replay")
                )
    if problems:
        raise TrainingError("\n".join(problems))
    check_examples(lm, examples)
    return examples


def _shuffled(examples: Sequence[Example], seed: str) -> Iterator[Example]:
    """The examples over and over, in another order each time."""
    for number in count():
        order = list(examples)
        # Seeded with text, Random hashes it, the same on every machine.
        random.Random(f"{seed} {number}").shuffle(order)
        yield from order


def _pieces(ids: list[int], longest: int) -> Iterator[list[int]]:
    """As few pieces as `longest` allows, of nearly equal length, so that none is a single token."""
    number = math.ceil(len(ids) / longest)
    edges = [round(place * len(ids) / number) for place in range(number + 1)]
    for start, end in pairwise(edges):
        yield ids[start:end]
