"""What was captured before: pooled activations on disk, found again by content."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .artefacts import repository_root, write_tensors


class Pooled(NamedTuple):
    """What is kept of one text."""

    values: dict[int, Tensor]
    norm_sums: dict[int, float]
    n_tokens: int


class ActivationCache:
    """Pooled activations on disk: a folder per setting, a safetensors file per run that added some.

    A file holds, for each layer, the values of its texts end to end, their norm sums, and in its
    metadata the texts' keys and numbers of rows. Files are never changed.
    """

    def __init__(self, cache: Path | str | None, setting: str):
        if cache == "default":
            cache = os.environ.get("AMYGDALA_CACHE") or repository_root() / "runs" / "cache"
        name = hashlib.sha256(setting.encode()).hexdigest()[:16]
        self.folder = Path(cache) / name if cache is not None else None

    def find(self, keys: list[str], layers: list[int]) -> dict[str, Pooled]:
        """Those of the texts that have every layer in one file."""
        found: dict[str, Pooled] = {}
        if self.folder is None or not self.folder.is_dir():
            return found
        wanted = set(keys)
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    index = json.loads(file.metadata()["texts"])
                    held = set(json.loads(file.metadata()["layers"]))
                    missing = wanted - found.keys()
                    useful = [text for text in index if text["key"] in missing]
                    if not useful or not held.issuperset(layers):
                        continue
                    values = {n: file.get_tensor(f"layer_{n}") for n in layers}
                    norms = {n: file.get_tensor(f"layer_{n}.norms").tolist() for n in layers}
            except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
                warnings.warn(f"{path} is damaged ({error}): its texts are run again", stacklevel=3)
                continue
            for text in useful:
                start, rows = text["start"], text["rows"]
                found[text["key"]] = Pooled(
                    {
                        layer: held_values[start : start + rows] if rows else held_values[start]
                        for layer, held_values in values.items()
                    },
                    {layer: sums[text["number"]] for layer, sums in norms.items()},
                    text["tokens"],
                )
        return found

    def add(self, keys: list[str], pooled: list[Pooled]) -> None:
        """Keep what was read of these texts, in a new file."""
        if self.folder is None:
            return
        layers = list(pooled[0].values)
        index, start = [], 0
        for number, (key, text) in enumerate(zip(keys, pooled, strict=True)):
            value = text.values[layers[0]]
            rows = len(value) if value.ndim == 2 else 0  # 0: a single vector
            index.append(
                {
                    "key": key,
                    "number": number,
                    "start": start,
                    "rows": rows,
                    "tokens": text.n_tokens,
                }
            )
            start += rows or 1
        tensors = {}
        for layer in layers:
            parts = [text.values[layer] for text in pooled]
            tensors[f"layer_{layer}"] = (
                torch.cat(parts) if parts[0].ndim == 2 else torch.stack(parts)
            )
            tensors[f"layer_{layer}.norms"] = torch.tensor(
                [text.norm_sums[layer] for text in pooled], dtype=torch.float64
            )
        name = hashlib.sha256(json.dumps([keys, layers]).encode()).hexdigest()[:16]
        write_tensors(
            self.folder / f"{name}.safetensors",
            tensors,
            {"texts": json.dumps(index), "layers": json.dumps(layers)},
        )
