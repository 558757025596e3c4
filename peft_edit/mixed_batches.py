"""Batches in which each sample goes through an adapter of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .layer import EditLayer


if TYPE_CHECKING:
    from .model import EditModel


@contextmanager
def adapter_per_sample(tuner: EditModel, names: Sequence[str] | None) -> Iterator[None]:
    """Inside, edited modules and modules to save are told which adapter each sample of the input is for.

    Args:
        tuner (`EditModel`): The model with the adapters.
        names (`Sequence[str]`, *optional*): One name per sample, `"__base__"` for none; None changes nothing.

    Raises:
        ValueError: if the model is in training mode, or has no adapter of one of the names.
    """
    if names is None:
        yield
        return
    if tuner.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    layers = [module for module in tuner.modules() if isinstance(module, BaseTunerLayer)]
    known = {name for layer in layers for name in layer._all_available_adapter_names()}
    unknown = set(names) - known - {"__base__"}
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
    handles = [
        module.register_forward_pre_hook(partial(_with_adapter_names, names), with_kwargs=True)
        for module in tuner.modules()
        if isinstance(module, (EditLayer, AuxiliaryTrainingWrapper))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with_adapter_names(names: Sequence[str], _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """One name per row of the input; beam search repeats each sample."""
    beams, rest = divmod(len(args[0]), len(names))
    kwargs["adapter_names"] = names if rest else [name for name in names for _ in range(beams)]
    return args, kwargs
