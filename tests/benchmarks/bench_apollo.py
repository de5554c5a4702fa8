"""Apollo's step time, state and peak memory against AdamW's and pytorch_optimizer's APOLLO.

    python -m tests.benchmarks.bench_apollo

All that is compared runs in turn within each round, every second round backwards; a ratio is the
median of the rounds' ratios. Peaks of memory are of a process each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

import amygdala_lib as amy
from amygdala_lib.artefacts import provenance, write_json
from amygdala_lib.training.apollo import Apollo

try:
    from pytorch_optimizer import APOLLO
except ImportError:
    raise SystemExit(
        "this compares with pytorch_optimizer, which is not installed: "
        "python -m pip install --no-deps pytorch_optimizer"
    ) from None

RANK = 64
ADAMW = "AdamW, foreach"
FUSED = "AdamW, fused"
OURS = f"Apollo, rank {RANK}"
MINI = "Apollo, rank 1"
THEIRS = f"pytorch_optimizer's APOLLO, rank {RANK}"
DEMO = "the bundled model"
PEAKS = {
    "adamw": ADAMW,
    "single": "Apollo, one weight at a time",
    "stacked": "Apollo, small weights stacked",
    "backward": "Apollo, step in backward",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024, 1536, 2048])
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count (7)")
    parser.add_argument("--memory-hidden", type=int, default=1024, help="of the 8 layers (1024)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--peak", choices=PEAKS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if min(*options.hidden, options.repeats, options.memory_hidden) < 1:
        parser.error("numbers start at 1")
    if options.peak:
        print(json.dumps(peak(options.peak, options.memory_hidden, options.device)))
        return
    setting = provenance(
        pytorch_optimizer=version("pytorch_optimizer"),
        device=options.device,
        repeats=options.repeats,
        threads=torch.get_num_threads(),
        load_average_before=os.getloadavg()[0],
    )
    print(f"{options.device}, threads {setting['threads']}, load {os.getloadavg()[0]:.2f}")
    cases = {f"layer of hidden {hidden}": layer_shapes(hidden) for hidden in options.hidden}
    dtypes = [torch.float32]
    if options.device != "cpu":
        cases["two matrices of 4096 x 14336"] = [(4096, 14336)] * 2
        dtypes.append(torch.bfloat16)
    cases[DEMO] = [p.shape for p in amy.load_model("demo").model.parameters()]
    steps = [
        step_figures(case, shapes, dtype, options)
        for case, shapes in cases.items()
        for dtype in dtypes
    ]
    figures = {"steps": steps, "peaks": peaks(options.memory_hidden, options.device)}
    if options.json:
        write_json(options.json, {**setting, **figures})


def layer_shapes(hidden: int) -> list[tuple[int, ...]]:
    """The weights of a transformer layer with grouped keys and a gated MLP."""
    inner, grouped = hidden * 11 // 4, hidden // 4
    attention = [(hidden, hidden), (grouped, hidden), (grouped, hidden), (hidden, hidden)]
    return [*attention, (inner, hidden), (inner, hidden), (hidden, inner), (hidden,), (hidden,)]


def step_figures(
    case: str, shapes: Sequence[Sequence[int]], dtype: torch.dtype, options: argparse.Namespace
) -> dict[str, Any]:
    """Seconds a step and state of each optimizer, on gradients they share, and what that makes."""
    has_goals, case = case != DEMO, f"{case}, {str(dtype).removeprefix('torch.')}"
    generator = torch.Generator(options.device).manual_seed(0)

    def drawn(shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=generator, device=options.device).mul_(0.02).to(dtype)

    gradients = [drawn(shape) for shape in shapes]
    optimizers = {}
    for name, make in makers().items():
        weights = [nn.Parameter(drawn(shape)) for shape in shapes]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        optimizers[name] = make(weights)
    interleaved(optimizers, 2, f"{case}, warm-up")
    seconds = interleaved(optimizers, options.repeats, case)
    count = sum(gradient.numel() for gradient in gradients)
    state = {name: state_bytes(optimizer) / count for name, optimizer in optimizers.items()}
    ratios = {name: compare(seconds, name, ADAMW) for name in optimizers if name != ADAMW}
    share = {"ratio": state[OURS] / state[ADAMW]}
    if has_goals:
        ratios[OURS] |= {"goal": "at most 1.00", "met": ratios[OURS]["ratio"] <= 1}
        share |= {"goal": "at most 0.125", "met": share["ratio"] <= 1 / 8}
    print(f"\n{case}: {count:,} parameters")
    print(f"{'ms a step':>12}{'bytes/parameter':>17}{'time / AdamW':>14}  (range)")
    for name in optimizers:
        line = f"{1e3 * median(seconds[name]):>12.2f}{state[name]:>17.3f}"
        if found := ratios.get(name):
            line += f"{found['ratio']:>14.2f}  ({found['lowest']:.2f}-{found['highest']:.2f})"
        print(f"{line:<60}{name}")
    for what, found in (("time", ratios[OURS]), ("state", share)):
        goal = f", {found['goal']}: {'met' if found['met'] else 'MISSED'}" if has_goals else ""
        print(f"  {what} of {OURS} / {ADAMW}: {found['ratio']:.3f}{goal}")
    return {
        "case": case,
        "parameters": count,
        "seconds": seconds,
        "state_bytes_per_parameter": state,
        "state_share": share,
        "comparisons": list(ratios.values()),
    }


def makers() -> dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]:
    return {
        ADAMW: lambda weights: torch.optim.AdamW(weights, foreach=True),
        FUSED: lambda weights: torch.optim.AdamW(weights, fused=True),
        OURS: lambda weights: Apollo(weights, rank=RANK),
        MINI: lambda weights: Apollo(weights, rank=1),
        THEIRS: their_apollo,
    }


def their_apollo(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    groups = [
        {"params": [weight for weight in weights if weight.ndim == 2], **projected(RANK)},
        {"params": [weight for weight in weights if weight.ndim != 2]},
    ]
    return APOLLO([group for group in groups if group["params"]], lr=1e-5, scale_type="channel")


def projected(rank: int) -> dict[str, Any]:
    """What pytorch_optimizer's APOLLO takes for a group of matrices, with the authors' values."""
    return {"rank": rank, "update_proj_gap": 200, "scale": 1.0, "projection_type": "std"}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of all tensors of the state, those of pytorch_optimizer's projectors included."""

    def size(held: Any) -> int:
        if isinstance(held, Tensor):
            return held.numel() * held.element_size()
        if isinstance(held, (tuple, list)):
            return sum(map(size, held))
        return sum(map(size, vars(held).values())) if hasattr(held, "__dict__") else 0

    return sum(size(value) for state in optimizer.state.values() for value in state.values())


def interleaved(
    optimizers: dict[str, torch.optim.Optimizer], rounds: int, what: str
) -> dict[str, list[float]]:
    """Seconds of a step of each in each round, all in turn, every second round backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for number in tqdm(range(rounds), desc=what, unit="round"):
        for name in list(optimizers)[:: -1 if number % 2 else 1]:
            finish_pending_work()
            start = time.perf_counter()
            optimizers[name].step()
            finish_pending_work()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def finish_pending_work() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def compare(seconds: dict[str, list[float]], name: str, to: str) -> dict[str, Any]:
    """The ratio of two cases within each round: median, lowest, highest."""
    ratios = [a / b for a, b in zip(seconds[name], seconds[to], strict=True)]
    found = {"ratio": median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    return {"case": name, "to": to, **found}


def peaks(hidden: int, device: str) -> dict[str, Any]:
    """Each way's peak of memory above the weights, measured in a process of its own."""
    found = {}
    print(f"\npeak of memory above the weights, 8 layers of hidden {hidden}, as a multiple of them")
    for way, name in PEAKS.items():
        arguments = ["--peak", way, "--memory-hidden", str(hidden), "--device", device]
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.bench_apollo", *arguments],
            check=True,
            capture_output=True,
            text=True,
        )
        found[name] = json.loads(done.stdout)
        above = found[name]["bytes_above_weights"] / found[name]["weight_bytes"]
        print(f"{above:>10.2f}  {found[name]['bytes_above_weights'] / 2**20:>8.0f} MiB  {name}")
    return found


def peak(way: str, hidden: int, device: str) -> dict[str, int]:
    """Bytes at the peak of two steps on 16 tokens, above what the weights take."""
    two_steps(way, new_model(64, 1, device))  # whatever is loaded on first use is not counted
    model = new_model(hidden, 8, device)
    with watched_memory(device) as found:
        two_steps(way, model)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"bytes_above_weights": found["above"], "weight_bytes": weights}


def new_model(hidden: int, layers: int, device: str) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 256),
        head_dim=64,
    )
    return Qwen3ForCausalLM(config).to(device)


def two_steps(way: str, model: Qwen3ForCausalLM) -> None:
    if way == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    else:
        optimizer = Apollo(model.named_parameters(), rank=RANK, foreach=way != "single")
    ids = torch.arange(16, device=model.device)[None]
    with optimizer.step_in_backward() if way == "backward" else nullcontext():
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
            if way != "backward":
                optimizer.step()
                optimizer.zero_grad()


@contextmanager
def watched_memory(device: str) -> Iterator[dict[str, int]]:
    """Sets "above" to how many bytes the block takes at its peak above what was there before."""
    found = {"above": 0}
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        found["above"] = torch.cuda.max_memory_allocated() - before
        return
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.001):
            found["above"] = max(found["above"], process.memory_info().rss - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


if __name__ == "__main__":
    try:
        main()
    except amy.AmygdalaError as error:
        sys.exit(f"{error}")
