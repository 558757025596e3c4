"""The lifelong comparison of methods: the same stream of facts for each, scored as they go, and a report."""

from .compare import compare_methods
from .entrants import Entrant, parse_entrant
from .report import summary
from .results import Comparison


__all__ = ["Comparison", "Entrant", "compare_methods", "parse_entrant", "summary"]
