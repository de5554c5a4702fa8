"""Evaluation: how well directions tell texts apart that they were not made of."""

from .dose import dose_test, load_doses
from .evaluate import evaluate
from .evaluation import Evaluation, Recommendation
from .figures import auroc, average_precision
from .scores import separation

__all__ = [
    "Evaluation",
    "Recommendation",
    "auroc",
    "average_precision",
    "dose_test",
    "evaluate",
    "load_doses",
    "separation",
]
