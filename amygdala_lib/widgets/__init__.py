"""Widgets: a model to be steered with sliders and read token by token, in a notebook."""

try:
    import ipywidgets  # noqa: F401
except ImportError as error:
    raise ImportError(
        "the widgets need ipywidgets: python -m pip install 'amygdala_lib[notebooks]'"
    ) from error

from .readout import ReadoutPanel
from .steering import SteeringPanel

__all__ = ["ReadoutPanel", "SteeringPanel"]
