"""Find what a language model feels like inside, read it, steer it, and train it in."""

from . import checkpoint, live
from .capture import Activations, capture
from .corpus import Corpus, load_corpus
from .directions import Directions, extract
from .errors import AmygdalaError
from .evaluate import Evaluation, evaluate
from .models import LanguageModel, load_model
from .quality import QualityReport, quality_report
from .readout import Readout
from .steering import SteeringSweep, steer, steering_sweep
from .training import Apollo, TaskVector, frozen_context_loss, ties_merge, train

__all__ = [
    "Activations",
    "AmygdalaError",
    "Apollo",
    "Corpus",
    "Directions",
    "Evaluation",
    "LanguageModel",
    "QualityReport",
    "Readout",
    "SteeringSweep",
    "TaskVector",
    "capture",
    "checkpoint",
    "evaluate",
    "extract",
    "frozen_context_loss",
    "live",
    "load_corpus",
    "load_model",
    "quality_report",
    "steer",
    "steering_sweep",
    "ties_merge",
    "train",
]
