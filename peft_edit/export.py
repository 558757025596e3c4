"""Export to LoRA: the delta as a product of two thin matrices, in files that any LoRA server loads."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from .architectures import block_index
from .config import EditConfig
from .files import replace_file
from .model import EditModel


EXACT = 1e-6  # relative error of the exact form: what sums in float32 leave in a delta anyway


@dataclass(frozen=True)
class ExportedModule:
    """One exported module.

    Args:
        name (`str`): Module name in the base model.
        rank (`int`): Rank of its LoRA.
        exact_rank (`int`): The smallest rank that gives the delta back to `EXACT`, the rounding of float32 sums.
        norm (`float`): ||Δ||_F.
        relative_error (`float`): ||Δ − BA||_F / ||Δ||_F, with B and A as they are stored.
        energy (`float`): Share of ||Δ||_F² that the rank keeps.
    """

    name: str
    rank: int
    exact_rank: int
    norm: float
    relative_error: float
    energy: float


@dataclass(frozen=True)
class LoraExport:
    """What `export_lora` returns: a LoRA adapter and the error it makes. Prints as a table.

    Args:
        config (`LoraConfig`): What `adapter_config.json` holds; every scaling is 1.
        tensors (`dict[str, torch.Tensor]`): What `adapter_model.safetensors` holds: A (rank, d_in) and B (d_out, rank)
            of each module, under PEFT's names.
        modules (`tuple[ExportedModule, ...]`): The edited modules.
    """

    config: LoraConfig
    tensors: dict[str, torch.Tensor]
    modules: tuple[ExportedModule, ...]

    @property
    def rank(self) -> int:
        """The largest rank: what a server must be told to allow."""
        return self.config.r

    @property
    def relative_error(self) -> float:
        """||Δ − BA||_F / ||Δ||_F over all modules together."""
        error = sum((module.relative_error * module.norm) ** 2 for module in self.modules)
        return math.sqrt(error / sum(module.norm**2 for module in self.modules))

    @property
    def parameters(self) -> int:
        """Numbers stored."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    def to_dict(self) -> dict[str, Any]:
        """The figures, as plain Python containers."""
        return {
            "rank": self.rank,
            "relative_error": self.relative_error,
            "parameters": self.parameters,
            "modules": [asdict(module) for module in self.modules],
        }

    def to_json(self, indent: int | None = 2) -> str:
        """The figures as JSON text."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False)

    def save(self, output_dir: str | os.PathLike) -> None:
        """Writes `adapter_model.safetensors` and `adapter_config.json`.

        Raises:
            ValueError: if the directory holds an edit adapter, which this would overwrite.
        """
        folder = Path(output_dir)
        check_output_dir(folder)
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(
            folder / SAFETENSORS_WEIGHTS_NAME, lambda path: save_file(self.tensors, path, metadata={"format": "pt"})
        )
        self.config.save_pretrained(str(folder))

    def __str__(self) -> str:
        width = max(len(module.name) for module in self.modules)
        lines = [
            f"LoRA of rank {self.rank}, {self.parameters:,} parameters, relative error {self.relative_error:.2g}",
            "",
            f"{'module':{width}}  rank  exact rank    ||Δ||     error   energy",
        ]
        for module in self.modules:
            lines.append(
                f"{module.name:{width}}  {module.rank:4d}  {module.exact_rank:10d}  {module.norm:7.4g}  "
                f"{module.relative_error:8.2e}  {100 * module.energy:6.2f}%"
            )
        return "\n".join(lines)


def export_lora(
    model: PeftModel | EditModel,
    rank: int | None = None,
    energy: float | None = None,
    adapter_name: str | None = None,
    output_dir: str | os.PathLike | None = None,
    uniform: bool = True,
    all_layers: bool = False,
    dtype: torch.dtype = torch.float32,
) -> LoraExport:
    """Makes a standard LoRA adapter of an edit adapter, by a truncated singular value decomposition of each delta.

    No other approximation of that rank is closer in the Frobenius norm (Eckart and Young, 1936). With neither `rank`
    nor `energy` the form is exact: the delta of a ridge update has no more singular values than the adapter has facts.
    The model is not changed. A quantised base plays no part: only deltas are exported.

    Args:
        model (`PeftModel` or `EditModel`): The model with the edit adapter.
        rank (`int`, *optional*): The largest rank of a module; lower where the delta has no more.
        energy (`float`, *optional*): Instead of a rank: each module takes the smallest that keeps this share of
            ||Δ||_F², above 0 and at most 1.
        adapter_name (`str`, *optional*): The edit adapter; by default the active one.
        output_dir (`str`, *optional*): Directory to write the adapter to.
        uniform (`bool`): One rank for all modules, the largest that any of them needs. Servers ask for it: llama.cpp
            divides one alpha by the rank of each tensor, so that ranks that differ would be scaled wrongly there.
            False: each its own, through `rank_pattern` and `alpha_pattern`.
        all_layers (`bool`): Give the same modules of all other blocks a LoRA of zeros. Text Generation Inference asks
            for it: it passes over modules that not every block has.
        dtype (`torch.dtype`): Dtype of the stored matrices; the errors reported include its rounding.

    Returns:
        `LoraExport`

    Raises:
        TypeError: if the model has no edit adapter type.
        ValueError: if an argument is out of range, the adapter is unknown, empty or not finite, it has
            `modules_to_save`, or `output_dir` holds an edit adapter.
    """
    check_request(rank, energy, uniform, all_layers, dtype)
    if output_dir is not None:
        check_output_dir(Path(output_dir))
    tuner = edit_tuner(model)
    name = exported_adapter(tuner, adapter_name)
    layers = tuner.edit_layers(name)
    spectra = {}
    for module, layer in layers.items():
        delta = layer.get_delta(name)
        if not bool(torch.isfinite(delta).all()):
            raise ValueError(
                f"The delta of '{module}' holds values that are not finite numbers; nothing was exported."
            )
        if bool(delta.any()):
            spectra[module] = Spectrum.of(delta)
    if not spectra:
        raise ValueError(f"Adapter {name!r} has no delta to export: edit facts first.")
    ranks = {module: spectrum.choose_rank(rank, energy) for module, spectrum in spectra.items()}
    if uniform:
        ranks = dict.fromkeys(ranks, max(ranks.values()))
    tensors: dict[str, torch.Tensor] = {}
    modules = []
    for module, spectrum in spectra.items():
        delta = layers[module].get_delta(name)
        down, up = (factor.to("cpu", dtype).contiguous() for factor in spectrum.factors(delta, ranks[module]))
        if not bool(torch.isfinite(down).all() and torch.isfinite(up).all()):
            raise ValueError(f"The LoRA of '{module}' does not fit into {dtype}: export it in float32 or bfloat16.")
        tensors |= lora_tensors(module, down, up)
        modules.append(report_module(module, delta, down, up, spectrum))
    if all_layers:
        largest = max(ranks.values())
        for module, (d_in, d_out) in counterparts(tuner.model, spectra).items():
            zeros = torch.zeros(largest, d_in, dtype=dtype), torch.zeros(d_out, largest, dtype=dtype)
            tensors |= lora_tensors(module, *zeros)
    fan_in_fan_out = all(layer.is_transposed for layer in layers.values())
    config = lora_config(tuner.peft_config[name], ranks, tensors, fan_in_fan_out)
    export = LoraExport(config, tensors, tuple(modules))
    if output_dir is not None:
        export.save(output_dir)
    return export


# --- what is asked for -------------------------------------------------------------------------------------------


def check_request(rank: int | None, energy: float | None, uniform: bool, all_layers: bool, dtype: torch.dtype) -> None:
    """Raises a ValueError that names the argument and its range."""
    if rank is not None and energy is not None:
        raise ValueError(f"Give rank or energy, not both (rank={rank!r}, energy={energy!r}).")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"rank must be a whole number >= 1, or None for the exact form, got {rank!r}.")
    if energy is not None and not (isinstance(energy, (int, float)) and 0 < energy <= 1):
        raise ValueError(f"energy must be a share of ||Δ||_F² above 0 and at most 1, such as 0.99, got {energy!r}.")
    if all_layers and not uniform:
        raise ValueError("all_layers=True needs uniform=True: the servers that ask for it stack all blocks.")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point dtype such as torch.bfloat16, got {dtype}.")


def check_output_dir(folder: Path) -> None:
    """Raises a ValueError if the directory holds an edit adapter."""
    try:
        kind = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")).get("peft_type")
    except (OSError, ValueError, AttributeError):
        return
    if kind == "EDIT":
        raise ValueError(
            f"'{folder}' holds an edit adapter, which the LoRA would overwrite: choose another directory."
        )


def edit_tuner(model: Any) -> EditModel:
    """The `EditModel` of a model.

    Raises:
        TypeError: if it is of another kind.
    """
    tuner = model.base_model if isinstance(model, PeftModel) else model
    if not isinstance(tuner, EditModel):
        kind = type(model).__name__ + (f" around a {type(tuner).__name__}" if tuner is not model else "")
        raise TypeError(
            f"export_lora needs the model with the edit adapter, as get_peft_model(model, EditConfig(...)) or "
            f"PeftModel.from_pretrained gave it, got a {kind}."
        )
    return tuner


def exported_adapter(tuner: EditModel, adapter_name: str | None) -> str:
    """The adapter that is meant, or a ValueError that lists those there are."""
    known = [name for name in tuner.peft_config if tuner.edit_layers(name)]
    if adapter_name is None:
        active = [name for name in tuner.active_adapters if name in known]
        if len(active) != 1:
            raise ValueError(f"The active edit adapters are {active}: name one of {known} with adapter_name=.")
        adapter_name = active[0]
    if adapter_name not in known:
        raise ValueError(f"There is no edit adapter {adapter_name!r}; there are {known}.")
    if tuner.peft_config[adapter_name].modules_to_save:
        raise ValueError(
            f"Adapter {adapter_name!r} has modules_to_save, which LoRA servers do not load: use merge_and_unload()."
        )
    return adapter_name


# --- the decomposition -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spectrum:
    """Singular vectors of the shorter side of a delta, and what each of them carries.

    They are eigenvectors of the Gram matrix in float64. Its eigenvalues are squares and lose the small singular
    values; so these are measured anew, as norms of the delta's projections, and hold down to 1e-8 of the largest.

    Args:
        vectors (`torch.Tensor`): (m, m) orthonormal columns, m = min(d_out, d_in); float64.
        energies (`torch.Tensor`): (m,) squared singular values, falling; float64.
    """

    vectors: torch.Tensor
    energies: torch.Tensor

    @classmethod
    def of(cls, delta: torch.Tensor) -> Spectrum:
        """Decomposes a delta, (d_out, d_in), on its own device (MPS has no float64: on the CPU)."""
        wide = _as_wide(delta)
        vectors = torch.linalg.eigh(wide @ wide.T).eigenvectors
        energies = (vectors.T @ wide).square().sum(1)
        order = energies.argsort(descending=True, stable=True)
        return cls(vectors[:, order], energies[order])

    @property
    def exact_rank(self) -> int:
        """The smallest rank whose relative error is below `EXACT`."""
        return self._smallest(EXACT**2)

    def choose_rank(self, rank: int | None, energy: float | None) -> int:
        """At most `rank`, or the smallest that keeps `energy`, or the exact one; never more than the exact one."""
        if energy is not None:
            return min(self._smallest(1 - energy), self.exact_rank)
        return self.exact_rank if rank is None else min(rank, self.exact_rank)

    def _smallest(self, share: float) -> int:
        """The smallest rank, at least 1, that leaves out at most this share of the energy."""
        left_out = self.energies.flip(0).cumsum(0).flip(0)  # by ranks 0, 1, ..., m - 1
        return max(1, int((left_out > share * left_out[0]).sum()))

    def factors(self, delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A (rank, d_in) and B (d_out, rank) with BA the best approximation of that rank; float64.

        Each singular value is shared out evenly, so that both factors fit into half precision. Past m they are zero.
        """
        kept = self.vectors[:, :rank]
        halves = self.energies[:rank].pow(0.25)
        inner = torch.where(halves > 0, 1 / halves, 0.0)[:, None] * (kept.T @ _as_wide(delta))
        short, long = _padded(halves * kept, rank, 1), _padded(inner, rank, 0)
        return (long, short) if delta.shape[0] <= delta.shape[1] else (short.T, long.T)


def _as_wide(delta: torch.Tensor) -> torch.Tensor:
    """In float64, with the shorter side first."""
    delta = (delta.cpu() if delta.device.type == "mps" else delta).double()
    return delta if delta.shape[0] <= delta.shape[1] else delta.T


def _padded(factor: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
    missing = rank - factor.shape[dim]
    if missing <= 0:
        return factor
    shape = [missing if axis == dim else size for axis, size in enumerate(factor.shape)]
    return torch.cat([factor, factor.new_zeros(shape)], dim)


def report_module(
    name: str, delta: torch.Tensor, down: torch.Tensor, up: torch.Tensor, spectrum: Spectrum
) -> ExportedModule:
    """The figures of one module; its error is that of the factors as they are stored."""
    delta = delta.to("cpu", torch.float64)
    norm = float(delta.norm())
    error = float((delta - up.double() @ down.double()).norm()) / norm
    energy = float(spectrum.energies[: len(down)].sum() / spectrum.energies.sum())
    return ExportedModule(name, len(down), spectrum.exact_rank, norm, error, energy)


# --- the adapter -------------------------------------------------------------------------------------------------


def lora_tensors(module: str, down: torch.Tensor, up: torch.Tensor) -> dict[str, torch.Tensor]:
    """One module's A and B under PEFT's names."""
    return {
        f"base_model.model.{module}.lora_A.weight": down,
        f"base_model.model.{module}.lora_B.weight": up,
    }


def lora_config(
    source: EditConfig, ranks: Mapping[str, int], tensors: Iterable[str], fan_in_fan_out: bool
) -> LoraConfig:
    """The config for these ranks; modules are named in full, so that no other module is meant."""
    largest = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != largest}
    config = LoraConfig(
        task_type=source.task_type,
        base_model_name_or_path=source.base_model_name_or_path,
        revision=source.revision,
        r=largest,
        lora_alpha=largest,
        rank_pattern=others,
        alpha_pattern=dict(others),
        fan_in_fan_out=fan_in_fan_out,
        inference_mode=True,
    )
    config.target_modules = sorted({name.removeprefix("base_model.model.").rsplit(".", 2)[0] for name in tensors})
    return config


def counterparts(model: nn.Module, modules: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(d_in, d_out) of the modules that differ from exported ones in the block's number only."""
    exported = set(modules)
    patterns = {_split_at_block(name) for name in exported}
    found = {}
    for name, module in model.named_modules():
        plain = name.replace(".base_layer", "")
        numbered = any(part.isdigit() for part in plain.split("."))
        if plain in exported or plain in found or not numbered or _split_at_block(plain) not in patterns:
            continue
        if isinstance(module, Conv1D):
            found[plain] = module.nx, module.nf
        elif hasattr(module, "in_features"):
            found[plain] = module.in_features, module.out_features
    return found


def _split_at_block(name: str) -> tuple[str, str]:
    """What stands before and after the block's number."""
    before, _, after = name.partition(f".{block_index(name)}.")
    return before, after
