"""Checkpoints of a lifelong run: whole directories, each a loadable adapter, that appear at once or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file

from .config import EditConfig
from .files import sync_directory
from .memory import EditMemory


if TYPE_CHECKING:
    from .model import EditModel


STATE_JSON = "run_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class RunState:
    """How far a run has come.

    Args:
        facts (`int`): Facts read from the stream.
        digest (`str`): What they were.
        batch_size (`int`): Facts per batch.
    """

    facts: int
    digest: str
    batch_size: int


def find_checkpoint(directory: str | os.PathLike) -> Path | None:
    """The newest checkpoint in a run's directory."""
    folder = Path(directory)
    found = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return max(found, key=_number, default=None)


def save_checkpoint(
    config: EditConfig, deltas: dict[str, torch.Tensor], directory: str | os.PathLike, state: RunState
) -> Path:
    """Writes the adapter as `checkpoint-<facts>` and removes the checkpoints before it.

    It is written beside its place, flushed to disk and renamed, so that a run killed at any point leaves a whole one.

    Args:
        config (`EditConfig`): The adapter's settings, with its memory.
        deltas (`dict[str, torch.Tensor]`): By module.
        directory (`str`): The run's directory.
        state (`RunState`): How far the run has come.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    before = find_checkpoint(folder)
    target, unfinished = folder / f"checkpoint-{state.facts}", folder / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    config.save_pretrained(str(unfinished))
    weights = {_weight_key(name): delta.contiguous().cpu() for name, delta in deltas.items()}
    save_file(weights, unfinished / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    (unfinished / STATE_JSON).write_text(json.dumps(asdict(state)) + "\n")
    for path in unfinished.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    sync_directory(unfinished)
    if target.exists():  # the same facts again, of a run that was resumed at its end
        shutil.rmtree(target)
    os.replace(unfinished, target)
    sync_directory(folder)
    if before is not None and before != target:
        shutil.rmtree(before)
    return target


def read_state(checkpoint: Path) -> RunState:
    """How far the run of a checkpoint had come.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        return RunState(**json.loads((checkpoint / STATE_JSON).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"The checkpoint '{checkpoint}' cannot be resumed ({error}): remove it.") from error


def load_checkpoint(tuner: EditModel, adapter_name: str, checkpoint: Path) -> None:
    """Puts a checkpoint's deltas and memory in place.

    Raises:
        ValueError: if it is damaged, or of another adapter.
    """
    memory = EditMemory.load(checkpoint)
    weights = load_file(checkpoint / SAFETENSORS_WEIGHTS_NAME)
    layers = tuner.edit_layers(adapter_name)
    for name, layer in layers.items():
        delta = weights.get(_weight_key(name))
        if delta is None or delta.shape != layer.get_delta(adapter_name).shape:
            raise ValueError(f"The checkpoint '{checkpoint}' is of an adapter with other modules than '{name}'.")
    memory.statistics.check(tuner.model, list(layers))
    for name, layer in layers.items():
        layer.set_delta(adapter_name, weights[_weight_key(name)])
    tuner.peft_config[adapter_name].memory = memory


def _weight_key(module: str) -> str:
    """What PEFT calls a module's delta in an adapter file."""
    return f"base_model.model.{module}.edit_delta.weight"


def _number(path: Path) -> int:
    return int(path.name.rsplit("-", 1)[1])
