"""Small, safe, cheap changes to all the weights of a model."""

from .apollo import Apollo
from .example_files import read_examples
from .examples import Example
from .frozen_context import frozen_context_loss, token_log_probabilities
from .objectives import DPO, DPOP, ORPO, SFT, Objective
from .result import TrainingResult
from .task_vectors import TaskVector
from .ties import ties_merge
from .trainer import train

__all__ = [
    "DPO",
    "DPOP",
    "ORPO",
    "SFT",
    "Apollo",
    "Example",
    "Objective",
    "TaskVector",
    "TrainingResult",
    "frozen_context_loss",
    "read_examples",
    "ties_merge",
    "token_log_probabilities",
    "train",
]
