"""Plain: a Hugging Face model served by a process of its own, as `amygdala serve` would serve it.

For trying things out without vLLM: its weights are shared, trained and written back in the same way
and by the same worker.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .server import Server, launch, new_runtime

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}


def start_plain(model: Path | str, readout: Path | str | None = None) -> Server:
    """Serve a model folder, with one thread, in a process of its own; its worker has another.

    readout: the folder of what is read and steered with. It answers at a socket in its private
    folder, to this user alone, and writes checkpoints only when asked for. Raises LiveError, with
    the end of its log, if it does not start.
    """
    runtime = new_runtime()
    command = [sys.executable, "-m", __package__, "--model", str(model)]
    command += ["--runtime", str(runtime)]
    command += ["--readout", str(readout)] if readout else []
    return launch(command, runtime, _ONE_THREAD, has_token=False)
