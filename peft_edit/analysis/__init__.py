"""Looking into a model before and after edits: where to edit, and what edits do to it. Plots need matplotlib."""

from .contributions import Contributions, residual_contributions
from .locating import LayerTrial, LocateReport, locate_layers
from .plots import plot_contributions, plot_norms, plot_tracing
from .tracing import POSITIONS, Tracing


__all__ = [
    "POSITIONS",
    "Contributions",
    "LayerTrial",
    "LocateReport",
    "Tracing",
    "locate_layers",
    "plot_contributions",
    "plot_norms",
    "plot_tracing",
    "residual_contributions",
]
