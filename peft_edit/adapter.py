"""The edit adapter as a whole: whether it may be changed, changing it all or nothing, solving it from memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .devices import free_memory
from .facts import Fact, as_facts
from .layer import delta_norm, same_norm
from .memory import EditMemory, EditRecord
from .report import ModuleReport
from .running import Penalties
from .sharded import check_started
from .solve import auto_penalties, solve_dtype
from .updates import ModuleSolution, Task


if TYPE_CHECKING:
    from .model import EditModel


def named_adapter(tuner: EditModel, adapter_name: str | None) -> str:
    """The edit adapter of that name, by default the active one; or an error that says why there is none."""
    active = tuner.active_adapters
    if adapter_name is None:
        candidates = [name for name in active if name in tuner.peft_config and tuner.edit_layers(name)]
        if len(candidates) != 1:
            raise ValueError(
                f"The active adapters are {list(active)}: activate the edit adapter with set_adapter, or "
                "name it with adapter_name=."
            )
        adapter_name = candidates[0]
    if not tuner.edit_layers(adapter_name):
        raise ValueError(f"There is no edit adapter {adapter_name!r}; there are {sorted(tuner.peft_config)}.")
    if not hasattr(tuner.peft_config[adapter_name], "memory"):
        raise ValueError(
            f"Adapter {adapter_name!r} shares its name with another adapter, whose config has taken the place of the "
            "edit's: load the edits under a name of their own (adapter_name=)."
        )
    return adapter_name


def editable_adapter(tuner: EditModel, adapter_name: str | None) -> str:
    """The adapter that is to be changed, or an error that says why it cannot be."""
    adapter_name = named_adapter(tuner, adapter_name)
    layers = tuner.edit_layers(adapter_name)
    if adapter_name not in tuner.active_adapters:
        raise ValueError(
            f"Adapter {adapter_name!r} is not active: call set_adapter({adapter_name!r}) before editing it."
        )
    check_started(tuner.model)
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise RuntimeError(
            f"Adapters are merged into the base weights ({merged[0]}): call unmerge_adapter() before editing."
        )
    if any(layer.disable_adapters for layer in layers.values()):
        raise RuntimeError("The adapters are disabled: call enable_adapter_layers() before editing.")
    _check_delta(tuner, adapter_name)
    return adapter_name


def _check_delta(tuner: EditModel, adapter_name: str) -> None:
    """Raises a RuntimeError if the delta is not what the edit memory was solved to: the next edit would lose it."""
    memory, norms = tuner.peft_config[adapter_name].memory, delta_norms(tuner, adapter_name)
    if memory is None and any(norms.values()):
        raise RuntimeError(
            f"Adapter {adapter_name!r} has a delta but no edit memory (it was saved with save_memory=False, "
            "combined from others, or its edit_memory.* files are missing): it serves for "
            "inference; edit in a new adapter."
        )
    if memory is None or (len(memory) and not memory.delta_norms):  # the latter from files of the first release
        return
    for name, layer in tuner.edit_layers(adapter_name).items():
        solved = memory.delta_norms.get(name, 0.0) if len(memory) else 0.0
        if not same_norm(norms[name], solved, layer.get_delta(adapter_name).dtype):
            raise RuntimeError(
                f"Adapter {adapter_name!r} has a delta that is not the solution of its edit memory of {len(memory)} "
                f"facts ('{name}': norm {norms[name]:.4g} instead of {solved:.4g}): it was trained, or loaded or set "
                "from elsewhere, and editing would lose it. Load the adapter again with PeftModel.from_pretrained, or "
                "edit in a new one."
            )


def delta_norms(tuner: EditModel, adapter_name: str) -> dict[str, float]:
    """||Δ||_F by module."""
    return {name: delta_norm(layer.get_delta(adapter_name)) for name, layer in tuner.edit_layers(adapter_name).items()}


def check_counts(**counts: tuple[Any, int]) -> None:
    """Raises a ValueError if a count is no whole number, or below its least value; name=(value, least)."""
    for name, (value, least) in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}.")


@contextmanager
def transaction(tuner: EditModel, adapter_name: str) -> Iterator[None]:
    """Whatever goes wrong inside, deltas, memory and norm settings are as before."""
    config = tuner.peft_config[adapter_name]
    settings = (config.memory, config.norm_budget, config.norm_penalty, config.preservation_weight)
    deltas = {name: layer.get_delta(adapter_name) for name, layer in tuner.edit_layers(adapter_name).items()}
    try:
        with torch.inference_mode(False):  # what is kept must be usable outside of it
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


def module_solution(tuner: EditModel, adapter_name: str, module: str, memory: EditMemory) -> ModuleSolution:
    """One module's solution for all pairs of `memory`, by the adapter's update rule, penalties and budget."""
    config, layer = tuner.peft_config[adapter_name], tuner.edit_layers(adapter_name)[module]
    covariance = memory.statistics.second_moments[module]
    preservation, penalty = auto_penalties(covariance, config.preservation_weight, config.norm_penalty)
    cap = None if config.norm_budget is None else config.norm_budget * layer.base_norm()
    shape = (layer.in_features, layer.out_features)
    device, store = memory.solver_devices(module) or solver_devices(layer.get_delta(adapter_name).device, *shape)
    task = Task(
        Penalties(covariance, preservation, penalty, cap),
        layer.base_matrix,
        layer.out_features,
        device,
        store,
        solve_dtype(device),
    )
    return config.update_rule().solution(memory, module, task)


def solver_devices(device: torch.device, d_in: int, d_out: int) -> tuple[torch.device, torch.device]:
    """Where to solve a module and where to keep its normal equations between factorisations.

    On its own device while there is room for a factorisation: six float64 matrices of d_in × d_in (the last factor and
    equations, and the equations, covariance or system, and factor of the next) and as many of d_out × d_in. The
    equations stay there too while that leaves half of the free memory; else they wait on the CPU and are streamed in
    for each factorisation. Short of that all is on the CPU.
    """
    if device.type != "cuda":
        return device, device
    free, needed = free_memory(device), 8 * 6 * d_in * (d_in + d_out)
    cpu = torch.device("cpu")
    if needed > free:
        return cpu, cpu
    return device, device if 2 * needed <= free else cpu


def solve_all(tuner: EditModel, adapter_name: str, memory: EditMemory) -> None:
    """Solves every module from memory, without any search, and makes `memory` the adapter's."""
    solutions = {}
    for name, layer in tuner.edit_layers(adapter_name).items():
        solution = module_solution(tuner, adapter_name, name, memory)
        layer.set_delta(adapter_name, solution.delta)
        solutions[name] = solution.kept
    memory = memory.with_solutions(solutions)
    tuner.peft_config[adapter_name].memory = memory.with_delta_norms(delta_norms(tuner, adapter_name))


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
            covariance = config.memory.statistics.second_moments[name]
            preservation, penalty = auto_penalties(covariance, config.preservation_weight, config.norm_penalty)
            binding = config.norm_budget is not None and norm >= (1 - 1e-6) * config.norm_budget * base
        reports.append(ModuleReport(name, norm, norm / base, config.norm_budget, preservation, penalty, binding))
    return reports


def find_records(memory: EditMemory | None, selectors: Collection[Any]) -> list[EditRecord]:
    """The records that ids, facts or records point to.

    Raises:
        KeyError: naming what the adapter does not hold.
        TypeError: if a selector is none.
    """
    records = memory.records if memory is not None else ()
    by_id = {record.id: record for record in records}
    by_key = {record.key: record for record in records}
    found, missing = [], []
    for selector in selectors:
        if isinstance(selector, Mapping):
            (selector,) = as_facts([selector])
        if isinstance(selector, (Fact, EditRecord)):
            record = by_key.get(selector.key)
        elif isinstance(selector, str):
            record = by_id.get(selector)
        else:
            raise TypeError(
                f"A fact to remove is named by its id, a Fact, a mapping or an EditRecord, got {selector!r}. Nothing "
                "was removed."
            )
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
