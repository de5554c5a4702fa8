"""Push a model toward concepts while it runs, and measure what a push does."""

from .steering import steer
from .sweep import SteeringSweep
from .sweeping import steering_sweep

__all__ = ["SteeringSweep", "steer", "steering_sweep"]
