"""A plain Hugging Face model that a process of its own serves from: `python -m tests.live_server`.

It reads one JSON object per line and answers with one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from amygdala_lib.artefacts import repository_root


class Server:
    """The process; it shares one model at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.live_server"],
            cwd=repository_root(),
            env=os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def ask(self, do: str, **details: Any) -> Any:
        self.process.stdin.write(json.dumps({"do": do} | details) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise AssertionError(answer["error"])
        return answer["answer"]

    def serve(self, folder: Path, handle_file: Path, dtype: str = "float32") -> Path:
        """Load a model and share it; the handle file."""
        self.ask("serve", folder=str(folder), path=str(handle_file), dtype=dtype)
        return handle_file

    def logits(self, ids: list[int]) -> torch.Tensor:
        """(tokens, vocabulary), float32, exactly as the server computes them."""
        return torch.tensor(self.ask("logits", ids=ids))

    def end(self) -> None:
        """As by itself, so that it cleans up."""
        if self.process.poll() is None:
            self.process.stdin.close()
            self.process.wait(timeout=60)
        self.process.stdout.close()


class Role:
    """What the process does."""

    def __init__(self) -> None:
        self.model = self.export = None

    def serve(self, folder: str, path: str, dtype: str, device: str = "cpu") -> dict[str, float]:
        """Load and share a model: bytes, seconds, and the peak of memory while it was shared."""
        from transformers import AutoModelForCausalLM

        from amygdala_lib import live

        self.close()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model = model.to(device).eval()
        for parameter in self.model.parameters():
            parameter.data = parameter.data.clone()  # in memory, not a file that is mapped
        before, start = resident(), time.perf_counter()
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
        self.export = live.export_weights(self.model, path, model_name=folder)
        return {
            "bytes": self.export.n_bytes,
            "seconds": time.perf_counter() - start,
            "peak": resident("VmHWM") - before,
        }

    @torch.no_grad()
    def logits(self, ids: list[int]) -> list[list[float]]:
        return self.model(torch.tensor([ids], device=self.model.device)).logits[0].float().tolist()

    @torch.no_grad()
    def fill(self, name: str, value: float) -> None:
        self.model.get_parameter(name).fill_(value)

    def first_value(self, name: str) -> float:
        return float(self.model.get_parameter(name).flatten()[0])

    def close(self) -> None:
        if self.export:
            self.export.close()
        self.model = self.export = None

    def descriptors(self) -> int:
        return len(os.listdir("/proc/self/fd"))


def resident(name: str = "VmRSS") -> int:
    """Bytes, as the system reports them of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    role = Role()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"answer": getattr(role, request.pop("do"))(**request)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
