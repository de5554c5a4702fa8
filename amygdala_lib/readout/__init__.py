"""Readouts: how strongly each concept shows, in texts and token by token while a model runs."""

from .live import LiveReadout
from .readout import Readout
from .sampling import Sampling
from .streaming import Reading

__all__ = ["LiveReadout", "Reading", "Readout", "Sampling"]
