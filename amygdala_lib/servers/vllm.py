"""vLLM: a server by `amygdala serve`, set up small, to be tried out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from transformers import AutoConfig

from ..errors import LiveError
from .server import SOCKET, Server, launch, new_runtime

_COMMAND = (sys.executable, "-m", "amygdala_lib.cli", "serve")
_SMALL = ("--kv-cache-memory-bytes", str(128 << 20), "--max-num-seqs", "16")
_LONGEST = 512  # tokens of a request, or what the model reads, if that is less
_QUIET = {"HF_HUB_OFFLINE": "1", "TORCH_COMPILE_DISABLE": "1", "TQDM_DISABLE": "1"}


def how_to_install(model: Path | str) -> str | None:
    """What `amygdala serve` says to install before it can serve `model`; None if it can.

    Raises LiveError if it would not serve this model for another reason.
    """
    found = subprocess.run(
        [*_COMMAND, str(model), "--print"], capture_output=True, text=True, check=False
    )
    if found.returncode == 0:
        return None
    said = found.stderr.strip()
    if "vLLM is not installed" in said:
        return said[said.index("vLLM is not installed") :]
    raise LiveError(f"amygdala serve {model}: {said}")


def start_vllm(model: Path | str, readout: Path | str | None = None) -> Server:
    """Serve a model folder with vLLM, in processes of their own; checkpoints only when asked for.

    readout: the folder of what is read and steered with. Raises LiveError, with the end of the
    server's log, if it does not start.
    """
    runtime = new_runtime()
    command = [*_COMMAND, str(model), "--runtime", str(runtime)]
    command += ["--uds", str(runtime / SOCKET), "--checkpoint-after", "0"]
    command += ["--readout", str(readout)] if readout else []
    config = AutoConfig.from_pretrained(model).get_text_config()
    length = min(_LONGEST, getattr(config, "max_position_embeddings", None) or _LONGEST)
    return launch(
        [*command, "--", *_SMALL, "--max-model-len", str(length)], runtime, _QUIET, has_token=True
    )
