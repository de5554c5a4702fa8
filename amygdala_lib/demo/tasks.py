"""Tasks for the bundled model: what it learns from, and an account of what it then writes."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from tqdm.auto import tqdm

from ..models import LanguageModel
from ..training.examples import Example, from_text
from ..training.frozen_context import token_log_probabilities
from ..training.on_policy import sample
from .affect_world import AffectWorld, Sentence, Split

_BATCH = 16


def story_examples(
    lm: LanguageModel,
    world: AffectWorld,
    states: Sequence[str],
    number: int,
    *,
    split: Split = "train",
    named: bool = False,
    seed: int = 0,
) -> list[Example]:
    """Stories in these states in turn: the opening, which tells none, is the context.

    What follows is the continuation. With `named`, its second sentence says the state ("Now I feel
    calm."), which stories never do.
    """
    rng, examples = random.Random(f"{seed} {split} {named} {' '.join(states)}"), []
    for place in range(number):
        state = states[place % len(states)]
        opening, *rest = world.story(rng, state, split, turns=0).sentences
        if named:
            said = rng.choice(world.grammar["anchors"]).replace("<state>", state)
            rest.insert(1, Sentence(said, "anchor", state))
        told = " " + " ".join(sentence.text for sentence in rest)
        examples.append(from_text(lm, opening.text, told, source=f"story {state}"))
    return examples


def begun(
    world: AffectWorld, state: str, number: int, *, split: Split = "test", seed: int = 0
) -> list[str]:
    """Stories that have begun in a state: an opening, a cue of the state, a neutral sentence.

    Names and places are of `split`; cues are of the training frames, which the model knows best.
    """
    rng, prompts = random.Random(f"{seed} {split} {state}"), []
    places = list(world.grammar["places"][split])
    for _ in range(number):
        narrator, place = world.narrator(rng, split), rng.choice(places)
        told = [
            world.opening(rng, narrator, place),
            world.cue(rng, state, narrator),
            world.neutral(rng, narrator, place, split),
        ]
        prompts.append(" ".join(sentence.text for sentence in told))
    return prompts


def told(world: AffectWorld, texts: Sequence[str], states: Collection[str]) -> pd.DataFrame:
    """What the grammar finds in each text, a row per text and shares of 0 to 1.

    share          of its cues up to its first turn, those of `states`; NaN without cues
    named          1 if a sentence says a state, else 0
    ungrammatical  of its finished sentences, those the grammar cannot write; NaN without any
    """
    rows = []
    for text in texts:
        sentences, cues = world.read(text), []
        for sentence in sentences:
            if sentence and sentence.role == "turn":
                break
            if sentence and sentence.role == "cue":
                cues.append(sentence.state in states)
        anchored = any(sentence and sentence.role == "anchor" for sentence in sentences)
        unknown = [sentence is None for sentence in sentences]
        rows.append(
            {
                "share": np.mean(cues) if cues else np.nan,
                "named": float(anchored),
                "ungrammatical": np.mean(unknown) if unknown else np.nan,
            }
        )
    return pd.DataFrame(rows, columns=["share", "named", "ungrammatical"], dtype=float)


def own_pairs(
    lm: LanguageModel,
    world: AffectWorld,
    openings: Sequence[str],
    states: Collection[str],
    *,
    samples: int = 12,
    each: int = 2,
    new_tokens: int = 24,
    seed: int = 0,
) -> tuple[list[Example], Float[np.ndarray, " attempts"]]:
    """What the model itself writes after openings, sorted by the grammar: chosen and rejected.

    Of `samples` attempts at temperature 1 after each opening, those whose cues are all of `states`
    are paired with those of which none is, up to `each` pairs an opening; all are `new_tokens` long
    or end before. Also the share of cues of every attempt (NaN without cues).
    """
    pairs, shares = [], []
    for opening in tqdm(openings, "own attempts", unit="opening", mininterval=5):
        ids = tuple(lm.tokenizer(opening)["input_ids"])
        attempts = sample(
            lm, ids, temperatures=[1.0], samples=samples, max_new_tokens=new_tokens, seed=seed
        )
        found = told(world, [attempt.text for attempt in attempts], states)["share"].to_numpy()
        chosen, rejected = (
            [a.continuation_ids for a, share in zip(attempts, found, strict=True) if share == wish]
            for wish in (1, 0)
        )
        both = zip(chosen[:each], rejected[:each], strict=False)
        pairs += [Example(ids, good, bad, source="own attempts") for good, bad in both]
        shares.append(found)
    return pairs, np.concatenate(shares)


@torch.inference_mode()
def log_likelihood(lm: LanguageModel, examples: Sequence[Example]) -> Float[np.ndarray, " n"]:
    """Mean log-probability of each continuation's tokens, in nats per token."""
    found = []
    for start in range(0, len(examples), _BATCH):
        part = examples[start : start + _BATCH]
        log_probs, mask = token_log_probabilities(
            lm, [e.context_ids for e in part], [e.continuation_ids for e in part]
        )
        found.append((log_probs.masked_fill(~mask, 0).sum(1) / mask.sum(1)).cpu().numpy())
    return np.concatenate(found).astype(float)
