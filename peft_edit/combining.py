"""Adapters out of adapters: weighted sums of deltas, and edit memories that are joined and solved together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING

import torch

from .adapter import solve_all
from .memory import EditMemory


if TYPE_CHECKING:
    from .model import EditModel


def combine(
    tuner: EditModel, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str
) -> None:
    """See `EditModel.add_weighted_adapter`."""
    for name in adapters:
        if name not in tuner.peft_config:
            raise ValueError(f"Adapter {name} does not exist")
    if adapter_name in tuner.peft_config:
        raise ValueError(f"There is an adapter {adapter_name!r} already; choose another name for the combination.")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"Each adapter needs a weight, got {len(adapters)} adapters and {len(weights)} weights.")
    if combination_type not in ("linear", "memory"):
        raise ValueError(f"combination_type must be 'linear' or 'memory', got {combination_type!r}.")
    modules = [set(tuner.edit_layers(name)) for name in adapters]
    if any(names != modules[0] for names in modules):
        raise ValueError(f"The adapters {adapters} edit different modules and cannot be combined.")
    memory = joined_memory(tuner, adapters, weights) if combination_type == "memory" else None
    tuner.peft_config[adapter_name] = tuner.peft_config[adapters[0]].without_facts()
    try:
        tuner.inject_adapter(tuner.model, adapter_name)
        if memory is not None:
            solve_all(tuner, adapter_name, memory)
            return
        for layer in tuner.edit_layers(adapter_name).values():
            scaled = [weight * layer.get_delta(name) for name, weight in zip(adapters, weights)]
            layer.set_delta(adapter_name, torch.stack(scaled).sum(0))
    except BaseException:
        tuner.delete_adapter(adapter_name)
        raise


def joined_memory(tuner: EditModel, adapters: Sequence[str], weights: Sequence[float]) -> EditMemory:
    """One memory with the facts of all adapters.

    Raises:
        ValueError: if a weight is not 1, an adapter has no memory, or two memories cannot be joined.
    """
    if any(weight != 1 for weight in weights):
        raise ValueError("Edit memories add up with weights of 1 only; use combination_type='linear' for others.")
    memories = {name: tuner.peft_config[name].memory for name in adapters}
    for name, memory in memories.items():
        if memory is None:
            raise ValueError(f"Adapter {name!r} has no edit memory to join; use combination_type='linear'.")
    return reduce(EditMemory.union, memories.values())
