"""Quality: which directions can be trusted, and what to write next."""

from .geometry import combinations, nearest, neighbour_r2
from .heads import head_differences, head_effects
from .neurons import neuron_contributions, neuron_cosines
from .report import QualityReport, quality_report
from .texts import agreement, alignment

__all__ = [
    "QualityReport",
    "agreement",
    "alignment",
    "combinations",
    "head_differences",
    "head_effects",
    "nearest",
    "neighbour_r2",
    "neuron_contributions",
    "neuron_cosines",
    "quality_report",
]
