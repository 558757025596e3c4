"""Writing adapters, all files at once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..memory import MEMORY_FILES
from .saving import write_directory


ADAPTER_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, *MEMORY_FILES)
CARD = "README.md"


def save_adapter(model: Any, output: Path) -> None:
    """Writes the adapter with its memory and card in place of the one that the directory may hold.

    What the user has added to the card stays, and so do other files.

    Raises:
        OSError: if the directory cannot be written; it is as before then.
    """

    def write(staged: Path) -> None:
        if (output / CARD).is_file():
            shutil.copy2(output / CARD, staged / CARD)
        model.save_pretrained(str(staged))

    write_directory(output, write, stale=ADAPTER_FILES)
