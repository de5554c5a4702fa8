"""A behaviour from paired answers: its direction, whether it reads, and whether it steers."""

from .direction import behaviour_directions
from .evaluation import BehaviourEvaluation, evaluate_behaviour
from .pairs import Behaviour, Pair, Turn, load_behaviour, rendered
from .reading import log_probabilities, read_answers
from .steering import BehaviourSteering, steering_check

__all__ = [
    "Behaviour",
    "BehaviourEvaluation",
    "BehaviourSteering",
    "Pair",
    "Turn",
    "behaviour_directions",
    "evaluate_behaviour",
    "load_behaviour",
    "log_probabilities",
    "read_answers",
    "rendered",
    "steering_check",
]
