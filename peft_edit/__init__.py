"""Lifelong knowledge editing as a PEFT adapter. Importing the package registers the PEFT type "EDIT"."""

from .collecting import collect_statistics
from .config import EditConfig
from .export import ExportedModule, LoraExport, export_lora
from .facts import Fact, FactError, as_facts
from .hub import extend_peft_model, fetch_edits
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
    "ExportedModule",
    "Fact",
    "FactError",
    "KeyStatistics",
    "LoraExport",
    "as_facts",
    "collect_statistics",
    "export_lora",
    "fetch_edits",
]

register(EditConfig, EditModel, EditModel.prefix)
extend_peft_model()
