"""Loading: a base model with its tokenizer, and an adapter on top of it."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME

from ..tiny import is_bundled, tiny_model_path
from .errors import CliError, UsageError, explain_hub
from .saving import finish_save
from .sources import is_repository


TINY = "tiny"
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelChoice:
    """Which base model, and how to load it.

    Args:
        name (`str`): A directory, the id of a repository on the Hub, or `tiny` for the bundled model.
        dtype (`str`): One of `DTYPES`; auto: as it was saved, but no float16 on a CPU.
        device (`str`, *optional*): As torch calls it, or `auto` to spread the model over all there are; by default
            the first GPU, else the CPU.
        revision (`str`, *optional*): Of the repository.
        trust_remote_code (`bool`): Run the repository's own model code.
    """

    name: str
    dtype: str = "auto"
    device: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    @classmethod
    def of(cls, args: argparse.Namespace, name: str) -> ModelChoice:
        """As the command line has it."""
        return cls(name, args.dtype, args.device, args.revision, args.trust_remote_code)

    @property
    def source(self) -> str:
        """What `from_pretrained` takes."""
        return str(tiny_model_path()) if self.name == TINY and not Path(self.name).exists() else self.name


def load_base(choice: ModelChoice) -> tuple[Any, Any]:
    """The base model in eval mode, and its tokenizer.

    Raises:
        CliError: if there is no such model, the Hub does not give it, or it is an adapter.
        UsageError: if there is no such device.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = choose_device(choice.device)
    source = choice.source
    _check_source(source)
    settings: dict[str, Any] = {"revision": choice.revision, "trust_remote_code": choice.trust_remote_code}
    placed = {"device_map": "auto"} if device is None else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **settings)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=_dtype(choice.dtype), **placed, **settings)
    except Exception as error:  # transformers raises whatever it meets
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = explain_hub(error, source, choice.revision) or str(error).strip().split("\n", 1)[0]
        raise CliError(f"The model '{choice.name}' cannot be loaded: {reason}") from error
    if device is not None and device.type == "cpu" and choice.dtype == "auto" and model.dtype == torch.float16:
        model = model.float()
    return (model if device is None else model.to(device)).eval(), tokenizer


def _check_source(source: str) -> None:
    path = Path(source)
    if path.is_dir():
        if (path / "config.json").is_file():
            return
        if (path / CONFIG_NAME).is_file():
            raise CliError(f"'{source}' is an adapter, and its base model is needed here: give that.")
        raise CliError(f"'{source}' is no model: the directory has no config.json.")
    if path.is_file() or not (is_repository(source) or ("/" not in source and source.strip())):
        raise CliError(
            f"There is no model '{source}': give a directory, the id of a repository on the Hub, or '{TINY}' for the "
            "bundled model."
        )


def choose_device(name: str | None) -> torch.device | None:
    """The device of that name; None to leave it to accelerate.

    Raises:
        UsageError: if this machine has no such device.
    """
    if name == "auto":
        return None
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"There is no device '{name}' here ({str(error).splitlines()[0]}).") from error
    return device


def _dtype(name: str) -> Any:
    return name if name == "auto" else getattr(torch, name)


# --- adapters ----------------------------------------------------------------------------------------------------


def adapter_folder(name: str, revision: str | None = None) -> Path:
    """The local directory of an adapter, fetched from the Hub where it is not one.

    Raises:
        CliError: if there is none, or it is no edit adapter.
    """
    path = Path(name)
    if path.is_dir():
        finish_save(path)
        folder = path
    elif is_repository(name) and not path.exists():
        from ..hub import fetch_edits

        folder = fetch_edits(name, revision=revision)
    else:
        raise CliError(
            f"There is no adapter '{name}': give the directory of one, or the id of a repository on the Hub."
        )
    read_adapter_config(folder, name)
    return folder


def read_adapter_config(folder: Path, name: str | None = None) -> dict[str, Any]:
    """`adapter_config.json` of an edit adapter.

    Raises:
        CliError: if it is missing, damaged, or of another kind of adapter.
    """
    name = str(folder) if name is None else name
    path = folder / CONFIG_NAME
    if not path.is_file():
        hint = " It holds checkpoints of a run: `peft-edit edit --resume` finishes it." if _has_run(folder) else ""
        raise CliError(f"'{name}' is not an adapter: it has no {CONFIG_NAME}.{hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise CliError(f"'{path}' is damaged ({error}): fetch or save the adapter again.") from error
    if kind != "EDIT":
        raise CliError(f"'{name}' is not an edit adapter, its peft_type is {kind!r}.")
    return config


def _has_run(folder: Path) -> bool:
    from ..checkpoints import find_checkpoint

    return find_checkpoint(folder) is not None


def base_name(folder: Path, given: str | None) -> str:
    """The base model to load: the one given, else the one that the adapter names.

    Raises:
        CliError: if neither is there.
    """
    if given is not None:
        return given
    name = read_adapter_config(folder).get("base_model_name_or_path")
    if not name:
        raise CliError(f"The adapter '{folder}' does not say what its base model is: give --model.")
    if is_bundled(name):
        return TINY
    if not Path(name).is_dir() and not is_repository(name) and "/" in name:
        raise CliError(f"The adapter's base model '{name}' is not here: say where it is with --model.")
    return name


def load_adapter(folder: Path, args: argparse.Namespace) -> tuple[PeftModel, Any]:
    """A base model that carries the adapter, and its tokenizer.

    Raises:
        CliError: if either cannot be loaded.
        ValueError: if the adapter is damaged, or of another model.
    """
    base, tokenizer = load_base(ModelChoice.of(args, base_name(folder, args.model)))
    return put_adapter(base, folder), tokenizer


def put_adapter(base: Any, folder: Path) -> PeftModel:
    """The base model with the adapter of a directory."""
    from ..config import EditConfig

    config = EditConfig.from_pretrained(str(folder))
    try:
        return PeftModel.from_pretrained(base, str(folder), config=config).eval()
    except (RuntimeError, ValueError) as error:
        raise CliError(f"The adapter '{folder}' does not go on this base model: {error}") from error
