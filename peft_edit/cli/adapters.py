"""An adapter as it lies on disk: ledger and norms, read without any model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..memory import MEMORY_FACTS, MEMORY_JSON, EditMemory, EditRecord
from ..statistics import STATISTICS_JSON
from .errors import CliError
from .models import read_adapter_config


_PREFIX, _SUFFIX = "base_model.model.", ".edit_delta.weight"


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter's directory says.

    Args:
        folder (`Path`): The directory.
        config (`dict`): `adapter_config.json`.
        records (`tuple[EditRecord, ...]`, *optional*): The facts, oldest first; None without an edit memory.
        batches (`int`): Batches written so far.
        statistics (`dict`): Of the key statistics: tokens, source, fingerprint of the base model.
    """

    folder: Path
    config: dict[str, Any]
    records: tuple[EditRecord, ...] | None
    batches: int
    statistics: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> AdapterFiles:
        """Reads the small files; the tensors stay where they are.

        Raises:
            CliError: if a file is missing or damaged.
        """
        config = read_adapter_config(folder)
        if not (folder / MEMORY_JSON).is_file():
            return cls(folder, config, None, 0, {})
        try:
            about = json.loads((folder / MEMORY_JSON).read_text(encoding="utf-8"))
            lines = (folder / MEMORY_FACTS).read_text(encoding="utf-8").split("\n")
            records = tuple(EditRecord(**json.loads(line)) for line in lines if line.strip())
            statistics = json.loads((folder / STATISTICS_JSON).read_text(encoding="utf-8"))
            count, batches = int(about["facts"]), int(about["batches"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CliError(
                f"The edit memory in '{folder}' is damaged ({error}): fetch or save the adapter again."
            ) from error
        if count != len(records):
            raise CliError(
                f"The edit memory in '{folder}' is damaged ({MEMORY_FACTS} has {len(records)} facts where "
                f"{MEMORY_JSON} counts {count}): fetch or save the adapter again."
            )
        return cls(folder, config, records, batches, statistics)

    def held(self) -> tuple[EditRecord, ...]:
        """The facts.

        Raises:
            CliError: if the adapter has no edit memory.
        """
        if self.records is None:
            raise CliError(
                f"The adapter '{self.folder}' has no edit memory (it was saved with save_memory=False, or its "
                "edit_memory.* files are missing): which facts it holds is not known."
            )
        return self.records

    def deltas(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Module names and deltas, (d_out, d_in), one at a time.

        Raises:
            CliError: if the file is missing or damaged.
        """
        path = self.folder / SAFETENSORS_WEIGHTS_NAME
        try:
            with safe_open(path, framework="pt") as file:
                for key in sorted(file.keys(), key=_numbers):
                    if key.endswith(_SUFFIX):
                        yield key.removeprefix(_PREFIX).removesuffix(_SUFFIX), file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CliError(f"'{path}' cannot be read ({error}): fetch or save the adapter again.") from error

    def norms(self) -> dict[str, float]:
        """||Δ||_F of each module."""
        return {name: float(delta.double().norm()) for name, delta in self.deltas()}

    def check(self) -> None:
        """Reads every file whole.

        Raises:
            CliError, ValueError: naming the file that is damaged, and how.
        """
        for name, delta in self.deltas():
            if not bool(delta.isfinite().all()):
                raise CliError(f"The delta of '{name}' in '{self.folder}' holds values that are not finite numbers.")
        if self.records is not None:
            EditMemory.load(self.folder)


def _numbers(key: str) -> tuple[list[int], str]:
    """Sorts module names by block, not by letter."""
    return [int(part) for part in key.split(".") if part.isdigit()], key
