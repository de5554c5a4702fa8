"""A thousand small training jobs under two thousand requests: does anything grow?

    .venv-vllm/bin/python -m tests.vllm.soak [--jobs 1000] [--requests 2000] [--json FILE]

Prints a line every tenth of the way; the last compares the end with the first tenth, when caches
are warm. Exits with 1 if a request or job failed, or if memory, descriptors or files have grown.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from tqdm.auto import tqdm

import amygdala_lib
from tests.vllm.conftest import save_directions
from tests.vllm.server import Server, serving

CONNECTIONS = 8
MOST_GROWTH = 1.05
"""Of a process's own memory, from the first tenth to the end."""


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shutil.copytree(Path(amygdala_lib.__file__).parent / "demo" / "model", root / "model")
        readout = save_directions(root / "readout", 256, [3, 5])
        with serving(root / "model", root / "runtime", readout=readout) as server:
            server.ready()
            samples, failures = soak(server, options.jobs, options.requests)
    print(report := _report(samples, failures))
    if options.json:
        found = {"samples": samples, "failures": failures, "report": report}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if failures or _grown(samples) else 0


def soak(server: Server, jobs: int, requests: int) -> tuple[list[dict[str, Any]], list[str]]:
    """What was measured on the way, and what went wrong."""
    failures: list[str] = []
    due: SimpleQueue[int | None] = SimpleQueue()

    def request() -> None:
        while (number := due.get()) is not None:
            steered = {"vllm_xargs": {"amygdala_steering": '{"calm": 0.2}'}} if number % 4 else {}
            try:
                answer = server.complete(_drawn(number, 24), max_tokens=12, **steered)
                if number % 10 == 0:
                    found = server.call("GET", f"/readout/{answer['id']}")
                    assert found.status_code == 200, found.text
            except Exception as error:
                failures.append(f"request {number}: {type(error).__name__}: {error}"[:300])

    samples = []
    every = max(1, jobs // 10)
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for _ in range(CONNECTIONS):
            pool.submit(request)
        start = time.monotonic()
        try:
            for number in tqdm(range(jobs), unit="job", mininterval=10):
                for each in range(number * requests // jobs, (number + 1) * requests // jobs):
                    due.put(each)
                text = _drawn(10_000 + number % 50, 16)
                job = {
                    "context_ids": [text[:4]],
                    "continuation_ids": [text[4:]],
                    "steps": 1,
                    "settings": {"lr": 1e-4, "rank": 8},
                }
                result = server.train(job)
                if result["state"] != "done":
                    failures.append(f"{result['job']}: {result['error']}"[:300])
                if (number + 1) % every == 0:
                    samples.append(_sample(server, number + 1, time.monotonic() - start))
                    print(json.dumps(samples[-1]), flush=True)
        finally:
            for _ in range(CONNECTIONS):
                due.put(None)
    samples.append(_sample(server, jobs, time.monotonic() - start) | {"idle": True})
    print(json.dumps(samples[-1]), flush=True)
    return samples, failures


def _sample(server: Server, jobs: int, seconds: float) -> dict[str, Any]:
    sample: dict[str, Any] = {"jobs": jobs, "seconds": round(seconds, 1)}
    for name, process in server.processes().items():
        sample[name] = {
            "own_mb": round(process.memory_full_info().uss / 1e6, 1),
            "descriptors": process.num_fds(),
            "threads": process.num_threads(),
        }
    sample["files"] = sum(1 for path in server.runtime.rglob("*") if path.is_file())
    return sample


def _grown(samples: list[dict[str, Any]]) -> list[str]:
    first, last = samples[0], samples[-1]
    grown = []
    for name in ("api", "engine", "worker", "trainer"):
        if last[name]["own_mb"] > MOST_GROWTH * first[name]["own_mb"]:
            grown.append(f"memory of {name}")
        # Connections come and go; a leak is one per job or request.
        if last[name]["descriptors"] > first[name]["descriptors"] + 2 * CONNECTIONS:
            grown.append(f"descriptors of {name}")
    if last["files"] > first["files"] + 5:
        grown.append("files")
    return grown


def _report(samples: list[dict[str, Any]], failures: list[str]) -> str:
    first, last = samples[0], samples[-1]
    lines = [f"{last['jobs']} jobs in {last['seconds']} s, {len(failures)} failures"]
    for name in ("api", "engine", "worker", "trainer"):
        lines.append(
            f"{name}: {first[name]['own_mb']} MB after {first['jobs']} jobs, "
            f"{last[name]['own_mb']} MB at the end; descriptors {first[name]['descriptors']}, "
            f"{last[name]['descriptors']}"
        )
    lines.append(f"files of the runtime folder: {first['files']}, {last['files']}")
    lines += [f"grown: {what}" for what in _grown(samples)] + failures[:10]
    return "\n".join(lines)


def _drawn(seed: int, n: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 2000, (n,), generator=generator).tolist()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--json", type=Path, help="write the samples here, too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
