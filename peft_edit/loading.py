"""Checks on an adapter's weights, whatever file or Hub they come from, before any of them reaches the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .fingerprint import check_fingerprint, is_quantised, model_fingerprint
from .layer import EditLinear, delta_norm, same_norm, unwrapped_name


if TYPE_CHECKING:
    from .config import EditConfig
    from .memory import EditMemory


def check_adapter_weights(model: nn.Module, config: EditConfig, adapter_name: str, state_dict: dict[str, Any]) -> None:
    """Names, shapes, dtype, finiteness, and the base model that the edit memory names.

    Args:
        model: The PEFT model (or a model with injected adapters).
        config: The adapter's config, with its edit memory if it has one.
        adapter_name: The adapter that is being loaded.
        state_dict: Its tensors under the model's own names.

    Raises:
        ValueError: saying which tensor is wrong, and how.
    """
    layers = {
        f"{name}.edit_delta.{adapter_name}.weight": (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, EditLinear) and adapter_name in layer.edit_delta
    }
    remedy = "fetch or save the adapter again, or load it on the base model that it was made for."
    for key, (_, layer) in layers.items():
        tensor = state_dict.get(key)
        if tensor is None:
            raise ValueError(f"The adapter file lacks the tensor '{key}': {remedy}")
        if tuple(tensor.shape) != (layer.out_features, layer.in_features):
            raise ValueError(
                f"The adapter file's '{key}' has shape {tuple(tensor.shape)}, this model needs "
                f"{(layer.out_features, layer.in_features)}: {remedy}"
            )
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"The adapter file's '{key}' holds values that are not finite numbers: {remedy}")
    extra = [key for key in state_dict if ".edit_" in key and key not in layers]
    if extra:
        raise ValueError(f"The adapter file holds '{extra[0]}', which this model has no place for: {remedy}")
    by_module = {unwrapped_name(name.removeprefix("base_model.model.")): layer for name, layer in layers.values()}
    expected: Mapping[str, Any] | None = config.base_fingerprint
    if config.memory is not None:
        expected = config.memory.statistics.fingerprint
        missing = [name for name in config.memory.statistics.second_moments if name not in by_module]
        if missing:
            raise ValueError(f"The edit memory is about '{missing[0]}', which this adapter does not edit: {remedy}")
        _check_solved(config.memory, {key: unwrapped_name(name) for key, (name, _) in layers.items()}, state_dict)
    if expected is not None:
        root = (
            model.get_submodule("base_model.model")
            if hasattr(model, "base_model") and layers and next(iter(layers)).startswith("base_model.model.")
            else model
        )
        actual = model_fingerprint(root, list(by_module))
        check_fingerprint(expected, actual, "The edits of this adapter", quantised=is_quantised(root))


def _check_solved(memory: EditMemory, modules: Mapping[str, str], state_dict: Mapping[str, torch.Tensor]) -> None:
    """Raises a ValueError if the deltas are not those that the edit memory was solved to."""
    for key, name in modules.items():
        solved, tensor = memory.delta_norms.get(name.removeprefix("base_model.model.")), state_dict[key]
        if len(memory) and solved is not None and not same_norm(delta_norm(tensor), solved, tensor.dtype):
            raise ValueError(
                f"The adapter file's '{key}' has the norm {delta_norm(tensor):.4g}, and the adapter's edit memory was "
                f"solved to {solved:.4g}: they are not of the same edits. Load the file with the edit memory that it "
                "was saved with, into an adapter of its own (adapter_name=)."
            )
