"""Plots: functions of arrays and frames that return the figure, at 20 concepts and at 200."""

from .affect import affect_plane
from .checkpoint import change_by_component, change_map, delta_sizes
from .components import head_map, neuron_bars
from .corpus import concept_counts, text_lengths
from .evaluation import (
    auroc_forest,
    cluster_confusion,
    dose_curves,
    hard_negatives,
    method_by_layer,
)
from .live import served_training
from .quality import quality_overview
from .readout import coloured_tokens, top_states
from .similarity import layer_likeness, similarity_clustermap, similarity_heatmap
from .spectrum import eigenvalue_spectra
from .steering import side_effects, steering_depth, steering_dose
from .style import DIVERGING, MANY, SEQUENTIAL
from .tokens import token_heatmap
from .training import gradient_map, part_bars, training_curves
from .validation import method_comparison, projections, separation_by_layer

__all__ = [
    "DIVERGING",
    "MANY",
    "SEQUENTIAL",
    "affect_plane",
    "auroc_forest",
    "change_by_component",
    "change_map",
    "cluster_confusion",
    "coloured_tokens",
    "concept_counts",
    "delta_sizes",
    "dose_curves",
    "eigenvalue_spectra",
    "gradient_map",
    "hard_negatives",
    "head_map",
    "layer_likeness",
    "method_by_layer",
    "method_comparison",
    "neuron_bars",
    "part_bars",
    "projections",
    "quality_overview",
    "separation_by_layer",
    "served_training",
    "side_effects",
    "similarity_clustermap",
    "similarity_heatmap",
    "steering_depth",
    "steering_dose",
    "text_lengths",
    "token_heatmap",
    "top_states",
    "training_curves",
]
