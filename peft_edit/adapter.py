"""The edit adapter as a whole: whether it may be changed, changing it all or nothing, solving it from memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .facts import Fact
from .memory import EditMemory, EditRecord
from .report import ModuleReport
from .solve import NormalEquations, Solution, auto_penalties, solve_delta


if TYPE_CHECKING:
    from .model import EditModel


def editable_adapter(tuner: EditModel, adapter_name: str | None) -> str:
    """The adapter that is to be changed, or an error that says why it cannot be."""
    active = tuner.active_adapters
    if adapter_name is None:
        candidates = [name for name in active if name in tuner.peft_config and tuner.edit_layers(name)]
        if len(candidates) != 1:
            raise ValueError(
                f"The active adapters are {list(active)}: activate the edit adapter to change with set_adapter, or "
                "name it with adapter_name=."
            )
        adapter_name = candidates[0]
    layers = tuner.edit_layers(adapter_name)
    if not layers:
        raise ValueError(f"There is no edit adapter {adapter_name!r}; there are {sorted(tuner.peft_config)}.")
    if adapter_name not in active:
        raise ValueError(
            f"Adapter {adapter_name!r} is not active: call set_adapter({adapter_name!r}) before editing it."
        )
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise RuntimeError(
            f"Adapters are merged into the base weights ({merged[0]}): call unmerge_adapter() before editing."
        )
    if any(layer.disable_adapters for layer in layers.values()):
        raise RuntimeError("The adapters are disabled: call enable_adapter_layers() before editing.")
    if tuner.peft_config[adapter_name].memory is None:
        if any(bool(layer.get_delta(adapter_name).any()) for layer in layers.values()):
            raise RuntimeError(
                f"Adapter {adapter_name!r} has a delta but no edit memory (it was saved with save_memory=False, "
                "combined from others, or its edit_memory.* files are missing): it serves for "
                "inference; edit in a new adapter."
            )
    return adapter_name


@contextmanager
def transaction(tuner: EditModel, adapter_name: str) -> Iterator[None]:
    """Whatever goes wrong inside, deltas, memory and norm settings are as before."""
    config = tuner.peft_config[adapter_name]
    settings = (config.memory, config.norm_budget, config.norm_penalty, config.preservation_weight)
    deltas = {name: layer.get_delta(adapter_name) for name, layer in tuner.edit_layers(adapter_name).items()}
    try:
        yield
    except BaseException:
        config.memory, config.norm_budget, config.norm_penalty, config.preservation_weight = settings
        for name, layer in tuner.edit_layers(adapter_name).items():
            layer.set_delta(adapter_name, deltas[name])
        raise


@contextmanager
def base_model(tuner: EditModel) -> Iterator[nn.Module]:
    """The wrapped model as if it had no adapter of any kind."""
    layers = [module for module in tuner.model.modules() if isinstance(module, BaseTunerLayer)]
    enabled = [layer for layer in layers if not layer.disable_adapters]
    for layer in enabled:
        layer._disable_adapters = True
    try:
        yield tuner.model
    finally:
        for layer in enabled:
            layer._disable_adapters = False


def solve_module(
    tuner: EditModel, adapter_name: str, module: str, equations: NormalEquations, memory: EditMemory
) -> Solution:
    """Solves one module's delta under the adapter's penalties and budget, and puts it in place."""
    config, layer = tuner.peft_config[adapter_name], tuner.edit_layers(adapter_name)[module]
    covariance = memory.statistics.second_moments[module].to(equations.gram)
    preservation, penalty = auto_penalties(covariance, config.preservation_weight, config.norm_penalty)
    cap = None if config.norm_budget is None else config.norm_budget * layer.base_norm()
    solution = solve_delta(equations, covariance, preservation, penalty, max_norm=cap)
    layer.set_delta(adapter_name, solution.delta)
    return solution


def solve_all(tuner: EditModel, adapter_name: str, memory: EditMemory) -> None:
    """Solves every module from memory, without any search, and makes `memory` the adapter's."""
    equations = {}
    for name, layer in tuner.edit_layers(adapter_name).items():
        device = layer.get_delta(adapter_name).device
        equations[name] = memory.equations(name, layer.in_features, layer.out_features, device)
        solve_module(tuner, adapter_name, name, equations[name], memory)
    tuner.peft_config[adapter_name].memory = memory.with_equations(equations)


def module_reports(tuner: EditModel, adapter_name: str) -> list[ModuleReport]:
    """Norms and penalties as they are."""
    config = tuner.peft_config[adapter_name]
    reports = []
    for name, layer in tuner.edit_layers(adapter_name).items():
        norm = float(layer.get_delta(adapter_name).double().norm())
        base = layer.base_norm()
        preservation = penalty = float("nan")
        binding = False
        if config.memory is not None:
            covariance = config.memory.statistics.second_moments[name].double()
            preservation, penalty = auto_penalties(covariance, config.preservation_weight, config.norm_penalty)
            binding = config.norm_budget is not None and norm >= (1 - 1e-6) * config.norm_budget * base
        reports.append(ModuleReport(name, norm, norm / base, config.norm_budget, preservation, penalty, binding))
    return reports


def find_records(memory: EditMemory | None, selectors: Collection[Any]) -> list[EditRecord]:
    """The records that ids, facts or records point to.

    Raises:
        KeyError: naming what the adapter does not hold.
    """
    records = memory.records if memory is not None else ()
    by_id = {record.id: record for record in records}
    by_key = {record.key: record for record in records}
    found, missing = [], []
    for selector in selectors:
        if isinstance(selector, (Fact, EditRecord)):
            record = by_key.get(selector.key)
        else:
            record = by_id.get(selector)
        if record is None:
            missing.append(selector)
        elif record not in found:
            found.append(record)
    if missing:
        raise KeyError(
            f"The adapter holds no fact {missing[0]!r}"
            + (f" (nor {len(missing) - 1} others)" if missing[1:] else "")
            + f"; "
            f"edited_facts() lists the {len(records)} it holds, with their ids. Nothing was removed."
        )
    return found
