"""Attaching to a server's weights, against loading the model: seconds and memory.

    python -m tests.benchmarks.bench_attach

A random dense model with the proportions of Qwen3-0.6B is written to disk and served by a process
of its own. Each case then runs in a fresh process, after all imports, in turn within each round,
every second round backwards. On the CPU and in the folder's dtype, from_pretrained maps the file
and reads nothing until a weight is used, so that each is also timed with every weight read once.
The folder is in the page cache, but for the case that says it is read from disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, Qwen3Config

from amygdala_lib import live
from amygdala_lib.artefacts import provenance, repository_root, write_json
from tests.live_server import Server

SEED = 0
READ = ", every weight read once"
ATTACH = "attach"
LOAD = "from_pretrained"
DISK = "from_pretrained from disk"
CASES = (ATTACH, LOAD, ATTACH + READ, LOAD + READ, DISK + READ)
COMPARED = ((LOAD, ATTACH), (LOAD + READ, ATTACH + READ), (DISK + READ, ATTACH + READ))
MODEL = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
VOCABULARY = 151_936
N_TOKENS = 64
PRIVATE = "Private_Clean", "Private_Dirty"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=1, help="GB of bfloat16 weights (1)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count (5)")
    parser.add_argument("--folder", type=Path, help="where to write (the temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.case:
        print(json.dumps(one(options.case, options.source)))
        return
    if options.repeats < 1 or options.size <= 0:
        parser.error("--repeats starts at 1, --size above 0")

    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = write_model(Path(place) / "model", options.size)
        server = Server()
        try:
            figures = measure(server, folder, Path(place), options.repeats)
        finally:
            server.end()
    setting = provenance(
        repeats=options.repeats,
        seed=SEED,
        threads=torch.get_num_threads(),
        cores=os.cpu_count(),
        load_average=os.getloadavg()[0],
    )
    print(table(setting, figures))
    if options.json:
        write_json(options.json, {**setting, **figures})


def write_model(folder: Path, size: float) -> Path:
    """A model folder of about `size` GB, in bfloat16."""
    vocabulary = max(1024, int(VOCABULARY * min(1, size)))
    embeddings = vocabulary * MODEL["hidden_size"]
    per_layer = 15.73e6
    n_layers = max(2, round((size * 1e9 / 2 - embeddings) / per_layer))
    config = Qwen3Config(**MODEL, vocab_size=vocabulary, num_hidden_layers=n_layers)
    torch.manual_seed(SEED)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def measure(server: Server, folder: Path, place: Path, repeats: int) -> dict[str, Any]:
    """All cases in turn, after one round that does not count."""
    handle_file = live.private_folder(place / "runtime") / "weights.json"
    shared = server.ask("serve", folder=str(folder), path=str(handle_file), dtype="bfloat16")
    runs: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    for number in tqdm(range(repeats + 1), desc="rounds"):
        for case in CASES if number % 2 else reversed(CASES):
            if case.startswith(DISK):
                forget(folder)
            found = child(case, handle_file if case.startswith(ATTACH) else folder)
            if number:
                runs[case].append(found)
    if len({found["digest"] for case in CASES for found in runs[case]}) != 1:
        raise SystemExit("the attached model computes other logits than the loaded one")
    return {"shared": shared, "runs": runs, "ratios": ratios(runs)}


def ratios(runs: dict[str, list[dict[str, float]]]) -> dict[str, list[float]]:
    """Seconds of loading over those of attaching, round by round."""
    return {
        f"{load} / {attach}": [
            other["seconds"] / ours["seconds"]
            for other, ours in zip(runs[load], runs[attach], strict=True)
        ]
        for load, attach in COMPARED
    }


def child(case: str, source: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name, "--case", case, "--source", str(source)],
        cwd=repository_root(),
        env=os.environ | {"TQDM_DISABLE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def forget(folder: Path) -> None:
    """Take the weights out of the page cache, where nobody has them mapped."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def one(case: str, source: Path) -> dict[str, float]:
    """What one case takes in this process, beyond imports and a tiny model to warm up with."""
    warm_up()
    before = memory()
    start = time.perf_counter()
    if case.startswith(ATTACH):
        model = live.attach(source)
    else:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    if case.endswith(READ):
        for parameter in model.parameters():
            parameter.sum()
    seconds = time.perf_counter() - start
    after = memory()
    ids = torch.arange(N_TOKENS)[None] + 1
    with torch.no_grad():
        logits = model(ids).logits.float()
    used = memory()
    found = {"seconds": seconds, "digest": float((logits.double() ** 2).sum())}
    found |= {f"{name} after": after[name] - before[name] for name in before}
    return found | {f"{name} after a forward": used[name] - before[name] for name in before}


def warm_up() -> None:
    """What the first model of a process imports and sets up, whatever its size and source."""
    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=128,
    )
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        model(torch.arange(N_TOKENS)[None])


def memory() -> dict[str, int]:
    """Bytes of this process: `unique` to it, and `proportional`, shared pages by their users."""
    found = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, kilobytes, *_ = line.split()
        found[name.rstrip(":")] = int(kilobytes) << 10
    return {
        "unique": sum(found[name] for name in PRIVATE),
        "proportional": found["Pss"],
    }


def table(setting: dict[str, Any], figures: dict[str, Any]) -> str:
    size = figures["shared"]["bytes"]
    lines = [
        f"{size / 1e9:.2f} GB of bfloat16, {setting['cores']} cores, "
        f"load {setting['load_average']:.1f} at the end",
        f"sharing it took the server {figures['shared']['seconds']:.2f} s and "
        f"{figures['shared']['peak'] / size:.1%} of the model in memory on top",
        "",
        f"{'':50}{'seconds':>22}{'unique':>9}{'after a forward':>17}{'proportional':>14}",
    ]
    for case, runs in figures["runs"].items():
        seconds = [found["seconds"] for found in runs]
        share = {
            name: f"{median(found[name] for found in runs) / size:.1%}"
            for name in runs[0]
            if "after" in name
        }
        lines.append(
            f"{case:50}{f'{median(seconds):.3f} ({min(seconds):.3f}-{max(seconds):.3f})':>22}"
            f"{share['unique after']:>9}{share['unique after a forward']:>17}"
            f"{share['proportional after']:>14}"
        )
    lines.append("")
    for name, found in figures["ratios"].items():
        lines.append(f"{name}: {median(found):.1f} ({min(found):.1f} to {max(found):.1f})")
    lines.append("goals: attach 20 times faster; at most 5% of the model unique to the process")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
