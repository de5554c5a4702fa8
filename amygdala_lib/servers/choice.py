"""Choice: a server by whatever is installed."""

from __future__ import annotations

from pathlib import Path

from ..errors import LiveError
from .plain import start_plain
from .server import Server
from .vllm import how_to_install, start_vllm

ENGINES = ("auto", "plain", "vllm")


def start(model: Path | str, readout: Path | str | None = None, engine: str = "auto") -> Server:
    """Serve a model folder from processes of their own, until `close`.

    engine: "vllm", "plain", a Hugging Face model that answers the same requests, or "auto": vLLM,
    and where that is not installed, plain, after printing how it is. readout: the folder of what is
    read and steered with. Raises LiveError if the server does not start.
    """
    if engine not in ENGINES:
        raise LiveError(f"engine is {engine!r}: choose one of {', '.join(ENGINES)}")
    if engine == "auto":
        lacking = how_to_install(model)
        engine = "plain" if lacking else "vllm"
        if lacking:
            print(f"{lacking}. Until then: a plain Hugging Face model in a process of its own.")
    return (start_vllm if engine == "vllm" else start_plain)(model, readout)
