"""The command line: `peft-edit`, or `python -m peft_edit`."""

from .main import main


__all__ = ["main"]
