"""Find what a language model feels like inside, read it, steer it, and train it in."""

from .capture import Activations, capture
from .corpus import Corpus, load_corpus
from .directions import Directions, extract
from .errors import AmygdalaError
from .evaluate import Evaluation, evaluate
from .models import LanguageModel, load_model
from .quality import QualityReport, quality_report
from .readout import Readout
from .steering import steer

__all__ = [
    "Activations",
    "AmygdalaError",
    "Corpus",
    "Directions",
    "Evaluation",
    "LanguageModel",
    "QualityReport",
    "Readout",
    "capture",
    "evaluate",
    "extract",
    "load_corpus",
    "load_model",
    "quality_report",
    "steer",
]
