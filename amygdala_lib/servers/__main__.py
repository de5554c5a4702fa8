"""The process of a plain server: `python -m amygdala_lib.servers --model ... --runtime ...`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig

from ..live import export_weights, private_folder
from ..live.supervisor import Supervisor
from ..models import LanguageModel, load_model
from ..readout import Readout
from .endpoints import listening
from .engine import Engine
from .server import SOCKET


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder")
    parser.add_argument("--runtime", type=Path, required=True, help="private folder of this server")
    parser.add_argument("--readout", type=Path, help="folder of directions")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    os.umask(0o077)
    asyncio.run(_serve(options))
    return 0


async def _serve(options: argparse.Namespace) -> None:
    ending = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ending.set)
    runtime = private_folder(options.runtime)
    # The worker takes as long to import what it needs as the model takes to load.
    async with Supervisor(runtime, checkpoint_after=None, threads=1) as supervisor:
        lm, readout = _loaded(options)
        engine = Engine(lm, readout)
        with (
            export_weights(lm.model, runtime / "weights.json", model_name=options.model),
            listening(runtime / SOCKET, engine, supervisor),
        ):
            engine.start()
            await ending.wait()
            engine.stop()
            # What no checkpoint has is written while the weights are still there.
            await supervisor.stop()


def _loaded(options: argparse.Namespace) -> tuple[LanguageModel, Readout | None]:
    # As it is kept on the disk, or it could not be written back.
    dtype = AutoConfig.from_pretrained(options.model).dtype or torch.float32
    lm = load_model(options.model, dtype=dtype)
    if options.readout is None:
        return lm, None
    # Of the model that this one is a copy of, or was trained from.
    return lm, Readout.load(options.readout).fitted(lm, allow_other_model=True)


if __name__ == "__main__":
    sys.exit(main())
