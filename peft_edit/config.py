"""The settings of an edit adapter."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
from peft.config import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from .memory import MEMORY_FILES, EditMemory
from .methods import METHODS
from .register import EDIT
from .updates import UPDATES, Folded, Update, make_update


REFINEMENTS_WITH_MPES = 4
PATIENCE = 4


@dataclass
class EditConfig(PeftConfig):
    """Configuration of an `EditModel`.

    The search and update settings default to those of arXiv 2502.01636; λp and λn to values in units of the model.

    Besides its fields a config carries `memory`, the adapter's `EditMemory` (or None). It is no field: it is written
    beside `adapter_config.json`, not into it. A config that is used for a second adapter or model is copied (`in_use`,
    `unused_copy`), so that no two of them share a memory.

    Raises:
        ValueError: on construction, if a value is out of range; the message names the field.
    """

    target_modules: Collection[str] | str | None = field(
        default=None,
        metadata={"help": "Modules to edit, as in LoRA; by default the MLP down-projections of the architecture."},
    )
    exclude_modules: Collection[str] | str | None = field(default=None, metadata={"help": "Modules to leave alone."})
    layers_to_transform: list[int] | int | str | None = field(
        default=None,
        metadata={
            "help": "Indices of the blocks to edit; by default an early-middle band where target_modules is not given "
            "either, else every block. 'auto': chosen by measurement, see `EditModel.locate_layers`."
        },
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the block list, if layers_to_transform does not find it."}
    )
    preservation_weight: float | str = field(
        default="auto",
        metadata={"help": "λp: weight of the outputs on ordinary text. 'auto': in units of d_in; a number: as given."},
    )
    norm_penalty: float | str = field(
        default="auto",
        metadata={
            "help": "λn: weight of ||Δ||_F² of the cumulative delta. 'auto': in units of λp tr(C) / d_in; a "
            "number: as given."
        },
    )
    norm_budget: float | None = field(
        default=None, metadata={"help": "Largest allowed ||Δ||_F / ||W0||_F per module, met exactly; None for no cap."}
    )
    update: str = field(default="ridge", metadata={"help": "The update rule: a name in `peft_edit.updates.UPDATES`."})
    update_settings: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Settings of the update rule, where it has any."}
    )
    method: str = field(
        default="encore", metadata={"help": "Name of the preset these settings began with; see `from_method`."}
    )
    refinements: int | str = field(
        default="auto",
        metadata={
            "help": "Rounds in which what the ridge solution leaves unwritten is added to the values of a new batch. "
            "'auto': 4 with MPES, whose targets have no margin to lose, 0 without, or where the update rule has none."
        },
    )
    sufficient_probability: float = field(
        default=0.95,
        metadata={
            "help": "A fact whose target the model answers with this probability (geometric mean over its tokens) is "
            "refined no further, nor is one whose search did not converge. 1: every fact in every round."
        },
    )
    early_stopping: str = field(
        default="mpes", metadata={"help": "'mpes' (stop once the target is most probable everywhere) or 'none'."}
    )
    mpes_extra_steps: int = field(default=1, metadata={"help": "Optimiser steps after MPES has struck."})
    search_steps: int = field(default=25, metadata={"help": "Evaluations of the search's objective at most."})
    search_optimizer: str = field(
        default="normalized",
        metadata={
            "help": "'normalized': steps along the gradient, search_lr · ||h|| long, with momentum (fewer steps, "
            "better targets); 'adam': as published."
        },
    )
    search_lr: float = field(default=0.5, metadata={"help": "Learning rate in the search."})
    search_patience: int | str = field(
        default="auto",
        metadata={
            "help": "With MPES: steps without a gain of 2 % after which a fact is given up, 0 for never. 'auto': 4 "
            "with the normalized optimizer, 0 with Adam (as published)."
        },
    )
    search_weight_decay: float = field(default=0.5, metadata={"help": "Weight of ||δ|| / ||h||² in the search."})
    search_kl_weight: float = field(default=0.0625, metadata={"help": "Weight of the KL divergence on '{} is a'."})
    search_max_norm: float = field(default=0.75, metadata={"help": "Radius of the ball for δ as a share of ||h||."})
    joint_search: bool = field(
        default=True,
        metadata={
            "help": "Facts that share a key (the same subject behind the same words) are written one after the other, "
            "each searched together with those that the adapter holds; False: each by itself, as published."
        },
    )
    lti: bool = field(
        default=False,
        metadata={
            "help": "Learn the Inference: the search also stays close to the model's own answers when it is told the "
            "new fact in its context."
        },
    )
    lti_final_weight: float = field(
        default=0.0625, metadata={"help": "With lti: weight of the KL divergence from those answers."}
    )
    lti_middle_weight: float = field(
        default=0.0625,
        metadata={"help": "With lti: weight of the same for what the subject stands for at a middle block."},
    )
    lti_layer: int | None = field(
        default=None,
        metadata={"help": "With lti: that block; by default halfway between the last edited and the last one."},
    )
    value_norm: float | str = field(
        default="free",
        metadata={
            "help": "'free': searched values as they are. 'anchored' (NAS): rescaled to the mean norm that those of "
            "the first batch have on the unedited model; a number: to that norm."
        },
    )
    chat_template: bool = field(
        default=False,
        metadata={"help": "Prompts are the user's message in the tokenizer's chat template, targets the answer."},
    )
    num_contexts: int = field(default=5, metadata={"help": "Self-generated prefixes behind which a fact must hold."})
    seed: int = field(default=0, metadata={"help": "Seed of contexts and of sampled statistics."})
    save_memory: bool = field(
        default=True, metadata={"help": "Write the edit memory with the adapter; without it the adapter only infers."}
    )
    base_fingerprint: dict[str, Any] | None = field(
        default=None, metadata={"help": "Of the base model; written where the edit memory, which has it too, is not."}
    )
    trainable: bool = field(
        default=False, metadata={"help": "Let optimisers train the delta; an edit is frozen unless this is set."}
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "True: Δ = 0. False: a random, trainable Δ, for tests of the adapter's mechanics."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save with the adapter, as in LoRA."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = EDIT
        self.memory: EditMemory | None = None
        self.loaded_memory: EditMemory | None = None
        self.in_use = False
        self.unlocated = False  # the layers are still to be chosen by measurement
        self.given: dict[str, Any] = {}  # what the user wrote, where a model has filled it in
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform needs target_modules as a list of names, not as a pattern.")
        if isinstance(self.layers_to_transform, str) and self.layers_to_transform != "auto":
            raise ValueError(
                f"layers_to_transform must be block indices, 'auto' or None, got {self.layers_to_transform!r}."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where layers_to_transform counts: give layers_to_transform too.")
        self.check_values()

    def check_values(self) -> None:
        """Ranges of the numbers."""
        for name in ("preservation_weight", "norm_penalty"):
            value = getattr(self, name)
            if value != "auto" and not (_is_number(value) and value >= 0):
                raise ValueError(f"{name} must be 'auto' or a number >= 0, got {value!r}.")
        if self.norm_budget is not None and not (_is_number(self.norm_budget) and self.norm_budget > 0):
            raise ValueError(
                f"norm_budget must be None or a share of ||W0||_F above 0, such as 0.05, got {self.norm_budget!r}."
            )
        self.update_rule()
        if self.early_stopping not in ("mpes", "none"):
            raise ValueError(f"early_stopping must be 'mpes' or 'none', got {self.early_stopping!r}.")
        if self.search_optimizer not in ("normalized", "adam"):
            raise ValueError(f"search_optimizer must be 'normalized' or 'adam', got {self.search_optimizer!r}.")
        if self.search_patience != "auto" and not (
            isinstance(self.search_patience, int) and self.search_patience >= 0
        ):
            raise ValueError(f"search_patience must be 'auto' or a whole number >= 0, got {self.search_patience!r}.")
        if self.refinements != "auto" and not (isinstance(self.refinements, int) and self.refinements >= 0):
            raise ValueError(f"refinements must be 'auto' or a whole number >= 0, got {self.refinements!r}.")
        if not (_is_number(self.sufficient_probability) and 0 <= self.sufficient_probability <= 1):
            raise ValueError(
                f"sufficient_probability must be a number from 0 to 1, got {self.sufficient_probability!r}."
            )
        for name, least in (("search_steps", 1), ("mpes_extra_steps", 0), ("num_contexts", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}.")
        for name in ("search_lr", "search_max_norm"):
            value = getattr(self, name)
            if not (_is_number(value) and value > 0):
                raise ValueError(f"{name} must be a number > 0, got {value!r}.")
        for name in ("search_weight_decay", "search_kl_weight", "lti_final_weight", "lti_middle_weight"):
            value = getattr(self, name)
            if not (_is_number(value) and value >= 0):
                raise ValueError(f"{name} must be a number >= 0, got {value!r}.")
        self._check_values_of_a_search()

    def _check_values_of_a_search(self) -> None:
        """What regularises searched values, and that there are any."""
        if self.lti and not (self.lti_final_weight or self.lti_middle_weight):
            raise ValueError("lti=True needs lti_final_weight or lti_middle_weight above 0.")
        layer = self.lti_layer
        if layer is not None and (not isinstance(layer, int) or isinstance(layer, bool) or layer < 0):
            raise ValueError(f"lti_layer must be None or the index of a block, got {layer!r}.")
        norm = self.value_norm
        if norm not in ("free", "anchored") and not (_is_number(norm) and norm > 0):  # type: ignore[operator]
            raise ValueError(f"value_norm must be 'free', 'anchored' or a number > 0, got {norm!r}.")
        if UPDATES[self.update].from_gradients:
            for name, unset in (("lti", False), ("value_norm", "free")):
                if getattr(self, name) != unset:
                    raise ValueError(
                        f"The update {self.update!r} searches no values, so {name}={getattr(self, name)!r} cannot "
                        "act on any: leave it out, or choose another update."
                    )

    @property
    def refinement_rounds(self) -> int:
        """`refinements` as a number."""
        if self.refinements == "auto":
            refines = self.early_stopping == "mpes" and not issubclass(UPDATES[self.update], Folded)
            return REFINEMENTS_WITH_MPES if refines else 0
        return int(self.refinements)

    def update_rule(self) -> Update:
        """The update rule with its settings.

        Raises:
            ValueError: if there is no such rule or setting, or it cannot solve what the edit memory holds.
        """
        rule = make_update(self.update, self.update_settings)
        memory = self.memory
        if memory is not None and len(memory) and memory.gradients != rule.from_gradients:
            kinds = ("searched values", "value gradients")
            raise ValueError(
                f"The adapter holds {kinds[memory.gradients]} and the update {self.update!r} needs "
                f"{kinds[rule.from_gradients]}: keep the update that it was edited with, or edit in a new adapter."
            )
        return rule

    @classmethod
    def from_method(cls, method: str, **settings: Any) -> EditConfig:
        """The settings of a published method, with changes of your own.

        Args:
            method (`str`): A name in `peft_edit.methods.METHODS`.
            settings: Fields of the config that are to differ.

        Raises:
            ValueError: if there is no such method.
        """
        if method not in METHODS:
            raise ValueError(f"There is no method {method!r}; there are {sorted(METHODS)}.")
        return cls(**{**METHODS[method].settings, "method": method, **settings})

    @property
    def patience_steps(self) -> int:
        """`search_patience` as a number."""
        if self.search_patience == "auto":
            return PATIENCE if self.search_optimizer == "normalized" else 0
        return int(self.search_patience)

    def unused_copy(self) -> EditConfig:
        """The same settings for another adapter, with the edit memory as it was loaded and nothing written since."""
        twin = copy.copy(self)
        twin.memory, twin.in_use, twin.given = self.loaded_memory, False, {}
        for name, value in self.given.items():
            setattr(twin, name, value)
        return twin

    def without_facts(self) -> EditConfig:
        """The same settings and places for another adapter that holds nothing."""
        twin = copy.copy(self)
        twin.memory = twin.loaded_memory = None
        twin.in_use, twin.given = False, {}
        return twin

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes `adapter_config.json` and, unless `save_memory` is off, the edit memory beside it."""
        if self.memory is not None and not self.save_memory:
            self.base_fingerprint = dict(self.memory.statistics.fingerprint)
        super().save_pretrained(save_directory, **kwargs)
        if self.memory is not None and self.save_memory:
            self.memory.save(save_directory)
        else:
            for name in MEMORY_FILES:  # of an adapter that was saved here before
                Path(save_directory, name).unlink(missing_ok=True)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> EditConfig:
        """Reads the config and, where it is there, the edit memory; a directory or a Hub repository.

        Raises:
            ValueError: if memory or weight files are there but damaged.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        check_weights_file(Path(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME))
        hub_kwargs = cls._split_kwargs(kwargs)[0]
        folder = find_memory(pretrained_model_name_or_path, subfolder, hub_kwargs)
        if folder is not None:
            config.memory = config.loaded_memory = EditMemory.load(folder)
        return config


def check_weights_file(path: Path) -> None:
    """Raises a ValueError if a local weights file is truncated; a missing one is PEFT's matter."""
    if not path.is_file():
        return
    try:
        with safe_open(path, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"The adapter file '{path}' cannot be read ({error}): fetch or save the adapter again."
        ) from error


def find_memory(name_or_path: str | os.PathLike, subfolder: str | None, hub_kwargs: dict[str, Any]) -> Path | None:
    """The local directory of an adapter's memory files, fetched from the Hub where needed; None if it has none.

    Raises:
        ConnectionError: if the Hub cannot be asked whether there is a memory.
        ValueError: if the repository has some of the files only.
    """
    folder = Path(name_or_path, subfolder or "")
    if folder.is_dir():
        return folder if (folder / MEMORY_FILES[0]).is_file() else None
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        hub_kwargs = {**hub_kwargs, "local_files_only": True}
    fetch = partial(hf_hub_download, str(name_or_path), subfolder=subfolder, **hub_kwargs)
    try:
        first = fetch(MEMORY_FILES[0])
    except LocalEntryNotFoundError as error:
        if _known_absent(str(name_or_path), (Path(subfolder or "") / MEMORY_FILES[0]).as_posix(), hub_kwargs):
            return None
        if not hub_kwargs.get("local_files_only"):
            raise ConnectionError(
                f"The edit memory of '{name_or_path}' is not in the cache and the Hub cannot be reached: check the "
                "connection and load the adapter again."
            ) from error
        warnings.warn(
            f"The cache holds no edit memory of '{name_or_path}'; if it has one, fetch it online once. The adapter "
            "is loaded for inference only.",
            stacklevel=2,
        )
        return None
    except (EntryNotFoundError, RepositoryNotFoundError):
        return None
    for name in MEMORY_FILES[1:]:
        try:
            fetch(name)
        except EntryNotFoundError as error:
            raise ValueError(
                f"The edit memory of '{name_or_path}' lacks '{name}': fetch it online if it is missing in the cache "
                "only, else push the adapter again."
            ) from error
    return Path(first).parent


def _known_absent(repo_id: str, filename: str, hub_kwargs: dict[str, Any]) -> bool:
    """Whether the cache remembers that the repository has no such file."""
    asked = {name: hub_kwargs[name] for name in ("cache_dir", "revision") if hub_kwargs.get(name) is not None}
    return try_to_load_from_cache(repo_id, filename, **asked) is _CACHED_NO_EXIST


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and value == value
        and abs(value) != float("inf")
    )
