"""Sizes and times of deltas against xdelta3, bsdiff and zstd --patch-from.

    python -m tests.benchmarks.bench_encodings

The tensor is bfloat16 noise of the size of weights, made here, and the same for all. Times are
seconds of processor, ours of `encode` alone, the tools' with reading and writing their files, which
are in memory where the machine keeps temporary files. A tool that is not installed is left out.
Every delta of ours is applied and compared; those of the tools are not.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from amygdala_lib.artefacts import provenance, write_json
from amygdala_lib.checkpoint.encodings import encode
from amygdala_lib.errors import AmygdalaError

DENSITIES = (0.0001, 0.001, 0.01, 0.1)
WIDTH = 4096
"""Elements of a row."""
TOOLS = {
    "xdelta3": "xdelta3 -e -f -B {window} -s {old} {new} {delta}",
    "xdelta3 -9": "xdelta3 -e -f -9 -S lzma -B {window} -s {old} {new} {delta}",
    "bsdiff": "bsdiff {old} {new} {delta}",
    "zstd -3": "zstd -q -f -3 --single-thread --patch-from={old} {new} -o {delta}",
    "zstd -19": "zstd -q -f -19 --single-thread --patch-from={old} {new} -o {delta}",
}
OURS = ("ours", "ours, absolute")
"""As an export codes it, counting from the old values, and as the undo journal does."""
GOAL = 1.10
SELF, CHILDREN = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN


class Result(NamedTuple):
    n_bytes: int
    seconds: float


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=64, help="size of the tensor (64)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of ours; tools have 1 (3)")
    parser.add_argument("--changes", nargs="+", choices=CHANGES, default=list(CHANGES))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--tools", nargs="*", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args(arguments)
    if min(options.megabytes, options.repeats) < 1:
        parser.error("numbers start at 1")
    tools = {name: TOOLS[name] for name in options.tools if shutil.which(name.split()[0])}
    for name in options.tools:
        if name not in tools:
            print(f"{name.split()[0]} is not installed: no figures for {name}")
    setting = provenance(
        **{name: value for name, value in vars(options).items() if name != "json"},
        commands=tools,
        load_average_before=os.getloadavg()[0],
    )
    print(f"{options.megabytes} MB of bfloat16; load before {setting['load_average_before']:.2f}\n")
    print(f"{'layout':<12}{'change':<10}{'density':>8}", end="")
    print("".join(f"{name:>22}" for name in ("ours", "ours, absolute", *tools)))
    cases = []
    for case, old, new in made(options):
        ours = {name: encoded(old, new, name == "ours", options.repeats) for name in OURS}
        theirs = run_tools(tools, old, new)
        print(f"{case['layout']:<12}{case['change']:<10}{case['density']:>8.2%}", end="")
        found = [*((r, kind) for r, kind in ours.values()), *((r, "") for r in theirs.values())]
        print("".join(f"{said(result, kind):>22}" for result, kind in found), flush=True)
        cases.append(
            case
            | {name: result._asdict() | {"kind": kind} for name, (result, kind) in ours.items()}
            | {name: result._asdict() for name, result in theirs.items()}
        )
    summary = summarise(cases, list(tools)) if tools else {}
    if options.json:
        write_json(options.json, {**setting, "cases": cases, "summary": summary})


def said(result: Result, kind: str) -> str:
    return f"{kind[:1]} {result.n_bytes:,} {result.seconds:7.3f}s"


def independent(generator: Generator, n: int, density: float) -> NDArray[np.bool_]:
    changed = np.zeros(n, bool)
    changed[generator.choice(n, max(1, round(n * density)), replace=False)] = True
    return changed


def run_of(generator: Generator, n: int, density: float) -> NDArray[np.bool_]:
    changed, length = np.zeros(n, bool), max(1, round(n * density))
    start = int(generator.integers(0, n - length + 1))
    changed[start : start + length] = True
    return changed


def rows(generator: Generator, n: int, density: float) -> NDArray[np.bool_]:
    changed = np.zeros((n // WIDTH, WIDTH), bool)
    n_rows = max(1, round(len(changed) * density))
    changed[generator.choice(len(changed), n_rows, replace=False)] = True
    return changed.reshape(-1)


def few_ulp(generator: Generator, old: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """One to four representable numbers away from zero or towards it."""
    steps = generator.integers(1, 5, len(old)) * generator.choice([-1, 1], len(old))
    return (old.astype(np.int32) + steps).astype(np.uint16)


def one_ulp(generator: Generator, old: NDArray[np.uint16]) -> NDArray[np.uint16]:
    return (old.astype(np.int32) + generator.choice([-1, 1], len(old))).astype(np.uint16)


def redrawn(generator: Generator, old: NDArray[np.uint16]) -> NDArray[np.uint16]:
    return weights(generator, len(old))


def random_bits(generator: Generator, old: NDArray[np.uint16]) -> NDArray[np.uint16]:
    return generator.integers(0, 1 << 16, len(old), dtype=np.uint16)


LAYOUTS = {"independent": independent, "run": run_of, "rows": rows}
CHANGES = {"one ulp": one_ulp, "few ulp": few_ulp, "redrawn": redrawn, "bits": random_bits}


def weights(generator: Generator, n: int) -> NDArray[np.uint16]:
    """Bits of bfloat16, normal with a standard deviation of 0.02."""
    drawn = generator.standard_normal(n, np.float32) * np.float32(0.02)
    return ((drawn.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


def made(
    options: argparse.Namespace,
) -> Iterator[tuple[dict[str, Any], NDArray[np.uint16], NDArray[np.uint16]]]:
    """Each case, its old tensor and its new one."""
    old = weights(np.random.default_rng(0), options.megabytes << 19)
    for layout in options.layouts:
        for change in options.changes:
            for density in DENSITIES:
                generator = np.random.default_rng(1)
                changed = LAYOUTS[layout](generator, len(old), density)
                new = old.copy()
                new[changed] = CHANGES[change](generator, old[changed])
                n_changed = int(np.count_nonzero(new != old))
                case = {"layout": layout, "change": change, "density": density}
                yield case | {"changed": n_changed}, old, new


def encoded(
    old: NDArray[np.uint16], new: NDArray[np.uint16], relative: bool, repeats: int
) -> tuple[Result, str]:
    """Size and median seconds of our delta, and its kind."""
    before, after = old.view(np.uint8), new.view(np.uint8)
    seconds = []
    for _ in range(repeats):
        taken, delta = spent(lambda: encode(before, after, 2, relative))
        seconds.append(taken)
    target = before.copy()
    delta.apply(target)
    if not np.array_equal(target, after):
        raise AssertionError("the delta does not lead to the new tensor")
    return Result(len(delta.payload), median(seconds)), delta.kind


def run_tools(
    tools: dict[str, str], old: NDArray[np.uint16], new: NDArray[np.uint16]
) -> dict[str, Result]:
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / name for name in ("old", "new", "delta")}
        old.tofile(paths["old"])
        new.tofile(paths["new"])
        for name, command in tools.items():
            words = command.format(window=max(old.nbytes, 1 << 19), **paths).split(" ")
            taken, done = spent(
                lambda words=words: subprocess.run(words, capture_output=True, text=True)
            )
            if done.returncode:
                raise AmygdalaError(f"{name} failed with {done.returncode}: {done.stderr.strip()}")
            results[name] = Result(paths["delta"].stat().st_size, taken)
    return results


def spent(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of processor, of this process and of those it waits for, and the result."""

    def seconds() -> float:
        used = [resource.getrusage(who) for who in (SELF, CHILDREN)]
        return sum(found.ru_utime + found.ru_stime for found in used)

    before = seconds()
    result = work()
    return seconds() - before, result


def summarise(cases: list[dict[str, Any]], tools: list[str]) -> dict[str, Any]:
    """Our sizes against the smallest of the tools, and their times against ours."""
    ratios = []
    for case in cases:
        best = min(tools, key=lambda name, case=case: case[name]["n_bytes"])
        ratios.append((case["ours"]["n_bytes"] / case[best]["n_bytes"], best, case))
    worst, best, case = max(ratios, key=lambda found: found[0])
    summary = {
        "goal": f"at most {GOAL:.2f}",
        "worst_size_ratio": worst,
        "median_size_ratio": median(ratio for ratio, *_ in ratios),
        "goal_met": worst <= GOAL,
        "time_ratios": {},
    }
    print(
        f"\nsize / smallest tool: median {summary['median_size_ratio']:.2f}, worst {worst:.2f} "
        f"({case['layout']}, {case['change']}, {case['density']:.2%}, {best}; goal {GOAL:.2f})"
    )
    for name in tools:
        times = [case[name]["seconds"] / case["ours"]["seconds"] for case in cases]
        summary["time_ratios"][name] = {"median": median(times), "lowest": min(times)}
        print(f"time of {name} / ours: median {median(times):.1f}, lowest {min(times):.1f}")
    return summary


if __name__ == "__main__":
    try:
        main()
    except AmygdalaError as error:
        sys.exit(f"{error}")
