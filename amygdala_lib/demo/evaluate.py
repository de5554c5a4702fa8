"""What the bundled model can do, scored exactly by the grammar it was taught.

Reading: can a story's state be told from the residual stream? Carrying: does the model, left to
write on, stay in the state of a single cue? Steering: does pushing it toward a state make it write
that state's cues? All on frames, phrases, places and names that training never showed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from ..capture import Pool, capture
from ..corpus import Corpus
from ..directions import Directions, extract
from ..evaluate import separation
from ..models import LanguageModel
from ..steering import steer
from .affect_world import AffectWorld, Sentence, Split

NEW_TOKENS = 64
BATCH = 64


def reading(
    lm: LanguageModel, corpus: Corpus, *, pool: Pool, layers: Sequence[int]
) -> pd.DataFrame:
    """AUROC of each state's direction on the held-out stories: one row per layer and state."""
    dirs = extract(capture(lm, corpus, layers, pool=pool, progress=False), corpus)
    heldout = capture(lm, [text.text for text in corpus.heldout], layers, pool=pool, progress=False)
    truth = dict(
        zip(
            (text.text for text in corpus.heldout), (t.concept for t in corpus.heldout), strict=True
        )
    )
    aurocs = separation(dirs, heldout, [truth[text] for text in heldout.texts])
    rows = aurocs.rename_axis("state").melt(
        ignore_index=False, var_name="layer", value_name="auroc"
    )
    return rows.reset_index().assign(pool=pool)


def carry(
    lm: LanguageModel, world: AffectWorld, cue_split: Split, *, per_state: int = 16, seed: int = 2
) -> pd.Series:
    """Share of the cues written after an opening, a cue and a neutral sentence that fit the cue.

    Indexed by state. With `cue_split="train"` the cue is one that training may have shown.
    """
    rng, prompts = random.Random(seed), []
    for _ in world.states * per_state:
        state = world.states[len(prompts) % len(world.states)]
        narrator = world.narrator(rng)
        place = rng.choice(list(world.grammar["places"]["train"]))
        told = [
            world.opening(rng, narrator, place),
            world.cue(rng, state, narrator, cue_split),
            world.neutral(rng, narrator, place),
        ]
        prompts.append((state, " ".join(sentence.text for sentence in told)))
    written = write(lm, [prompt for _, prompt in prompts], seed=seed)
    fitting: dict[str, list[bool]] = {state: [] for state in world.states}
    for (state, _), text in zip(prompts, written, strict=True):
        fitting[state] += [cue.state == state for cue in _cues(world.read(text))]
    return pd.Series(
        {state: np.mean(hits) if hits else math.nan for state, hits in fitting.items()}
    )


def _cues(sentences: list[Sentence | None]) -> list[Sentence]:
    """The cues of a text up to its first turn, after which another state is right."""
    cues = []
    for sentence in sentences:
        if sentence and sentence.role == "turn":
            break
        if sentence and sentence.role == "cue":
            cues.append(sentence)
    return cues


@dataclass(frozen=True)
class SteeringPoint:
    """Where and how hard to push."""

    layer: int
    strength: float


def steering(
    lm: LanguageModel,
    dirs: Directions,
    world: AffectWorld,
    split: Split,
    point: SteeringPoint | dict[str, SteeringPoint],
    *,
    per_state: int = 16,
    seed: int = 3,
    states: Sequence[str] | None = None,
) -> pd.DataFrame:
    """What is written after openings of `split` under a push toward each state; indexed by state.

    target        share of the written cues that are the state's
    base          the same share without steering
    perplexity    perplexity ratio, steered to unsteered texts, both under the unsteered model
    ungrammatical share of finished sentences that the grammar cannot write
    repeated      share of finished sentences that stood in the same text before
    distinct      distinct sentences among all the state's texts, as a share
    """
    states = list(states or world.states)
    points = point if isinstance(point, dict) else {state: point for state in states}
    prompts = openings(world, split, per_state, seed)
    plain = write(lm, prompts, seed=seed)
    base_perplexity = perplexity(lm, prompts, plain)
    base_cues = [cue.state for text in plain for cue in _cues(world.read(text))]
    rows = []
    for state in states:
        at = points[state]
        with steer(lm, dirs, {state: at.strength}, layers=[at.layer]):
            texts = write(lm, prompts, seed=seed)
        rows.append(
            {
                "state": state,
                "layer": at.layer,
                "strength": at.strength,
                **_score(world, texts, state),
                "base": np.mean([cue == state for cue in base_cues]),
                "perplexity": perplexity(lm, prompts, texts) / base_perplexity,
            }
        )
    return pd.DataFrame(rows).set_index("state")


def random_directions(dirs: Directions, seed: int = 4) -> Directions:
    """The control: as many unit vectors of the same size that point anywhere."""
    generator = torch.Generator().manual_seed(seed)
    vectors = {}
    for layer in dirs.layers:
        drawn = torch.randn(dirs.vectors[layer].shape, generator=generator)
        vectors[layer] = drawn / drawn.norm(dim=1, keepdim=True)
    return replace(dirs, vectors=vectors)


def openings(world: AffectWorld, split: Split, number: int, seed: int) -> list[str]:
    """First sentences of stories, which tell no state."""
    rng = random.Random(seed)
    places = list(world.grammar["places"][split])
    return [
        world.opening(rng, world.narrator(rng, split), rng.choice(places)).text
        for _ in range(number)
    ]


def cue_share(world: AffectWorld, texts: list[str], state: str) -> list[float]:
    """The share of each text's cues that are the state's; NaN for a text without cues."""
    cues = [[cue.state == state for cue in _cues(world.read(text))] for text in texts]
    return [float(np.mean(found)) if found else math.nan for found in cues]


def _score(world: AffectWorld, texts: list[str], state: str) -> dict[str, float]:
    read = [world.read(text) for text in texts]
    finished = [sentence for sentences in read for sentence in sentences]
    cues = [sentence.state == state for sentences in read for sentence in _cues(sentences)]
    names = [[sentence.text for sentence in sentences if sentence] for sentences in read]
    known = [text for sentences in names for text in sentences]
    repeats = sum(len(sentences) - len(set(sentences)) for sentences in names)
    return {
        "target": float(np.mean(cues)) if cues else 0.0,
        "ungrammatical": float(np.mean([sentence is None for sentence in finished]))
        if finished
        else 1.0,
        "repeated": repeats / max(1, len(known)),
        "distinct": len(set(known)) / max(1, len(known)),
    }


@torch.inference_mode()
def write(
    lm: LanguageModel, prompts: list[str], *, seed: int, new_tokens: int = NEW_TOKENS
) -> list[str]:
    """Sampled continuations at temperature 1, the prompts left out."""
    written = []
    torch.manual_seed(seed)
    for start in range(0, len(prompts), BATCH):
        batch = lm.tokenizer(
            prompts[start : start + BATCH], return_tensors="pt", padding=True, padding_side="left"
        ).to(lm.device)
        out = lm.model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=lm.tokenizer.pad_token_id,
        )
        written += lm.tokenizer.batch_decode(
            out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
    return written


@torch.inference_mode()
def perplexity(lm: LanguageModel, prompts: list[str], texts: list[str]) -> float:
    """exp of the mean negative log-likelihood per token of `texts`, each after its prompt."""
    total, count = 0.0, 0
    for prompt, text in zip(prompts, texts, strict=True):
        before = len(lm.tokenizer(prompt)["input_ids"])
        ids = lm.tokenizer(prompt + text, return_tensors="pt")["input_ids"].to(lm.device)
        if ids.shape[1] <= before:
            continue
        logits = lm.model(input_ids=ids, use_cache=False).logits[0, before - 1 : -1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, before:], reduction="sum").item()
        count += ids.shape[1] - before
    return math.exp(total / max(1, count))


def self_report(
    lm: LanguageModel,
    dirs: Directions,
    world: AffectWorld,
    points: dict[str, SteeringPoint] | None,
    *,
    seed: int = 5,
) -> pd.Series:
    """Rank (1 is first) of each state's name after "Now I feel", under a push toward that state."""
    rng = random.Random(seed)
    narrator = world.narrator(rng, person="i")
    place = rng.choice(list(world.grammar["places"]["test"]))
    opening = world.opening(rng, narrator, place).text
    prompt = f"{opening} {world.neutral(rng, narrator, place, 'test').text} Now I feel"
    ranks = {}
    for state in world.states:
        push = (
            steer(lm, dirs, {state: points[state].strength}, layers=[points[state].layer])
            if points
            else nullcontext()
        )
        with push:
            likelihood = {name: -_nll(lm, prompt, f" {name}.") for name in world.states}
        ranks[state] = 1 + sum(value > likelihood[state] for value in likelihood.values())
    return pd.Series(ranks)


@torch.inference_mode()
def _nll(lm: LanguageModel, prompt: str, continuation: str) -> float:
    before = len(lm.tokenizer(prompt)["input_ids"])
    ids = lm.tokenizer(prompt + continuation, return_tensors="pt")["input_ids"].to(lm.device)
    logits = lm.model(input_ids=ids, use_cache=False).logits[0, before - 1 : -1].float()
    return torch.nn.functional.cross_entropy(logits, ids[0, before:], reduction="sum").item()
