"""From activations to one direction per concept and layer."""

from .directions import Directions, Method, extract, method, methods
from .pooled import pooled

__all__ = ["Directions", "Method", "extract", "method", "methods", "pooled"]
