"""Methods on planted directions, `subspace` against dense eigh, and the quality report at scale.

    python -m tests.benchmarks.bench_directions

Everything is made here, so no model of 27B is needed: activations of its width, and the weights of
its output projections. One round counts once; the dense eigendecomposition, which takes a minute a
concept, is run for a few concepts in turn with ours.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

import amygdala_lib as amy
from amygdala_lib.artefacts import provenance, write_json
from amygdala_lib.components import SITES, find_output
from amygdala_lib.corpus import Corpus, Text
from amygdala_lib.directions import extract, methods, subspace
from amygdala_lib.directions.subspace import RECORDED
from amygdala_lib.models import find_layers
from tests.planted import Planted, activations, labelled, made_of, plant

GIGABYTE = 1e9


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=5120, help="residual width (5120)")
    parser.add_argument("--concepts", type=int, default=95, help="of the planted and subspace runs")
    parser.add_argument("--reported", type=int, default=260, help="concepts of the quality report")
    parser.add_argument("--dense", type=int, default=3, help="concepts done by dense eigh, too")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count (3)")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args(arguments)
    if min(options.hidden, options.concepts, options.dense, options.repeats) < 1:
        parser.error("numbers start at 1")
    setting = provenance(
        **{name: value for name, value in vars(options).items() if name != "json"},
        threads=torch.get_num_threads(),
        load_average_before=os.getloadavg()[0],
    )
    print(f"threads {setting['threads']}, load before {setting['load_average_before']:.2f}")
    figures = {
        "planted": recovered(options.concepts),
        "eigenvalues": against_eigh(),
        "subspace": subspace_speed(
            options.hidden, options.concepts, options.dense, options.repeats
        ),
        "quality": quality_speed(options.hidden, options.reported, options.repeats),
    }
    if options.json:
        write_json(options.json, {**setting, **figures})


def recovered(concepts: int) -> dict[str, Any]:
    """Cosine of what each method finds with what was planted, 20 texts a concept."""
    planted = plant(concepts=concepts, hidden=512)
    truth = planted.directions - planted.directions.mean(0)
    found = {}
    print("\ncosine with the planted direction (median, lowest), nuisance five times stronger")
    for name, options in [(name, {}) for name in sorted(methods)] + [
        ("centred", {"variance": 0.99})
    ]:
        label = name + "".join(f", {key}={value}" for key, value in options.items())
        cosines = torch.cosine_similarity(run(planted, name, options), truth)
        found[label] = {"median": float(cosines.median()), "lowest": float(cosines.min())}
        print(f"  {label:<24}{found[label]['median']:>7.3f}{found[label]['lowest']:>8.3f}")
    return found


def run(planted: Planted, name: str, options: dict[str, Any]) -> Tensor:
    held = planted.tokens if methods[name].reads_tokens else planted.texts
    if name == "centred":
        neutral = [f"neutral {i}" for i in range(len(planted.neutral))]
        options = options | {"neutral": activations(neutral, planted.neutral)}
    return extract(activations(planted.corpus, held), planted.corpus, name, **options).vectors[2]


def against_eigh() -> dict[str, Any]:
    """`subspace` eigenvalues against dense eigh in float64, on real activations 512 wide."""
    lm = amy.load_model("demo")
    corpus = amy.load_corpus("affect_world").select(["story"])
    few = corpus.only(
        [corpus.texts[row] for c in corpus.concepts for row in corpus.positives(c)[:6]]
    )
    read = amy.capture(lm, few, [2, 5], pool="tokens", progress=False)
    # The demo model is 256 wide: two of its layers side by side.
    tokens = [torch.cat(pair, 1) for pair in zip(read[2], read[5], strict=True)]
    ours = subspace(tokens, few).eigenvalues.double()
    worst = 0.0
    for row, concept in enumerate(few.concepts):
        exact = torch.linalg.eigvalsh(difference(tokens, few, concept).double()).flip(0)[:RECORDED]
        worst = max(worst, float(((ours[row] - exact) / exact).abs().max()))
    print(f"\nsubspace eigenvalues against dense eigh, H=512: largest relative error {worst:.1e}")
    return {"largest_relative_error": worst, "goal": 1e-4}


def difference(tokens: list[Tensor], corpus: Corpus, concept: str) -> Tensor:
    """M_pos - M_base, written out."""
    hidden = tokens[0].shape[1]
    sums = {True: torch.zeros(hidden, hidden), False: torch.zeros(hidden, hidden)}
    positives = set(corpus.positives(concept).tolist())
    for row, held in enumerate(tokens):
        rows = torch.linalg.svd(held, full_matrices=False)[2]
        sums[row in positives].addmm_(rows.T, rows)
    n = len(positives)
    return sums[True] / n - sums[False] / (len(tokens) - n)


def subspace_speed(hidden: int, concepts: int, dense: int, repeats: int) -> dict[str, Any]:
    """All concepts by block Krylov, and a few by dense eigh, in the same rounds."""
    generator = torch.Generator().manual_seed(0)
    n_texts, positives = 112, 8
    scale = torch.logspace(1, -1, hidden)
    shared = torch.randn(hidden, generator=generator) * scale
    tokens = [
        torch.randn(int(n), hidden, generator=generator) * scale + shared
        for n in torch.randint(100, 141, (n_texts,), generator=generator)
    ]
    entries = []
    for concept in range(concepts):
        for row in torch.randperm(n_texts, generator=generator)[:positives].sort().values:
            entries.append(Text(f"text {row}", "story", f"c{concept:03d}", None, None, ""))
    entries.sort(key=lambda entry: int(entry.text.split()[1]))
    corpus = made_of(entries)
    tokens = [tokens[int(text.split()[1])] for text in corpus.texts]
    seconds: dict[str, list[float]] = {"ours": [], "dense eigh, one concept": []}
    peak = error = 0.0
    for repeat in range(repeats):
        taken, memory, found = measured(lambda: subspace(tokens, corpus))
        seconds["ours"].append(taken)
        peak = max(peak, memory)
        concept = corpus.concepts[repeat % dense]
        matrix = difference(tokens, corpus, concept)
        taken, _, exact = measured(lambda matrix=matrix: torch.linalg.eigh(matrix)[0])
        seconds["dense eigh, one concept"].append(taken)
        row = corpus.concepts.index(concept)
        off = (found.eigenvalues[row] - exact.flip(0)[:RECORDED]).abs().max() / exact[-1]
        error = max(error, float(off))
        print(f"  round {repeat + 1}: {seconds['ours'][-1]:.1f} s, eigh {taken:.1f} s, "
              f"eigenvalues differ by {off:.1e} of the largest")  # fmt: skip
    ratios = [
        b * concepts / a
        for a, b in zip(seconds["ours"], seconds["dense eigh, one concept"], strict=True)
    ]
    print(
        f"\nsubspace, {concepts} concepts, H={hidden}, {len(tokens)} texts: "
        f"{median(seconds['ours']):.1f} s in all, dense eigh of every concept takes "
        f"{median(ratios):.0f} times as long ({min(ratios):.0f}-{max(ratios):.0f}; goal 50); "
        f"peak {peak / GIGABYTE:.2f} GB above the activations (goal 2)"
    )
    return {"seconds": seconds, "ratios": ratios, "peak_bytes": peak, "eigenvalue_error": error}


def quality_speed(hidden: int, concepts: int, repeats: int) -> dict[str, Any]:
    """The whole report for four layers of a Qwen3.5-27B: texts, geometry, heads and neurons."""
    lm = only_outputs(hidden)
    corpus = labelled([f"concept {i % concepts:03d}" for i in range(8 * concepts)])
    layers = [0, 1, 2, 3]
    generator = torch.Generator().manual_seed(0)

    def made(site: str) -> amy.Activations:
        widths = {n: hidden for n in layers}
        if site != "residual":
            widths = {n: find_output(lm, n, site).module.weight.shape[1] for n in layers}
        held = {n: torch.randn(len(corpus.texts), widths[n], generator=generator) for n in layers}
        return activations(corpus, held[0], layers=layers, _by_layer=held, site=site,
                           residual_norms=dict.fromkeys(layers, 1.0))  # fmt: skip

    acts, heads, neurons = (made(site) for site in SITES)
    dirs = extract(acts, corpus)
    seconds = []
    for _ in range(repeats):
        taken, _, report = measured(
            lambda: amy.quality_report(
                lm, acts, corpus, dirs, heads=heads, neurons=neurons, progress=False
            )
        )
        seconds.append(taken)
    print(
        f"\nquality report, {concepts} concepts x {len(layers)} layers, H={hidden}: "
        f"{median(seconds):.1f} s ({min(seconds):.1f}-{max(seconds):.1f}; goal 120)"
    )
    assert len(report.to_frame()) == concepts * len(layers)
    return {"seconds": seconds}


def only_outputs(hidden: int) -> Qwen3_5ForCausalLM:
    """Four layers of Qwen3.5-27B's shape, of which only the output projections hold numbers."""
    heads = max(1, hidden // 128)
    config = Qwen3_5TextConfig(
        hidden_size=hidden, intermediate_size=int(3.4 * hidden), num_hidden_layers=4,
        num_attention_heads=max(1, hidden // 213), num_key_value_heads=1, head_dim=256,
        linear_num_value_heads=heads, linear_num_key_heads=heads, vocab_size=64,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen3_5ForCausalLM(config)
    for layer in range(len(find_layers(model))):
        for site in SITES[1:]:
            module = find_output(model, layer, site).module
            module.weight = nn.Parameter(torch.randn(module.weight.shape), requires_grad=False)
    return model


def measured(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds, the most memory in use above what was before (bytes), and the result."""
    process, done, peak = psutil.Process(), threading.Event(), [0]
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        result = work()
    finally:
        taken = time.perf_counter() - start
        done.set()
        watcher.join()
    return taken, max(0, peak[0] - before), result


if __name__ == "__main__":
    try:
        main()
    except amy.AmygdalaError as error:
        sys.exit(f"{error}")
