"""Capture and extraction against a bare forward and against steering-vectors, in one run.

    python -m tests.benchmarks.bench_capture --model demo

All that is compared runs in turn within each round, every second round backwards, so that whatever
else the machine does hits all alike; a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

import amygdala_lib as amy
from amygdala_lib.artefacts import provenance, repository_root, write_json
from amygdala_lib.models import check_layers

try:
    from steering_vectors import train_steering_vector
except ImportError:
    raise SystemExit(
        "this compares with steering-vectors, which is not installed: "
        "python -m pip install --no-deps -r requirements-nodeps.txt"
    ) from None

SEED = 0
BATCH_SIZES = (1, 8, 16, 32, 64)
LONGEST = 600  # seconds; should all negatives of all concepts take longer, only
FEW = 5  # concepts are run, and scaled up by the number of pairs

BARE = "bare forward, up to the last captured layer"
WHOLE = "bare forward, whole model"
LAST = "capture, pool last"
MEAN = "capture, pool mean"
CACHED = "capture, pool last, from the cache"
OURS = "capture and extract"

Pairs = list[tuple[str, str]]
Seconds = dict[str, list[float]]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="demo, a folder or a Hugging Face id")
    parser.add_argument("--corpus", type=Path, default=repository_root() / "corpus")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count (default 5)")
    parser.add_argument("--concepts", type=int, help="only the first so many, for a quick try")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args(arguments)
    if options.repeats < 1 or (options.concepts is not None and options.concepts < 1):
        parser.error("--repeats and --concepts start at 1")

    corpus = amy.load_corpus(options.corpus)
    corpus = with_concepts(corpus, corpus.concepts[: options.concepts])
    lm = amy.load_model(options.model)
    setting = provenance(
        steering_vectors=version("steering-vectors"),
        model=str(lm),
        weight_hash=lm.revision,
        corpus=corpus.summary(),
        layers=check_layers(None, len(lm.layers)),
        concepts=len(corpus.concepts),
        repeats=options.repeats,
        seed=SEED,
        threads=torch.get_num_threads(),
        load_average_before=os.getloadavg()[0],
    )
    for name in ("model", "corpus", "layers", "threads", "load_average_before"):
        print(f"{name.replace('_', ' ')}: {setting[name]}")
    with tempfile.TemporaryDirectory() as cache:
        figures = measure(lm, corpus, setting["layers"], options.repeats, Path(cache))
    print(table(figures))
    if options.json:
        write_json(options.json, {**setting, **figures})


def measure(
    lm: amy.LanguageModel, corpus: amy.Corpus, layers: list[int], repeats: int, cache: Path
) -> dict[str, Any]:
    """All figures, in seconds and ratios."""

    def read(pool: str = "last", cache: Path | None = None) -> amy.Activations:
        return amy.capture(lm, corpus, layers, pool=pool, cache=cache, progress=False)

    with recorded_inputs(lm) as batches:
        read()
    read(cache=cache)  # not above: a model with hooks on it is not cached

    def theirs(pairs: Pairs, batch_size: int) -> dict[int, Tensor]:
        return train(lm, pairs, layers, batch_size)

    def forward_bare(model: torch.nn.Module) -> None:
        with torch.inference_mode():
            for batch in batches:
                model(**batch)

    def forward_truncated() -> None:
        with truncated(lm, layers[-1] + 1):  # base_model: its final norm, but no logits
            forward_bare(lm.model.base_model)

    sampled = {c: sampled_pairs(corpus, c) for c in corpus.concepts}
    every = {c: every_pair(corpus, c) for c in corpus.concepts}
    first = corpus.concepts[0]
    on_sampled = {size: f"steering-vectors, sampled, batch {size}" for size in BATCH_SIZES}
    on_every = {
        size: f"steering-vectors, all negatives of {first}, batch {size}" for size in BATCH_SIZES
    }
    cosines = lowest_cosines(lm, corpus, layers, sampled, cache)

    cases: dict[str, Callable[[], object]] = {
        BARE: forward_truncated,
        LAST: read,
        MEAN: lambda: read("mean"),
        WHOLE: lambda: forward_bare(lm.model),
        OURS: lambda: amy.extract(read(), corpus),
        CACHED: lambda: read(cache=cache),
    }
    for size in BATCH_SIZES:
        cases[on_sampled[size]] = lambda size=size: [theirs(p, size) for p in sampled.values()]
        cases[on_every[size]] = lambda size=size: theirs(every[first], size)
    interleaved(cases, 1, "warm-up")
    seconds = interleaved(cases, repeats, "rounds")

    best = min(BATCH_SIZES, key=lambda size: median(seconds[on_sampled[size]]))
    best_on_every = min(BATCH_SIZES, key=lambda size: median(seconds[on_every[size]]))
    n_pairs = {c: len(pairs) for c, pairs in every.items()}
    total = sum(n_pairs.values())
    expected = median(seconds[on_every[best_on_every]]) * total / n_pairs[first]
    run = corpus.concepts if expected <= LONGEST else corpus.concepts[:FEW]
    name = f"steering-vectors, all negatives, batch {best_on_every}"
    if len(run) < len(corpus.concepts):
        name += f" ({len(run)} of {len(corpus.concepts)} concepts, scaled up)"
    # Minutes long, so each concept is a round: its time as a share of all pairs.
    long: Seconds = {OURS: [], name: []}
    for concept in tqdm(run, desc=f"{total} pairs with all negatives", unit="concept"):
        long[OURS].append(timed(cases[OURS]))
        taken = timed(lambda pairs=every[concept]: theirs(pairs, best_on_every))
        long[name].append(taken * total / n_pairs[concept])

    return {
        "seconds": {**seconds, name: long[name]},
        "comparisons": [
            compare(seconds, LAST, BARE, at_most=1.10),
            compare(seconds, MEAN, BARE, at_most=1.10),
            compare(seconds, LAST, WHOLE),
            compare(seconds, MEAN, WHOLE),
            compare(seconds, on_sampled[best], OURS, at_least=2),
            compare(long, name, OURS, at_least=20),
            compare(seconds, CACHED, LAST),
        ],
        "cosines": cosines,
    }


def with_concepts(corpus: amy.Corpus, concepts: list[str]) -> amy.Corpus:
    """The corpus with some of its concepts, and the texts that have none."""
    known = {None, *concepts}
    entries = [entry for entry in corpus.entries if entry.concept in known]
    return replace(corpus, concepts=concepts, entries=entries)


def sampled_pairs(corpus: amy.Corpus, concept: str) -> Pairs:
    """Each positive with a negative of its own, drawn without replacement."""
    positives, negatives = corpus.positives(concept), list(corpus.negatives(concept))
    drawn = random.Random(f"{SEED} {concept}").sample(negatives, len(positives))
    return [(corpus.texts[p], corpus.texts[n]) for p, n in zip(positives, drawn, strict=True)]


def every_pair(corpus: amy.Corpus, concept: str) -> Pairs:
    """Each negative (each text that is not a positive) once, with the positives over and over."""
    pairs = zip(cycle(corpus.positives(concept)), corpus.negatives(concept), strict=False)
    return [(corpus.texts[p], corpus.texts[n]) for p, n in pairs]


def train(
    lm: amy.LanguageModel, pairs: Pairs, layers: list[int], batch_size: int
) -> dict[int, Tensor]:
    """What steering-vectors makes of the pairs, by layer.

    It is told where the layers are: on models whose layers differ it guesses, and may find none
    without saying so. Raises AmygdalaError should any wanted layer be missing.
    """
    vector = train_steering_vector(
        lm.model,
        lm.tokenizer,
        pairs,
        layers=layers,
        layer_config={"decoder_block": f"{layers_path(lm)}.{{num}}"},
        read_token_index=-1,  # the last token, as pool="last"
        batch_size=batch_size,
    )
    if sorted(vector.layer_activations) != layers:
        raise amy.AmygdalaError(
            f"steering-vectors returned layers {sorted(vector.layer_activations)} of {layers} for "
            f"{layers_path(lm)}: the comparison is void until layer_config in {__file__} fits"
        )
    return vector.layer_activations


def lowest_cosines(
    lm: amy.LanguageModel,
    corpus: amy.Corpus,
    layers: list[int],
    sampled: dict[str, Pairs],
    cache: Path,
) -> dict[str, dict[str, Any]]:
    """Per layer, the concept whose `pooled` is furthest from their `mean` of the same pairs."""
    cosines: dict[int, dict[str, float]] = {layer: {} for layer in layers}
    for concept, pairs in tqdm(sampled.items(), desc="cosines", unit="concept"):
        positives, negatives = ({pair[side] for pair in pairs} for side in (0, 1))
        same_texts = replace(
            corpus,
            concepts=[concept],
            entries=[e for e in corpus.entries if e.concept == concept and e.text in positives]
            + [replace(e, concept=None) for e in corpus.entries if e.text in negatives],
        )
        acts = amy.capture(lm, same_texts, layers, pool="last", cache=cache, progress=False)
        ours = amy.extract(acts, same_texts, method="pooled")
        theirs = train(lm, pairs, layers, batch_size=16)
        for layer in layers:
            cosines[layer][concept] = torch.cosine_similarity(
                ours.vectors[layer][0].double(), theirs[layer].cpu().double(), dim=0
            ).item()
    worst = {layer: min(of, key=of.__getitem__) for layer, of in cosines.items()}
    return {
        str(layer): {"lowest": cosines[layer][concept], "concept": concept, "goal": 0.9999}
        for layer, concept in worst.items()
    }


def layers_path(lm: amy.LanguageModel) -> str:
    return next(path for path, module in lm.model.named_modules() if module is lm.layers)


@contextmanager
def truncated(lm: amy.LanguageModel, depth: int) -> Iterator[None]:
    """Within the block, the model ends after its first `depth` layers."""
    owner, _, name = layers_path(lm).rpartition(".")
    setattr(lm.model.get_submodule(owner), name, lm.layers[:depth])
    try:
        yield
    finally:
        setattr(lm.model.get_submodule(owner), name, lm.layers)


@contextmanager
def recorded_inputs(lm: amy.LanguageModel) -> Iterator[list[dict[str, Any]]]:
    """What the model is called with within the block, call by call."""
    calls: list[dict[str, Any]] = []
    hook = lm.model.register_forward_pre_hook(
        lambda module, positional, named: calls.append(named), with_kwargs=True
    )
    try:
        yield calls
    finally:
        hook.remove()


def interleaved(cases: dict[str, Callable[[], object]], rounds: int, what: str) -> Seconds:
    """Seconds of each case in each round, all cases in turn, every second round backwards."""
    seconds: Seconds = {name: [] for name in cases}
    with tqdm(total=rounds * len(cases), desc=what, unit="run") as bar:
        for number in range(rounds):
            for name in list(cases)[:: -1 if number % 2 else 1]:
                seconds[name].append(timed(cases[name]))
                bar.update()
    return seconds


def timed(case: Callable[[], object]) -> float:
    finish_pending_work()
    start = time.perf_counter()
    case()
    finish_pending_work()
    return time.perf_counter() - start


def finish_pending_work() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def compare(
    seconds: Seconds,
    name: str,
    to: str,
    at_most: float | None = None,
    at_least: float | None = None,
) -> dict[str, Any]:
    """The ratio of two cases within each round: median, lowest, highest, and the goal if any."""
    ratios = [a / b for a, b in zip(seconds[name], seconds[to], strict=True)]
    found = {
        "case": name,
        "to": to,
        "ratio": median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }
    if at_most is not None:
        found |= {"goal": f"at most {at_most:.2f}", "met": found["ratio"] <= at_most}
    if at_least is not None:
        found |= {"goal": f"at least {at_least}", "met": found["ratio"] >= at_least}
    return found


def table(figures: dict[str, Any]) -> str:
    """Median seconds of every case, then the comparisons, then the cosines."""
    lines = [f"\n{'seconds':>10}  case"]
    lines += [f"{median(taken):>10.3f}  {name}" for name, taken in figures["seconds"].items()]
    lines.append(f"\n{'ratio':>10}  {'(range)':<18}{'goal':<22}comparison")
    for found in figures["comparisons"]:
        spread = f"({found['lowest']:.3g}-{found['highest']:.3g})"
        goal = f"{found['goal']}: {'met' if found['met'] else 'MISSED'}" if "goal" in found else ""
        cases = f"{found['case']} / {found['to']}"
        lines.append(f"{found['ratio']:>10.3f}  {spread:<18}{goal:<22}{cases}")
    lines.append(f"\n{'cosine':>10}  {'goal':<40}pooled and steering-vectors' mean, same pairs")
    for layer, found in figures["cosines"].items():
        verdict = "met" if found["lowest"] >= found["goal"] else "MISSED"
        goal = f"at least {found['goal']}: {verdict}"
        where = f"layer {layer}, lowest: {found['concept']}"
        lines.append(f"{found['lowest']:>10.7f}  {goal:<40}{where}")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main()
    except amy.AmygdalaError as error:
        sys.exit(f"{error}")
