"""Every method, layer and fold at the size of a 27B model: how long, and in how much memory.

    python -m tests.benchmarks.bench_evaluate

Activations are made here, with a direction of its own planted for each concept. Methods that read
one vector a text are evaluated together. `subspace`, which reads every token, is evaluated for
`--subspace` concepts, each with as many texts, and its time is given apart: it grows with the
number of concepts.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

import amygdala_lib as amy
from amygdala_lib.artefacts import provenance, write_json
from amygdala_lib.corpus import Corpus, Text
from amygdala_lib.directions import methods
from tests.benchmarks.bench_directions import GIGABYTE, measured
from tests.planted import activations, made_of

GOAL = 600
"""Seconds, for all nine methods."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=5120, help="residual width (5120)")
    parser.add_argument("--concepts", type=int, default=260)
    parser.add_argument("--texts", type=int, default=8, help="of each concept (8)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=60, help="of a text, for subspace (60)")
    parser.add_argument("--subspace", type=int, default=0, help="concepts for subspace (0: none)")
    parser.add_argument("--methods", help="by name, with commas (all that read one vector a text)")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args(arguments)
    setting = provenance(
        **{name: value for name, value in vars(options).items() if name != "json"},
        threads=torch.get_num_threads(),
        load_average_before=os.getloadavg()[0],
    )
    print(f"threads {setting['threads']}, load before {setting['load_average_before']:.2f}")
    pooled = [name for name, method in methods.items() if not method.reads_tokens]
    names = options.methods.split(",") if options.methods else pooled
    figures = {"together": timed(names, options.concepts, 1, options)}
    if options.subspace:
        figures["subspace"] = timed(["subspace"], options.subspace, options.tokens, options)
    if options.json:
        write_json(options.json, {**setting, **figures})


def timed(names: list[str], concepts: int, tokens: int, options: argparse.Namespace) -> dict:
    """Seconds and peak memory of `evaluate` by k-fold alone, without extracting anew for nulls."""
    corpus, acts, neutral = planted(concepts, tokens, options)
    given = {"neutral": neutral} if "centred" in names else {}
    seconds, peak, found = measured(
        lambda: amy.evaluate(
            acts, corpus, names, splits="text", folds=options.folds, repeats=0, **given
        )
    )
    medians = found.summary.groupby("method")["median_auroc"].max()
    assert len(found.concepts) == len(names) * options.layers * concepts
    label = names[0] if len(names) == 1 else f"{len(names)} methods"
    goal = f" (goal {GOAL} with subspace)" if concepts == 260 and len(names) > 1 else ""
    print(
        f"{label}: {concepts} concepts x {options.layers} layers x {options.folds} folds, "
        f"H={options.hidden}: {seconds:.0f} s{goal}, {peak / GIGABYTE:.2f} GB above the "
        f"activations; median AUROC {medians.min():.2f} to {medians.max():.2f}",
        flush=True,
    )
    return {"methods": names, "concepts": concepts, "seconds": seconds, "peak_bytes": peak}


def planted(
    concepts: int, tokens: int, options: argparse.Namespace
) -> tuple[Corpus, amy.Activations, amy.Activations]:
    """A corpus, activations of its texts (of their tokens, if more than one), and neutral ones."""
    generator = torch.Generator().manual_seed(0)
    corpus = made_of(
        [
            Text(f"text {n}", "paired", f"concept {n % concepts:03d}", f"scene {n // 5}", 0, "here")
            for n in range(options.texts * concepts)
        ]
    )
    layers = list(range(options.layers))
    scale = torch.logspace(0.5, -0.5, options.hidden)  # few axes hold most, as in a real stream

    def noise(rows: int) -> Tensor:
        return torch.randn(rows, options.hidden, generator=generator) * scale

    def texts_at_a_layer() -> Tensor | list[Tensor]:
        own = 0.2 * noise(concepts)
        means = noise(len(corpus.texts)) + own.repeat(options.texts, 1)
        return means if tokens == 1 else [noise(tokens) + mean for mean in means]

    held = {layer: texts_at_a_layer() for layer in layers}
    norms = dict.fromkeys(layers, 1.0)
    acts = activations(corpus, held[0], layers=layers, _by_layer=held, residual_norms=norms)
    plain = {layer: noise(60) for layer in layers}
    neutral = activations(
        [f"neutral {n}" for n in range(60)], plain[0], layers=layers, _by_layer=plain,
        residual_norms=norms,
    )  # fmt: skip
    return corpus, acts, neutral


if __name__ == "__main__":
    try:
        main()
    except amy.AmygdalaError as error:
        sys.exit(f"{error}")
