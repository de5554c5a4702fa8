"""Settings: what a server was asked for by environment variables."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import LiveError

RUNTIME = "AMYGDALA_RUNTIME"
READOUT = "AMYGDALA_READOUT"
READOUT_OF_OTHERS = "VLLM_READOUT_VECTORS"
CHECKPOINT_AFTER = "AMYGDALA_CHECKPOINT_AFTER"


@dataclass(frozen=True)
class Settings:
    """runtime: the private folder of this server. readout: the folder of what is read and steered.

    checkpoint_after: seconds from the last training job to the checkpoint. None is what was left
    out.
    """

    runtime: Path | None
    readout: Path | None
    checkpoint_after: float | None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Raises LiveError, naming everything, for values that cannot be meant."""
        problems = []
        runtime = _folder(environment, RUNTIME, problems)
        readout = _folder(environment, READOUT, problems)
        if readout is None:
            readout = _folder(environment, READOUT_OF_OTHERS, problems)
        if readout is not None and readout.name == "readout.safetensors":
            readout = readout.parent  # VLLM_READOUT_VECTORS names the file
        after = None
        if told := environment.get(CHECKPOINT_AFTER):
            try:
                after = float(told)
            except ValueError:
                after = math.nan
            if not 0 <= after < math.inf:
                problems.append(f"{CHECKPOINT_AFTER} is {told!r}: give seconds, such as 600")
        if problems:
            raise LiveError("\n".join(problems))
        return cls(runtime, readout, after)

    @property
    def active(self) -> bool:
        """Whether anything was asked for."""
        return self.runtime is not None or self.readout is not None


def _folder(environment: Mapping[str, str], name: str, problems: list[str]) -> Path | None:
    told = environment.get(name)
    if not told:
        return None
    # vLLM's processes need not have the same working directory.
    if not Path(told).is_absolute():
        problems.append(f"{name} is {told!r}: give an absolute path")
    return Path(told)
