"""Diff and sync of a synthetic model folder, against numpy, SHA-256 and writing everything anew.

    python -m tests.benchmarks.bench_checkpoint

The folder is in the page cache throughout. All cases run in turn within each round, every second
round backwards, so that whatever else the machine does hits all alike.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from amygdala_lib import checkpoint
from amygdala_lib.artefacts import provenance, write_json
from amygdala_lib.checkpoint.shards import INDEX, ModelFolder

SEED = 0
SHARDS = 3
MATRIX = (4096, 4096)
QUIET = {"progress": False}

NUMPY = "numpy: array_equal of mapped shards"
DIFF = "diff, nothing changed"
DIFF_ONE = "diff, nothing changed, one thread"
HASH = "sha256 of the same bytes"
SAVE = "save_file of everything"
SAVE_FLUSHED = "save_file of everything, flushed"
SYNC = "sync of the change"
DIFF_CHANGED = "diff, changed"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2, help="of bf16 weights (2)")
    parser.add_argument("--changed", type=float, default=0.001, help="share of a change (0.001)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count (5)")
    parser.add_argument("--folder", type=Path, help="where to write (the temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args(arguments)
    if options.repeats < 1 or options.gigabytes <= 0 or not 0 < options.changed <= 1:
        parser.error("--repeats starts at 1, --gigabytes above 0; --changed is between 0 and 1")

    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        state = new_state(options.gigabytes)
        folder = write_folder(Path(place) / "model", state)
        figures = measure(folder, state, options.changed, options.repeats)
    setting = provenance(
        bytes=sum(tensor.nbytes for tensor in state.values()),
        tensors=len(state),
        shards=SHARDS,
        changed=options.changed,
        repeats=options.repeats,
        seed=SEED,
        threads=torch.get_num_threads(),
        cores=os.cpu_count(),
        load_average=os.getloadavg()[0],
    )
    print(table(setting, figures))
    if options.json:
        write_json(options.json, {**setting, **figures})


def new_state(gigabytes: float) -> dict[str, Tensor]:
    """Matrices as a trained model has them, bf16, with a norm to each."""
    generator = torch.Generator().manual_seed(SEED)
    n_matrices = max(SHARDS, round(gigabytes * 1e9 / (2 * MATRIX[0] * MATRIX[1])))
    rows = round(gigabytes * 1e9 / (2 * n_matrices * MATRIX[1]))
    state = {}
    for n in tqdm(range(n_matrices), desc="weights", unit="matrix"):
        matrix = torch.empty(rows, MATRIX[1], dtype=torch.bfloat16)
        state[f"layers.{n}.matrix"] = matrix.normal_(std=0.02, generator=generator)
        state[f"layers.{n}.norm"] = torch.ones(MATRIX[1], dtype=torch.bfloat16)
    return state


def write_folder(folder: Path, state: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    names = list(state)
    weight_map = {}
    for n in range(SHARDS):
        shard = f"model-{n + 1:05d}-of-{SHARDS:05d}.safetensors"
        held = names[n * len(names) // SHARDS : (n + 1) * len(names) // SHARDS]
        save_file({name: state[name] for name in held}, folder / shard)
        weight_map |= dict.fromkeys(held, shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def measure(folder: Path, state: dict[str, Tensor], share: float, repeats: int) -> dict[str, Any]:
    """All figures: seconds of each case by round, bytes, and megabytes of memory."""
    n_bytes = sum(tensor.nbytes for tensor in state.values())
    arrays = {name: tensor.view(torch.uint8).view(-1).numpy() for name, tensor in state.items()}
    original = state["layers.1.matrix"].clone()
    first = timed(lambda: checkpoint.sync(folder, concentrated(state, share), **QUIET))
    state["layers.1.matrix"].copy_(original)
    checkpoint.rollback(folder, 0, **QUIET)
    changes: list[checkpoint.Change] = []
    elsewhere = folder.parent / "whole"

    def sync() -> None:
        changes.append(checkpoint.sync(folder, state, keep=2, **QUIET))

    def one_thread() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        checkpoint.diff(folder, state, **QUIET)
        torch.set_num_threads(threads)

    def save(flushed: bool) -> None:
        write_folder(elsewhere, state)
        for path in elsewhere.iterdir() if flushed else ():
            with path.open("rb") as file:
                os.fsync(file.fileno())

    cases: dict[str, Callable[[], object]] = {
        NUMPY: lambda: equal_by_numpy(folder, arrays),
        DIFF: lambda: checkpoint.diff(folder, state, **QUIET),
        DIFF_ONE: one_thread,
        HASH: lambda: hash_of(folder),
        SAVE: lambda: save(False),
        SAVE_FLUSHED: lambda: save(True),
        DIFF_CHANGED: lambda: checkpoint.diff(folder, state, **QUIET),
        SYNC: sync,
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    with tqdm(total=(repeats + 1) * len(cases), desc="rounds", unit="run") as bar:
        for number in range(repeats + 1):
            for name in list(cases)[:: -1 if number % 2 else 1]:
                if name in (SYNC, DIFF_CHANGED):
                    concentrated(state, share)
                os.sync()  # or a case would wait for what the one before has left to be written
                taken = timed(cases[name])
                if name == DIFF_CHANGED:
                    state["layers.1.matrix"].copy_(original)
                if name == SYNC:
                    original = state["layers.1.matrix"].clone()
                if number:  # the first warms up
                    seconds[name].append(taken)
                bar.update()
    change = changes[-1]
    with peak_of_memory() as peak_diff:
        checkpoint.diff(folder, state, **QUIET)
    concentrated(state, share)
    with peak_of_memory() as peak_sync:
        checkpoint.sync(folder, state, keep=2, **QUIET)
    for tensor in state.values():
        tensor.add_(1)
    with peak_of_memory() as peak_dense:
        checkpoint.sync(folder, state, keep=0, **QUIET)
    verified = timed(lambda: checkpoint.verify(folder, **QUIET))
    changed = change.difference.total()
    return {
        "seconds": seconds,
        "first_sync_seconds": first,
        "verify_seconds": verified,
        "sync_parts": change.seconds,
        "comparisons": [
            compare(seconds, NUMPY, DIFF_ONE, at_least=0.8),
            compare(seconds, NUMPY, DIFF, at_least=0.8),
            compare(seconds, HASH, DIFF),
            compare(seconds, SAVE, SYNC, at_least=15),
            compare(seconds, SAVE_FLUSHED, SYNC, at_least=15),
        ],
        "bytes": {
            "model": n_bytes,
            "changed": changed["changed_bytes"],
            "changed elements": changed["changed_elements"] * 2,
            "written into shards": change.shard_bytes,
            "journal, kept as history": change.delta_bytes,
        },
        "peak_megabytes_above_the_model": {
            "diff": peak_diff[0],
            "sync of the change": peak_sync[0],
            "sync of everything": peak_dense[0],
            "goal": 200,
        },
    }


def concentrated(state: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Change neighbouring rows of one matrix, so many that they are `share` of all elements."""
    matrix = state["layers.1.matrix"]
    elements = round(share * sum(tensor.numel() for tensor in state.values()))
    matrix.view(-1)[:elements] += 0.01
    return state


def equal_by_numpy(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """As anyone would write it: map each shard, compare tensor by tensor in 64-bit words."""
    for name, stored in ModelFolder.open(folder).tensors.items():
        words = stored.n_bytes // 8
        held = np.memmap(stored.path, np.uint64, "r", stored.offset, shape=(words,))
        assert np.array_equal(held, arrays[name].view(np.uint64))


def hash_of(folder: Path) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest = sha256()
            while data := file.read(1 << 22):
                digest.update(data)


def timed(case: Callable[[], object]) -> float:
    start = time.perf_counter()
    case()
    return time.perf_counter() - start


class peak_of_memory:  # noqa: N801
    """Within the block, the most memory the process has above what it had, in megabytes.

    Sampled every millisecond: resident memory less what is mapped from files, as the shards are
    while they are read; the kernel takes those pages back when it wants.
    """

    def __enter__(self) -> list[float]:
        with suppress(AttributeError, OSError):  # what glibc keeps for later would hide the peak
            ctypes.CDLL(None).malloc_trim(0)
        self._peak, self._stop = [0.0], threading.Event()
        self._before = anonymous()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self._peak

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self._peak[0] = max(self._peak[0], (anonymous() - self._before) / 1e6)

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()


def anonymous() -> int:
    memory = psutil.Process().memory_info()
    return memory.rss - getattr(memory, "shared", 0)


def compare(
    seconds: dict[str, list[float]], name: str, to: str, at_least: float | None = None
) -> dict[str, Any]:
    """How many times faster `to` is than `name`, within each round: median, lowest, highest."""
    ratios = [a / b for a, b in zip(seconds[name], seconds[to], strict=True)]
    found = {
        "case": name,
        "to": to,
        "ratio": median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }
    return found if at_least is None else {**found, "goal": f"at least {at_least}"}


def table(setting: dict[str, Any], figures: dict[str, Any]) -> str:
    size = setting["bytes"] / 1e9
    lines = [
        f"{size:.2f} GB in {setting['tensors']} tensors and {SHARDS} shards, {setting['threads']} "
        f"threads on {setting['cores']} cores, load {setting['load_average']:.1f}",
        "",
        f"{'seconds, median of ' + str(setting['repeats']):<44}{'s':>10}{'GB/s':>10}",
    ]
    for name, taken in figures["seconds"].items():
        lines.append(f"{name:<44}{median(taken):>10.3f}{size / median(taken):>10.2f}")
    for name, key in (("first sync (hashes all)", "first_sync"), ("verify", "verify")):
        taken = figures[f"{key}_seconds"]
        lines.append(f"{name:<44}{taken:>10.3f}{size / taken:>10.2f}")
    parts = ", ".join(f"{part} {taken:.3f} s" for part, taken in figures["sync_parts"].items())
    lines += [f"the last sync: {parts}", "", "times as fast (median, lowest to highest)"]
    for found in figures["comparisons"]:
        goal = f", goal {found['goal']}" if "goal" in found else ""
        lines.append(
            f"{found['to']} / {found['case']}: {found['ratio']:.2f} "
            f"({found['lowest']:.2f} to {found['highest']:.2f}){goal}"
        )
    counted = figures["bytes"]
    lines += ["", "bytes of a sync"]
    for name, n in counted.items():
        lines.append(f"{name:<44}{n:>16,}{n / counted['changed elements']:>10.2f} x the elements")
    lines += ["", "peak of memory above the model, MB (without mapped pages)"]
    for name, n in figures["peak_megabytes_above_the_model"].items():
        lines.append(f"{name:<44}{n:>10.0f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
