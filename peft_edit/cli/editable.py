"""A model ready to be edited: a new adapter with the settings asked for, or one that goes on; and key statistics."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model

from ..statistics import KeyStatistics
from .arguments import config_fields, make_config
from .errors import CliError, UsageError, explain_hub
from .models import put_adapter, read_adapter_config
from .output import Output
from .sources import is_repository, read_texts


# What an adapter with facts may still change; all else is part of what its facts were written with.
CHANGEABLE = (
    "norm_budget",
    "norm_penalty",
    "early_stopping",
    "joint_search",
    "mpes_extra_steps",
    "refinements",
    "sufficient_probability",
    "save_memory",
    "search_steps",
    "search_optimizer",
    "search_lr",
    "search_patience",
    "search_weight_decay",
    "search_kl_weight",
    "search_max_norm",
)


def editable_model(base: Any, folder: Path | None, method: str | None, settings: dict[str, Any]) -> PeftModel:
    """The base model with an adapter to edit.

    Args:
        base: The base model.
        folder (`Path`, *optional*): The adapter to go on with.
        method (`str`, *optional*): A preset, for a new adapter.
        settings (`dict`): Fields of `EditConfig`.

    Raises:
        UsageError: if settings cannot be, or the adapter cannot change them.
        CliError: if the adapter does not go on this model.
        ValueError: if modules or layers do not fit the model.
    """
    if folder is None:
        return get_peft_model(base, make_config(method, settings)).eval()
    if method is not None:
        raise UsageError("--method is for a new adapter; --adapter goes on with the method that it began with.")
    fixed = sorted(set(settings) - set(CHANGEABLE))
    if fixed:
        raise UsageError(
            f"--set {fixed[0]}: an adapter keeps what it was made with; with --adapter only {', '.join(CHANGEABLE)} "
            "can be changed."
        )
    make_config(None, settings)
    model = put_adapter(base, folder)
    config: Any = model.peft_config[model.active_adapter]
    if config.memory is None:
        raise CliError(
            f"The adapter '{folder}' has no edit memory, so it cannot be edited on: it serves for inference; make a "
            "new adapter."
        )
    for name, value in settings.items():
        if name not in ("norm_budget", "norm_penalty"):
            setattr(config, name, value)
    if "norm_budget" in settings:
        model.set_norm_budget(settings["norm_budget"])
    if "norm_penalty" in settings:
        model.set_norm_penalty(settings["norm_penalty"])
    return model


def check_same_settings(model: Any, checkpoint: Path) -> None:
    """Whether a run would be resumed under the settings that it began with.

    Raises:
        CliError: naming the first that differs.
    """
    saved = read_adapter_config(checkpoint)
    config = model.peft_config[model.active_adapter]
    for name in sorted(config_fields() & set(saved)):
        then, now = _comparable(saved[name]), _comparable(getattr(config, name))
        if then != now:
            raise CliError(
                f"The run in '{checkpoint.parent}' was begun with {name}={then!r}, not {now!r}: resume it with the "
                "same settings, or drop it (--overwrite)."
            )


def _comparable(value: Any) -> Any:
    return sorted(value) if isinstance(value, (list, tuple, set)) else value


def check_statistics_named(args: argparse.Namespace) -> None:
    """Whether there is what `--statistics` or `--statistics-text` names, before a model is loaded.

    Raises:
        CliError: if there is not.
    """
    if args.statistics is not None and not Path(args.statistics).is_dir() and not is_repository(args.statistics):
        raise CliError(
            f"There are no key statistics '{args.statistics}': give the directory that `peft-edit stats` wrote."
        )
    if args.statistics_text is not None:
        read_texts(args.statistics_text)


def given_statistics(model: Any, tokenizer: Any, args: argparse.Namespace, out: Output) -> KeyStatistics | None:
    """The key statistics that were asked for; None to use the adapter's own, or samples.

    Raises:
        CliError: if they cannot be fetched.
        ValueError: if they are damaged, or of another model.
    """
    if args.statistics is not None:
        return load_statistics(args.statistics)
    if args.statistics_text is not None:
        out.note(f"Collecting key statistics from '{args.statistics_text}'.")
        texts = read_texts(args.statistics_text)
        return model.collect_statistics(texts, tokenizer, source=args.statistics_text, progress=out.progress)
    if model.peft_config[model.active_adapter].memory is None:
        out.note(
            "Note: no key statistics were given, so text is sampled from the model itself; ordinary text "
            "(--statistics-text FILE) spares other knowledge better."
        )
    return None


def load_statistics(name: str) -> KeyStatistics:
    """Key statistics of a directory or a repository on the Hub.

    Raises:
        CliError: if they cannot be fetched.
        ValueError: if they are damaged.
    """
    try:
        return KeyStatistics.from_pretrained(name)
    except OSError as error:
        reason = explain_hub(error, name)
        raise CliError(f"The key statistics '{name}' cannot be fetched: {reason or error}") from error
