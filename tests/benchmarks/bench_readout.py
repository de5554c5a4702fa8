"""Decoding with and without a live readout: what does it cost to look?

    python -m tests.benchmarks.bench_readout

On the bundled model, and on a random one of the width of a small language model. Both ways run in
turn within each round, every second round the other way about; a ratio is the median of the rounds'
ratios.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

import amygdala_lib as amy
from amygdala_lib.artefacts import provenance, write_json
from amygdala_lib.models import LanguageModel, default_layers, find_layers

GOAL = 1.02
SEED = 0


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concepts", type=int, default=200, help="of the readout (200)")
    parser.add_argument("--tokens", type=int, default=64, help="decoded at a time (64)")
    parser.add_argument("--repeats", type=int, default=15, help="rounds that count (15)")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the random model (1024)")
    parser.add_argument("--depth", type=int, default=12, help="its number of layers (12)")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args(arguments)
    if min(options.concepts, options.tokens, options.repeats, options.hidden, options.depth) < 1:
        parser.error("numbers start at 1")
    demo = amy.load_model("demo")
    setting = provenance(
        **{name: value for name, value in vars(options).items() if name != "json"},
        threads=torch.get_num_threads(),
        load_average_before=os.getloadavg()[0],
        seed=SEED,
    )
    print(f"threads {setting['threads']}, load before {setting['load_average_before']:.2f}")
    figures = {}
    for lm in (demo, random_model(demo, options.hidden, options.depth)):
        figures[lm.name] = found = measure(lm, options.concepts, options.tokens, options.repeats)
        print(
            f"{lm.name}, layers {found['layers']}, {options.concepts} concepts: "
            f"{found['tokens_per_second_without']:.1f} tokens/s without, "
            f"{found['tokens_per_second_with']:.1f} with; time {found['ratio']:.4f} of without "
            f"({min(found['ratios']):.3f} to {max(found['ratios']):.3f}; goal: at most {GOAL})"
        )
    if options.json:
        write_json(options.json, {**setting, "goal": GOAL, "figures": figures})


def measure(lm: LanguageModel, concepts: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds of each way in each round after one that does not count, and their ratios."""
    layers = default_layers(len(lm.layers))
    readout = random_readout(lm, layers, concepts)
    ids = torch.randint(1, 1000, (1, 16), generator=torch.Generator().manual_seed(SEED))
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    bar = tqdm(range(repeats + 1), desc=lm.name, unit="round", disable=not sys.stderr.isatty())
    for number in bar:
        order = ["without", "with"] if number % 2 else ["with", "without"]
        for way in order:
            looking = readout.attach(lm) if way == "with" else nullcontext()
            with looking as live:
                taken = decode(lm, ids.to(lm.device), tokens)
            if live is not None and len(live.frame()) != tokens * concepts * len(layers):
                raise SystemExit("the readout did not record every token")
            if number:
                seconds[way].append(taken)
    pairs = zip(seconds["with"], seconds["without"], strict=True)
    ratios = [looked / plain for looked, plain in pairs]
    return {
        "model": str(lm),
        "layers": layers,
        "seconds": seconds,
        "tokens_per_second_without": tokens / median(seconds["without"]),
        "tokens_per_second_with": tokens / median(seconds["with"]),
        "ratios": ratios,
        "ratio": median(ratios),
    }


def decode(lm: LanguageModel, ids: torch.Tensor, tokens: int) -> float:
    """Seconds for so many tokens, one at a time."""
    with synchronised(lm) as clock:
        lm.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=tokens,
            eos_token_id=None,
        )
    return clock["seconds"]


@contextmanager
def synchronised(lm: LanguageModel) -> Iterator[dict[str, float]]:
    clock: dict[str, float] = {}

    def now() -> float:
        if lm.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    yield clock
    clock["seconds"] = now() - start


def random_model(demo: LanguageModel, hidden: int, depth: int) -> LanguageModel:
    """A dense model of this width with the bundled model's tokenizer: what it writes is noise."""
    config = Qwen3Config(
        hidden_size=hidden,
        num_hidden_layers=depth,
        intermediate_size=3 * hidden,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 128),
        head_dim=64,
        vocab_size=32000,
    )
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = Qwen3ForCausalLM(config).to(demo.device, demo.dtype).eval().requires_grad_(False)
    name = f"random, hidden {hidden}"
    return replace(demo, model=model, layers=find_layers(model), name=name, revision="random")


def random_readout(lm: LanguageModel, layers: list[int], concepts: int) -> amy.Readout:
    generator = torch.Generator().manual_seed(SEED)
    shape = (concepts, lm.hidden_size)
    vectors = {n: torch.randn(shape, generator=generator) / lm.hidden_size**0.5 for n in layers}
    return amy.Readout(
        amy.Directions(
            concepts=[f"concept_{number}" for number in range(concepts)],
            vectors=vectors,
            residual_norms=dict.fromkeys(layers, 1.0),
            means={n: torch.zeros(concepts) for n in layers},
            stds={n: torch.ones(concepts) for n in layers},
        )
    )


if __name__ == "__main__":
    main()
