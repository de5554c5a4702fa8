"""Live: train, read and steer the model a server is serving from, in the server's own memory."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .attach import attach, weights_of
from .handles import Export, SharedWeights, export_weights, open_handles
from .private import private_folder

__all__ = [
    "Client",
    "Export",
    "SharedWeights",
    "attach",
    "export_weights",
    "open_handles",
    "private_folder",
    "weights_of",
]


def __getattr__(name: str) -> Any:
    """`Client` brings an HTTP library: it is imported when it is first asked for."""
    if name == "Client":
        return import_module(".client", __name__).Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
