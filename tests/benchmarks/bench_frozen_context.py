"""A context-frozen step against backpropagation through everything: time and peak memory.

    python -m tests.benchmarks.bench_frozen_context

Each measurement has a process of its own, because memory that was once used stays with a process.
Weights and gradients are there before the measured step begins, in all cases alike: what is
compared is the memory that the step takes beyond them. The cases run in turn, round by round.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from amygdala_lib.artefacts import provenance, repository_root, write_json
from amygdala_lib.training import frozen_context_loss

MEGABYTE = 2**20
VOCABULARY = 8192
FAMILIES = ("dense", "hybrid")
CASES = ("frozen", "whole", "context")
WARM_UP = (40, 8)  # tokens of context and continuation


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=4096, help="tokens of context (4096)")
    parser.add_argument("--continuation", type=int, default=64, help="and of continuation (64)")
    parser.add_argument("--hidden", type=int, default=512, help="residual width (512)")
    parser.add_argument("--layers", type=int, default=8, help="layers (8)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (3)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--measure", nargs=2, metavar=("FAMILY", "CASE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if min(options.context, options.continuation, options.layers, options.repeats) < 1:
        parser.error("numbers start at 1")
    if options.hidden % 128:
        parser.error("--hidden is a multiple of 128")
    if options.measure:
        print(json.dumps(measure(options, *options.measure)))
        return
    sizes = ("context", "continuation", "hidden", "layers", "repeats", "device")
    setting = provenance(
        **{name: getattr(options, name) for name in sizes},
        threads=torch.get_num_threads(),
        load_average_before=os.getloadavg()[0],
    )
    print(f"threads {setting['threads']}, load before {setting['load_average_before']:.2f}")
    figures = compare(options)
    print(table(figures))
    if options.json:
        write_json(options.json, {**setting, "families": figures})


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Medians over the rounds of each case, and the ratios the goals are about."""
    runs = [(family, case) for family in FAMILIES for case in CASES]
    found: dict[tuple[str, str], list[dict[str, float]]] = {run: [] for run in runs}
    todo = [run for _ in range(options.repeats) for run in runs]
    for family, case in tqdm(todo, unit="run", mininterval=0.1 if sys.stderr.isatty() else 10):
        found[family, case].append(in_a_process(options, family, case))
    figures = {}
    for family in FAMILIES:
        cases = {
            case: {
                name: median(run[name] for run in found[family, case])
                for name in ("seconds", "megabytes", "loss")
            }
            for case in CASES
        }
        frozen, whole, context = (cases[case] for case in CASES)
        if abs(frozen["loss"] - whole["loss"]) > 1e-4:
            raise SystemExit(f"{family}: losses differ, {frozen['loss']} and {whole['loss']}")
        figures[family] = {
            "cases": cases,
            "runs": {case: found[family, case] for case in CASES},
            "memory_ratio": frozen["megabytes"] / whole["megabytes"],
            "memory_goal": "at most 0.2",
            "time_ratio": frozen["seconds"] / whole["seconds"],
            "context_share_of_time": context["seconds"] / frozen["seconds"],
            "context_share_goal": "at least 0.5",
        }
    return figures


def in_a_process(options: argparse.Namespace, family: str, case: str) -> dict[str, float]:
    sizes = ("context", "continuation", "hidden", "layers", "device")
    passed = [text for name in sizes for text in (f"--{name}", str(getattr(options, name)))]
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name, *passed, "--measure", family, case],
        cwd=repository_root(),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{family}, {case}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace, family: str, case: str) -> dict[str, float]:
    """One step, with weights, gradients and kernels in place before it."""
    torch.manual_seed(0)
    longest = options.context + options.continuation + sum(WARM_UP)
    model = new_model(family, options.hidden, options.layers, longest).to(options.device)
    ids = torch.randint(1, VOCABULARY, (options.context + options.continuation,)).tolist()
    step = {"frozen": frozen, "whole": whole, "context": context_only}[case]
    frozen(model, ids[: WARM_UP[0]], ids[-WARM_UP[1] :])
    step(model, ids[: WARM_UP[0]], ids[-WARM_UP[1] :])
    model.zero_grad(set_to_none=False)
    peak = peak_memory(options.device)
    started = time.perf_counter()
    loss = step(model, ids[: options.context], ids[options.context :])
    return {
        "loss": loss.item(),
        "seconds": time.perf_counter() - started,
        "megabytes": peak() / MEGABYTE,
    }


def frozen(model: PreTrainedModel, context: list[int], continuation: list[int]) -> Tensor:
    loss = frozen_context_loss(model, context, continuation)
    loss.backward()
    return loss.detach()


def whole(model: PreTrainedModel, context: list[int], continuation: list[int]) -> Tensor:
    """The same loss, with gradient through all of it; logits of the continuation only."""
    ids = torch.tensor([[*context, *continuation]], device=model.device)
    keep = len(continuation) + 1
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[0, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits, ids[0, -len(continuation) :])
    loss.backward()
    return loss.detach()


@torch.no_grad()
def context_only(model: PreTrainedModel, context: list[int], continuation: list[int]) -> Tensor:
    """The forward that no step on this context can do without: of the next token, its loss."""
    ids = torch.tensor([context], device=model.device)
    logits = model(input_ids=ids, use_cache=True, logits_to_keep=1).logits[0, -1].float()
    return -logits.log_softmax(-1)[continuation[0]]


def peak_memory(device: str) -> Callable[[], float]:
    """Call what is returned to learn by how many bytes memory rose at most in between."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return lambda: torch.cuda.max_memory_allocated() - before
    before = psutil.Process().memory_info().rss
    # ru_maxrss is in kilobytes on Linux, in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before


def new_model(family: str, hidden: int, layers: int, longest: int) -> PreTrainedModel:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": 3 * hidden,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
        "head_dim": 64,
        "max_position_embeddings": longest,
    }
    if family == "dense":
        return Qwen3ForCausalLM(Qwen3Config(**sizes)).eval()
    linear = {
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_num_key_heads": hidden // 128,
        "linear_num_value_heads": hidden // 64,
    }
    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**sizes, **linear)).eval()


def table(figures: dict[str, Any]) -> str:
    lines = []
    for family, found in figures.items():
        lines.append(f"\n{family}")
        for case, figure in found["cases"].items():
            lines.append(
                f"  {case:<8} {figure['seconds']:8.2f} s {figure['megabytes']:10.0f} MB"
                f"   loss {figure['loss']:.4f}"
            )
        lines.append(f"  memory, frozen / whole: {found['memory_ratio']:.3f} (goal: at most 0.2)")
        lines.append(f"  time, frozen / whole: {found['time_ratio']:.3f}")
        share = found["context_share_of_time"]
        lines.append(f"  time, context forward / frozen: {share:.3f} (goal: at least 0.5)")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
