"""From activations to one direction per concept and layer."""

from .aggregators import logistic, logistic_l1, mean, pca
from .centred import centred
from .directions import Directions
from .extraction import Method, Spectral, extract, method, methods, text_means
from .linear import linear
from .paired import paired
from .pooled import mean_differences, membership, pooled
from .subspace import subspace

__all__ = [
    "Directions",
    "Method",
    "Spectral",
    "centred",
    "extract",
    "linear",
    "logistic",
    "logistic_l1",
    "mean",
    "mean_differences",
    "membership",
    "method",
    "methods",
    "paired",
    "pca",
    "pooled",
    "subspace",
    "text_means",
]
