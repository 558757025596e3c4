"""The edit adapter on a model: injected like any PEFT tuner, and edited through the methods below."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _check_adapters_not_merged, _delete_auxiliary_adapter
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import nn
from transformers.pytorch_utils import Conv1D

from .adapter import base_model, check_counts, editable_adapter, find_records, named_adapter, solve_all, transaction
from .architectures import (
    TARGET_MODULES,
    block_index,
    check_layers,
    default_layers,
    find_blocks,
    find_down_projections,
)
from .collecting import collect_statistics
from .combining import combine
from .config import EditConfig
from .editing import FactEditor
from .facts import Fact, FactLike
from .layer import EditLayer, EditLinear, unwrapped_name
from .lifelong import Run, Tracker
from .loading import check_adapter_weights
from .memory import EditMemory, EditRecord
from .mixed_batches import adapter_per_sample
from .placing import check_located, locate_and_move
from .report import EditReport
from .shared_keys import found_on_top
from .statistics import KeyStatistics
from .stream import FactStream


if TYPE_CHECKING:
    from .analysis import LocateReport


class EditModel(BaseTuner):
    """A model with edit adapters on MLP down-projections.

    Made by `get_peft_model(model, EditConfig(task_type="CAUSAL_LM"))`; the wrapped model passes the methods below on.

    Args:
        model (`nn.Module`): The model to adapt.
        peft_config (`EditConfig`): The adapter's settings.
        adapter_name (`str`): The adapter's name.
        low_cpu_mem_usage (`bool`): Create the adapter's weights on the meta device.
    """

    prefix: str = "edit_"
    tuner_layer_cls = EditLayer
    target_module_mapping = TARGET_MODULES

    # --- injection ---------------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As `BaseTuner.inject_adapter`; a config that serves another adapter already is copied."""
        config = self.peft_config[adapter_name]
        if config.in_use:
            config = self.peft_config[adapter_name] = config.unused_copy()
        config.in_use = True
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: EditConfig, model_config: dict) -> EditConfig:
        """Fills in modules and layers that the user left open."""
        places = ("target_modules", "layers_to_transform", "layers_pattern")
        peft_config.given = {name: getattr(peft_config, name) for name in places}
        if peft_config.layers_to_transform == "auto":  # in the usual place until there are facts to measure with
            peft_config.unlocated = True
            peft_config.layers_to_transform = default_layers(
                len(find_blocks(self.model)[1]), model_config.get("model_type", "custom")
            )
        if peft_config.target_modules is None:
            model_type = model_config.get("model_type", "custom")
            names = TARGET_MODULES.get(model_type) or find_down_projections(self.model)
            peft_config.target_modules = set(names)
            if peft_config.layers_to_transform is None:
                peft_config.layers_to_transform = default_layers(len(find_blocks(self.model)[1]), model_type)
        if peft_config.layers_to_transform is not None:
            try:
                path, blocks = find_blocks(self.model)
            except ValueError:  # no language model; PEFT finds the indices in the module names
                return peft_config
            check_layers(peft_config.layers_to_transform, len(blocks))
            if "." not in path and not peft_config.layers_pattern:
                peft_config.layers_pattern = [path]  # of a model without a head; PEFT looks for a dot before it
        return peft_config

    def _create_and_replace(
        self,
        peft_config: EditConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, EditLinear):
            target.update_layer(adapter_name, peft_config)
            return
        quantization = get_quantization_kwargs(self.model)
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, (nn.Linear, Conv1D)) and not hasattr(base, "in_features"):
            raise ValueError(
                f"'{current_key}' is a {type(base).__name__}; edits are stored on linear modules (nn.Linear, Conv1D): "
                "name those in target_modules."
            )
        layer = EditLinear(target, adapter_name, peft_config, **quantization)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Deltas are float32 or wider, or the base's dtype with `autocast_adapter_dtype=False`."""
        if autocast_adapter_dtype:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
            return
        for layer in self.edit_layers(adapter_name).values():
            _, dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
            if dtype is not None and dtype.is_floating_point:
                layer.edit_delta[adapter_name].to(dtype)

    def _enable_peft_forward_hooks(self, *_args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        """Passes `adapter_names` (one per sample) on to the layers and the modules to save."""
        return adapter_per_sample(self, kwargs.pop("adapter_names", None))

    # --- adapters ----------------------------------------------------------------------------------------------

    def edit_layers(self, adapter_name: str | None = None) -> dict[str, EditLinear]:
        """The edited modules by name, in the order in which a forward pass meets them.

        Args:
            adapter_name (`str`, *optional*): Only modules that have this adapter.
        """
        found = {
            unwrapped_name(name): module
            for name, module in self.model.named_modules()
            if isinstance(module, EditLinear) and (adapter_name is None or adapter_name in module.edit_delta)
        }
        if all(any(part.isdigit() for part in name.split(".")) for name in found):
            return dict(sorted(found.items(), key=lambda item: block_index(item[0])))
        return found

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter and its edit memory.

        Raises:
            ValueError: if there is no such adapter, or if it is merged.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        _check_adapters_not_merged(self.model, adapter_name)
        del self.peft_config[adapter_name]
        # PEFT's helper would pass over modules whose name contains the prefix, such as "credit_head".
        remaining: list[str] = []
        for layer in self.edit_layers().values():
            layer.delete_adapter(adapter_name)
            remaining = remaining or layer.active_adapters[:]
        _delete_auxiliary_adapter(self.model, adapter_name=adapter_name, new_active_adapters=remaining)
        self.active_adapter = remaining or []

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
    ) -> None:
        """Makes a new adapter of existing ones.

        Args:
            adapters (`list[str]`): Adapters to combine.
            weights (`list[float]`): One weight each.
            adapter_name (`str`): Name of the new adapter, which is not activated.
            combination_type (`str`): `"linear"`: weighted sum of the deltas; the result has no edit memory.
                `"memory"`: the edit memories are joined and solved together, so that the result can be edited on;
                needs disjoint facts and weights of 1.

        Raises:
            ValueError: if names, weights or memories do not fit together; nothing is added then.
        """
        combine(self, adapters, weights, adapter_name, combination_type)

    # --- checkpoints -------------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: EditConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """Only this type's tensors, also where a LoRA of the same name stands beside or around the edit."""
        entries = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        own = {key: value for key, value in entries.items() if f".edit_delta.{adapter_name}." in f".{key}"}
        return {unwrapped_name(key): value for key, value in own.items()}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: EditConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Checks the checkpoint before a single weight is touched."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_adapter_weights(model, config, adapter_name, remapped)
        return remapped

    # --- editing -----------------------------------------------------------------------------------------------

    def edit_facts(
        self,
        facts: FactLike | Iterable[FactLike] | str,
        tokenizer: Any,
        batch_size: int | None = None,
        statistics: KeyStatistics | None = None,
        adapter_name: str | None = None,
        strict: bool = False,
        progress: bool = True,
        search_slots: int = 0,
        full_search: bool = False,
        output_dir: str | os.PathLike | None = None,
        save_steps: int = 1,
        resume_from_checkpoint: bool = False,
        tracker: Tracker | None = None,
        probes: int = 0,
    ) -> EditReport:
        """Writes facts into the adapter, after all those that it holds already.

        Every batch is a transaction: whatever is raised, model and memory are as they were before the batch. Under
        `accelerate launch` each process searches its share of every batch, and all end with the same adapter.

        Args:
            facts: `Fact` objects, mappings, an iterable of either, or the path of a JSONL file; see `as_facts`. What
                has a length is checked whole before the first batch; a stream (a generator, a
                `datasets.IterableDataset`) is read and checked batch by batch.
            tokenizer: The model's (fast) tokenizer.
            batch_size (`int`, *optional*): Facts that are solved for together; by default as many as is usual for the
                update rule: 100, and 1 for ROME's.
            statistics (`KeyStatistics`, *optional*): Key statistics of this model; kept with the adapter from then on.
                Without any the model's own samples are used, with a warning.
            adapter_name (`str`, *optional*): The adapter to edit; by default the active one.
            strict (`bool`): Raise when the search of a fact diverges, instead of reporting the fact as not written.
            progress (`bool`): Show a progress bar with facts/s.
            search_slots (`int`): Facts whose targets are searched at the same time; 0 for as many as memory allows.
                Up to twice as many (0: 64) make a group, which one process searches.
            full_search (`bool`): Run the search on whole sequences; for comparison.
            output_dir (`str`, *optional*): Directory for checkpoints; each is a loadable adapter.
            save_steps (`int`): Batches between two checkpoints.
            resume_from_checkpoint (`bool`): Go on from the newest checkpoint in `output_dir`, if there is one, with
                the same facts from their beginning; the adapter ends as if the run had never stopped.
            tracker (*optional*): Takes a log after each batch: an `accelerate.Accelerator` after `init_trackers`, or
                anything with `log(values, step=...)`.
            probes (`int`): With a tracker, facts written earlier that are asked again after each batch.

        Returns:
            `EditReport`: What happened to each fact (of this call) and each module.

        Raises:
            FactError: if a fact is malformed or contradicts another of the same call; nothing is changed (of a stream:
                nothing of that batch).
            ValueError, RuntimeError: if the adapter cannot be edited, or tokenizer, statistics or weights do not fit.
        """
        name = editable_adapter(self, adapter_name)
        if batch_size is None:
            batch_size = self.peft_config[name].update_rule().batch_size
        check_counts(batch_size=(batch_size, 1), search_slots=(search_slots, 0), save_steps=(save_steps, 1))
        stream = FactStream(facts, batch_size)
        if self.peft_config[name].unlocated and stream.whole is not None and statistics is None:
            self.locate_layers(stream.whole, tokenizer, adapter_name=name, tracing=False)
        check_located(self, name, "editing a stream or giving statistics")
        self.peft_config[name].check_values()
        editor = FactEditor(
            self,
            name,
            tokenizer,
            statistics=statistics,
            search_slots=search_slots,
            full_search=full_search,
            strict=strict,
            progress=progress,
        )
        return editor.run(stream, Run(output_dir, save_steps, resume_from_checkpoint, tracker, probes))

    def locate_layers(
        self, facts: Any, tokenizer: Any, count: int | None = None, adapter_name: str | None = None, **options: Any
    ) -> LocateReport:
        """Chooses the layers to edit by measurement and moves the adapter, which must be empty, there.

        Args:
            facts: Facts that the base model knows (their `target_true`, or what it answers).
            tokenizer: The model's tokenizer.
            count (`int`, *optional*): How many neighbouring layers; by default as many as are usual for the depth.
            adapter_name (`str`, *optional*): The adapter; by default the active one.
            options: Further arguments of `peft_edit.analysis.locate_layers`.

        Returns:
            `LocateReport`: The ranking; with `tracing=True` (the default) also the heat map of causal tracing.

        Raises:
            ValueError: if the adapter holds facts or statistics of its present layers.
        """
        return locate_and_move(self, facts, tokenizer, count, adapter_name, **options)

    def edited_facts(self, adapter_name: str | None = None) -> list[EditRecord]:
        """The facts that the adapter holds, oldest first."""
        memory = self.peft_config[named_adapter(self, adapter_name)].memory
        return list(memory.records) if memory is not None else []

    def remove_facts(
        self,
        facts: str | FactLike | EditRecord | Iterable[str | FactLike | EditRecord],
        adapter_name: str | None = None,
    ) -> list[EditRecord]:
        """Takes facts out: the delta becomes that of an adapter whose memory never had them. No search is needed.

        Facts that were written later under the same key (the same subject behind the same words) were searched on top
        of them; a warning names those.

        Args:
            facts: Ids, facts or mappings (by subject and prompt), or records.
            adapter_name (`str`, *optional*): The adapter; by default the active one.

        Returns:
            `list[EditRecord]`: What was removed.

        Raises:
            KeyError: if the adapter does not hold one of them; nothing is removed then.
            TypeError: if one is of another kind.
        """
        name = editable_adapter(self, adapter_name)
        single = isinstance(facts, (str, Fact, Mapping, EditRecord)) or not isinstance(facts, Iterable)
        selectors: Any = [facts] if single else facts
        memory = self.peft_config[name].memory
        found = find_records(memory, list(selectors))
        if memory is not None and found:
            with transaction(self, name):
                solve_all(self, name, memory.without({record.id for record in found}))
            kept = found_on_top(found, self.peft_config[name].memory.records)
            if kept:
                warnings.warn(
                    f"{len(kept)} fact(s), first {kept[0].filled_prompt!r}, were written on top of a removed one with "
                    "the same key (the same subject behind the same words) and keep some of it: edit them again to be "
                    "rid of that.",
                    stacklevel=2,
                )
        return found

    def set_norm_budget(self, norm_budget: float | None, adapter_name: str | None = None) -> None:
        """Sets the cap on ||Δ||_F / ||W0||_F of each module and solves again from memory, without any search."""
        self._resolve_with(adapter_name, norm_budget=norm_budget)

    def set_norm_penalty(self, norm_penalty: float | str, adapter_name: str | None = None) -> None:
        """Sets λn (a number, or "auto") and solves again from memory, without any search."""
        self._resolve_with(adapter_name, norm_penalty=norm_penalty)

    def _resolve_with(self, adapter_name: str | None, **settings: Any) -> None:
        name = editable_adapter(self, adapter_name)
        config = self.peft_config[name]
        with transaction(self, name):
            for field, value in settings.items():
                setattr(config, field, value)
            config.check_values()
            if config.memory is not None:
                solve_all(self, name, config.memory)

    def collect_statistics(
        self, texts: Iterable[Any], tokenizer: Any, adapter_name: str | None = None, **options: Any
    ) -> KeyStatistics:
        """Collects key statistics of the base model for the adapter's modules and gives them to the adapter.

        Args:
            texts: An iterable of strings, mappings with "text" or token ids, such as a `datasets.Dataset`.
            tokenizer: The model's tokenizer.
            adapter_name (`str`, *optional*): The adapter; by default the active one.
            options: Further arguments of `peft_edit.collect_statistics`.

        Returns:
            `KeyStatistics`
        """
        name = editable_adapter(self, adapter_name)
        check_located(self, name, "collecting statistics")
        with base_model(self) as model:
            statistics = collect_statistics(model, tokenizer, texts, list(self.edit_layers(name)), **options)
        self.set_statistics(statistics, name)
        return statistics

    def set_statistics(self, statistics: KeyStatistics, adapter_name: str | None = None) -> None:
        """Gives key statistics to the adapter; facts that it holds are solved again under them."""
        name = editable_adapter(self, adapter_name)
        check_located(self, name, "giving statistics")
        modules = list(self.edit_layers(name))
        statistics.check(self.model, modules)
        statistics = statistics.subset(modules)
        memory = self.peft_config[name].memory
        with transaction(self, name):
            if memory is None:
                self.peft_config[name].memory = EditMemory(statistics=statistics)
            else:
                solve_all(self, name, memory.with_statistics(statistics))
