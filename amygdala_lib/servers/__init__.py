"""Servers: one to try live training on, by vLLM or by a plain model, and requests to it."""

from .choice import start
from .load import Load
from .plain import start_plain
from .server import Completion, Server, connect
from .vllm import how_to_install, start_vllm

__all__ = [
    "Completion",
    "Load",
    "Server",
    "connect",
    "how_to_install",
    "start",
    "start_plain",
    "start_vllm",
]
