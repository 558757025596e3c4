"""Lifelong knowledge editing as a PEFT adapter. Importing the package registers the PEFT type "EDIT"."""

from .collecting import collect_statistics
from .config import EditConfig
from .facts import Fact, FactError, as_facts
from .layer import EditLayer, EditLinear
from .memory import EditMemory, EditRecord
from .model import EditModel
from .register import EDIT, register
from .report import EditReport
from .statistics import KeyStatistics


__version__ = "0.1.0"

__all__ = [
    "EDIT",
    "EditConfig",
    "EditLayer",
    "EditLinear",
    "EditMemory",
    "EditModel",
    "EditRecord",
    "EditReport",
    "Fact",
    "FactError",
    "KeyStatistics",
    "as_facts",
    "collect_statistics",
]

register(EditConfig, EditModel, EditModel.prefix)
