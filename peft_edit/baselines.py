"""Baselines outside the edit adapter: constrained fine-tuning of the same matrices, and PEFT's LoRA.

Both train on the facts of one batch after another, each until every target is the greedy completion of its prompt, and
keep nothing but the weights: a fact cannot be taken out again, nor the constraint be changed afterwards.
"""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .adapter import check_counts
from .architectures import TARGET_MODULES, check_layers, default_layers, find_blocks, find_down_projections
from .facts import FactLike, as_facts
from .hooks import evaluating
from .prompts import PromptEncoder
from .scoring import TokenPairs, score_targets
from .training import MasterAdam, accumulate_gradients, alone_trainable, restored_on_error


CONSTRAINTS = ("linf", "frobenius")


@dataclass
class BaselineReport:
    """What training on some facts did.

    Args:
        facts (`int`): Facts trained on.
        recalled (`int`): Those whose target was the greedy completion when their batch was done.
        steps (`list[int]`): Optimiser steps of each batch.
        loss (`list[float]`): Of each batch, the last mean negative log-likelihood per target token, in nats.
        norms (`list[dict[str, float]]`): ||ΔW||_F / ||W0||_F of each trained matrix after each batch.
        seconds (`float`): Wall-clock time.
    """

    facts: int = 0
    recalled: int = 0
    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    norms: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        share = max(self.norms[-1].values(), default=0.0) if self.norms else 0.0
        return (
            f"{self.recalled} of {self.facts} facts recalled, {sum(self.steps)} steps in {len(self.steps)} batches, "
            f"||ΔW|| at most {100 * share:.2f}% of ||W0||, {self.seconds:.1f} s"
        )


class Baseline(ABC):
    """Trains a model on facts, batch by batch. Runs in one process.

    Every batch is a transaction: whatever is raised, the weights are as before the batch. Dropout is off.

    Args:
        model: The model that learns; `.model` from then on.
        tokenizer: Its (fast) tokenizer.
        lr (`float`): Learning rate of Adam, which starts anew with every batch.
        steps (`int`): Optimiser steps per batch at most.
        chunk_size (`int`): Facts per forward pass; gradients of a batch's chunks are added up before a step.

    Raises:
        ValueError: if a setting is out of range, or the tokenizer is not this model's.
    """

    def __init__(self, model: Any, tokenizer: Any, lr: float, steps: int, chunk_size: int = 64) -> None:
        check_counts(steps=(steps, 1), chunk_size=(chunk_size, 1))
        if not 0 < lr < float("inf"):
            raise ValueError(f"lr must be a number > 0, got {lr!r}.")
        self.model = model
        self.lr, self.steps, self.chunk_size = lr, steps, chunk_size
        self.encoder = PromptEncoder(tokenizer, model.get_input_embeddings().num_embeddings)

    @abstractmethod
    def norm_shares(self) -> dict[str, float]:
        """||ΔW||_F / ||W0||_F of each trained matrix, by module name."""

    @abstractmethod
    def trained(self) -> list[nn.Parameter]:
        """The model's weights that learn."""

    def constrain(self, weights: Sequence[torch.Tensor], starts: Sequence[torch.Tensor]) -> None:  # noqa: B027
        """Moves new weights, in place, to where they may be; `starts` are those at the beginning of the batch."""

    def edit_facts(self, facts: FactLike | Iterable[FactLike] | str, batch_size: int = 100) -> BaselineReport:
        """Trains on facts after all those before.

        Args:
            facts: As for `EditModel.edit_facts`.
            batch_size (`int`): Facts that are trained on together.

        Raises:
            FactError: if a fact is malformed or contradicts another of the call; nothing is changed.
            ValueError: if a loss is not finite; the batch is rolled back.
        """
        check_counts(batch_size=(batch_size, 1))
        listed = as_facts(facts)
        pairs = [self.encoder.continuation_ids(fact.filled_prompt, fact.target) for fact in listed]
        report = BaselineReport()
        start = time.perf_counter()
        for first in range(0, len(pairs), batch_size):
            batch = pairs[first : first + batch_size]
            steps, loss = self._train(batch)
            with evaluating(self.model):
                recalled = score_targets(self.model, batch, chunk=self.chunk_size).greedy
            report.facts += len(batch)
            report.recalled += int(recalled.sum())
            report.steps.append(steps)
            report.loss.append(loss)
            report.norms.append(self.norm_shares())
        report.seconds = time.perf_counter() - start
        return report

    def _train(self, pairs: TokenPairs) -> tuple[int, float]:
        """Steps taken, and the last loss."""
        weights = self.trained()
        with evaluating(self.model), alone_trainable(self.model, weights), restored_on_error(weights):
            optimizer = MasterAdam(weights, self.lr)
            for step in range(self.steps + 1):
                last = step == self.steps
                loss, greedy = accumulate_gradients(self.model, pairs, self.chunk_size, backward=not last)
                if not loss < float("inf"):
                    raise ValueError(
                        f"The loss is not finite after {step} steps (lr {self.lr}): lower lr, or use a wider dtype. "
                        "The batch was rolled back."
                    )
                if greedy or last:
                    return step, loss
                optimizer.step()
                self.constrain([master.data for master in optimizer.masters], optimizer.starts)
                optimizer.write()
        raise AssertionError("unreachable: the last step returns")


class FineTuning(Baseline):
    """Constrained fine-tuning of the MLP down-projections that an edit adapter would change.

    Adam on the targets' likelihood given the bare prompts, with ||ΔW|| held inside a ball after every step: FT+L of
    ROME (arXiv 2202.05262), after arXiv 2012.00363. The model given is changed.

    Args:
        model: A causal language model without adapters.
        tokenizer: Its tokenizer.
        target_modules (`Sequence[str]`, *optional*): Names, below a block, of the modules to train; by default those
            that `EditConfig` finds.
        layers_to_transform (`Sequence[int]`, *optional*): Their blocks; by default those of `EditConfig`.
        constraint (`str`): `"linf"`: no entry of ΔW exceeds `max_change` times the root mean square of W0's entries.
            `"frobenius"`: ||ΔW||_F is at most `max_change` times ||W0||_F.
        max_change (`float`, *optional*): Radius of the ball in these units; None for no constraint.
        cumulative (`bool`): ΔW is the change since the model was given; else since the last batch, so that the ball
            moves along, as where facts are edited one by one.
        lr, steps, chunk_size: See `Baseline`.

    Raises:
        ValueError: if the model has adapters already, its weights cannot be trained, or a setting is out of range.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        target_modules: Sequence[str] | None = None,
        layers_to_transform: Sequence[int] | None = None,
        constraint: str = "linf",
        max_change: float | None = 0.5,
        cumulative: bool = True,
        lr: float = 1e-3,
        steps: int = 25,
        chunk_size: int = 64,
    ) -> None:
        if constraint not in CONSTRAINTS:
            raise ValueError(f"constraint must be one of {', '.join(CONSTRAINTS)}, got {constraint!r}.")
        if max_change is not None and not max_change > 0:
            raise ValueError(f"max_change must be None or a share > 0, got {max_change!r}.")
        check_no_adapter(model)
        super().__init__(model, tokenizer, lr, steps, chunk_size)
        self.modules = down_projections(model, target_modules, layers_to_transform)
        self.constraint, self.max_change, self.cumulative = constraint, max_change, cumulative
        self._base = [weight.detach().clone() for weight in self.trained()]

    def trained(self) -> list[nn.Parameter]:
        return [module.weight for module in self.modules.values()]

    def norm_shares(self) -> dict[str, float]:
        return {
            name: float((weight.detach().double() - base.double()).norm() / base.double().norm())
            for name, weight, base in zip(self.modules, self.trained(), self._base)
        }

    def restore(self) -> None:
        """Puts the weights back that the model was given with."""
        with torch.no_grad():
            for weight, base in zip(self.trained(), self._base):
                weight.copy_(base)

    def constrain(self, weights: Sequence[torch.Tensor], starts: Sequence[torch.Tensor]) -> None:
        if self.max_change is None:
            return
        for weight, start, base in zip(weights, starts, self._base):
            center = base.float() if self.cumulative else start
            weight.copy_(center + limited(weight - center, base.float(), self.constraint, self.max_change))


class LoraTraining(Baseline):
    """PEFT's LoRA, trained on the facts: one adapter for all batches. `.model` is the PEFT model.

    Args:
        model: A causal language model without adapters; PEFT puts the LoRA into it.
        tokenizer: Its tokenizer.
        config (`LoraConfig`, *optional*): The adapter; by default rank 8 on all linear modules of the blocks.
        seed (`int`): Of the adapter's first weights.
        lr, steps, chunk_size: See `Baseline`.

    Raises:
        ValueError: if the model has adapters already, the config asks for dropout, or a setting is out of range.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: LoraConfig | None = None,
        seed: int = 0,
        lr: float = 1e-3,
        steps: int = 50,
        chunk_size: int = 64,
    ) -> None:
        check_no_adapter(model)
        config = config or LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
        if config.lora_dropout:
            raise ValueError(
                f"The LoRA has a dropout of {config.lora_dropout}, but it is trained without: set lora_dropout=0."
            )
        super().__init__(model, tokenizer, lr, steps, chunk_size)
        device = model.get_input_embeddings().weight.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            self.model = get_peft_model(model, config)

    def trained(self) -> list[nn.Parameter]:
        return [weight for name, weight in self.model.named_parameters() if "lora_" in name]

    def norm_shares(self) -> dict[str, float]:
        shares = {}
        for name, layer in self.model.get_base_model().named_modules():
            if isinstance(layer, LoraLayer):
                lora: Any = layer
                with torch.no_grad():
                    delta = sum(lora.get_delta_weight(adapter) for adapter in lora.lora_A)
                    shares[name] = float(delta.double().norm() / lora.get_base_layer().weight.double().norm())
        return shares


def fine_tune(
    model: Any,
    tokenizer: Any,
    facts: FactLike | Iterable[FactLike] | str,
    batch_size: int = 100,
    inplace: bool = True,
    **settings: Any,
) -> tuple[Any, BaselineReport]:
    """Constrained fine-tuning on facts, in batches; see `FineTuning` for `settings` and errors.

    Args:
        inplace (`bool`): Change the model given; else a copy of it.

    Returns:
        The changed model, and what was done.
    """
    baseline = FineTuning(model if inplace else copy.deepcopy(model), tokenizer, **settings)
    return baseline.model, baseline.edit_facts(facts, batch_size)


def train_lora(
    model: Any,
    tokenizer: Any,
    facts: FactLike | Iterable[FactLike] | str,
    batch_size: int = 100,
    inplace: bool = True,
    **settings: Any,
) -> tuple[PeftModel, BaselineReport]:
    """A LoRA trained on facts, in batches; see `LoraTraining` for `settings` and errors.

    Args:
        inplace (`bool`): Put the LoRA into the model given; else into a copy of it.

    Returns:
        The PEFT model, and what was done.
    """
    baseline = LoraTraining(model if inplace else copy.deepcopy(model), tokenizer, **settings)
    return baseline.model, baseline.edit_facts(facts, batch_size)


# --- parts -----------------------------------------------------------------------------------------------------


def check_no_adapter(model: nn.Module) -> None:
    """Raises a ValueError if the model holds an adapter of any kind."""
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"This {type(model).__name__} holds adapters; a baseline starts from the base model: load it afresh, or "
            "take them out with unload() or merge_and_unload()."
        )


def down_projections(
    model: Any, target_modules: Sequence[str] | None = None, layers: Sequence[int] | None = None
) -> dict[str, Any]:
    """The modules that an `EditConfig` with these settings would edit, by name, in the order of the blocks.

    Raises:
        ValueError: if there are none, a layer is out of range, or a weight is no floating-point tensor in memory.
    """
    path, blocks = find_blocks(model)
    model_type = getattr(model.config, "model_type", "custom")
    names = list(target_modules or TARGET_MODULES.get(model_type) or find_down_projections(model))
    if layers is None:
        layers = default_layers(len(blocks), model_type) if target_modules is None else range(len(blocks))
    check_layers(list(layers), len(blocks))
    found = {
        f"{path}.{layer}.{inner}": module
        for layer in sorted(layers)
        for inner, module in blocks[layer].named_modules()
        if any(inner == name or inner.endswith(f".{name}") for name in names)
    }
    if not found:
        raise ValueError(f"No module in the blocks {list(layers)} of '{path}' ends in one of {names}.")
    for name, module in found.items():
        weight = getattr(module, "weight", None)
        if weight is None or not weight.is_floating_point() or weight.device.type == "meta":
            raise ValueError(
                f"The weight of '{name}' ({type(module).__name__}) is quantised, offloaded or missing, so it cannot "
                "be fine-tuned: load the model whole, in a floating-point dtype."
            )
    return found


def limited(change: torch.Tensor, base: torch.Tensor, constraint: str, max_change: float) -> torch.Tensor:
    """The nearest matrix to `change` inside the ball of that radius.

    Args:
        change (`torch.Tensor`): ΔW.
        base (`torch.Tensor`): W0, of the same shape, the unit of the radius.
        constraint (`str`): One of `CONSTRAINTS`.
        max_change (`float`): The radius as a share: of the root mean square of W0's entries for the largest entry, of
            ||W0||_F for ||ΔW||_F.
    """
    if constraint == "linf":
        radius = max_change * float(base.norm()) / base.numel() ** 0.5
        return change.clamp(-radius, radius)
    radius, norm = max_change * float(base.norm()), float(change.norm())
    return change if norm <= radius else change * (radius / norm)
