"""What a training run leaves on disk, so that a killed one goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..artefacts import provenance, read_json, read_tensors, replacing, write_json, write_tensors
from ..errors import ArtefactError, TrainingError

_MADE_BY = "`amy.train(..., folder=...)`"
_MISSING = "(not there)"


@dataclass(frozen=True)
class SavedRun:
    """`run.json`, `state.json`, `metrics.jsonl`, and one folder `step-<n>` with the state itself.

    `run.json` is written before the first step: the settings, and what was measured under the first
    weights. `state.json` names the folder of the last complete state: the trained weights and the
    optimizer's memory, written together and found together. It is replaced once that folder is on
    disk, and only then is the one before removed, so that two states take up room for a moment.
    """

    path: Path

    def begun(self, setting: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was measured before the first step, or None for a new run.

        Raises TrainingError, naming both values of each difference, if the folder holds a run with
        another setting.
        """
        if not (self.path / "run.json").exists():
            return None
        run = read_json(self.path / "run.json", _MADE_BY)
        held = run.get("setting", {})
        if differences := [
            f"{name}: {held.get(name, _MISSING)} there, {setting.get(name, _MISSING)} now"
            for name in sorted({*held, *setting})
            if held.get(name) != setting.get(name)
        ]:
            raise TrainingError(
                f"{self.path} holds another run:\n"
                + "\n".join(differences)
                + "\ngive another folder, or the settings of that run to go on with it"
            )
        return run["start"]

    def begin(self, setting: Mapping[str, Any], start: Mapping[str, Any]) -> None:
        """Write the setting and what was measured before the first step."""
        write_json(self.path / "run.json", provenance(setting=dict(setting), start=dict(start)))

    def lacking_room(self, parameters: Mapping[str, nn.Parameter]) -> list[str]:
        """A problem to report if two states of these parameters do not fit on the disk."""
        needed = 2 * sum(p.numel() * p.element_size() for p in parameters.values())
        there = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if (free := shutil.disk_usage(there).free) >= needed:
            return []
        return [
            f"{self.path} has {free / 1e9:.1f} GB free, but two states of the weights take "
            f"{needed / 1e9:.1f} GB: make room, or leave `folder` out and save by yourself"
        ]

    def save(
        self,
        step: int,
        parameters: Mapping[str, nn.Parameter],
        optimizer: Optimizer,
        gradients: Mapping[str, float],
    ) -> None:
        """Weights, optimizer and position after `step` steps, all of one moment or not at all."""
        name = f"step-{step:06d}"
        unfinished = self.path / f".{name}.unfinished"
        for stale in (unfinished, self.path / name):
            shutil.rmtree(stale, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            write_tensors(unfinished / "weights.safetensors", parameters)
            optimizer.save_state(unfinished / "optimizer.safetensors")
            unfinished.rename(self.path / name)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        _flush(self.path)
        description = {"step": step, "folder": name, "gradients": dict(gradients)}
        write_json(self.path / "state.json", description)
        for old in self.path.glob("step-*"):
            if old.name != name:
                shutil.rmtree(old)

    @property
    def optimizer_state(self) -> Path | None:
        """The file of the optimizer's memory, for `train(..., optimizer_state=...)`."""
        state = self._state()
        return None if state is None else self.path / state["folder"] / "optimizer.safetensors"

    def restore(
        self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer
    ) -> tuple[int, dict[str, float]] | None:
        """Put weights and optimizer back as `save` found them; None if it never was called.

        Returns the number of steps done, and the squared gradient norms summed over them.

        Raises ArtefactError if the files are damaged or the weights are not of this model; nothing
        is changed then.
        """
        state = self._state()
        if state is None:
            return None
        path = self.path / state["folder"] / "weights.safetensors"
        weights, _ = read_tensors(path, _MADE_BY)
        held = {name: (tuple(w.shape), str(w.dtype)) for name, w in weights.items()}
        wanted = {name: (tuple(p.shape), str(p.dtype)) for name, p in parameters.items()}
        if wrong := [
            f"{name}: {held.get(name, _MISSING)} there, {wanted.get(name, _MISSING)} in the model"
            for name in sorted({*held, *wanted})
            if held.get(name) != wanted.get(name)
        ]:
            shown = "\n".join([*wrong[:5], *([f"and {len(wrong) - 5} more"] if wrong[5:] else [])])
            raise ArtefactError(f"{path} is of another model:\n{shown}\ngive another folder")
        optimizer.load_state(self.path / state["folder"] / "optimizer.safetensors")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
        return state["step"], state["gradients"]

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one step's figures to `metrics.jsonl`."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def logged(self, before: int) -> list[dict[str, Any]]:
        """The figures of the steps before that one; later ones, of a run that was killed, go."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = lines[:before]
        with replacing(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")
        return [json.loads(line) for line in kept]

    def _state(self) -> dict[str, Any] | None:
        if not (self.path / "state.json").exists():
            return None
        return read_json(self.path / "state.json", _MADE_BY)


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
