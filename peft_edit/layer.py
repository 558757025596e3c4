"""The adapter layer: `y = W0 x + Δ x` on a linear module, one Δ per adapter."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import MutableMapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.pytorch_utils import Conv1D

from .config import EditConfig
from .quantised import unpacked
from .sharded import put, whole


class EditLayer(BaseTunerLayer):
    """What every edited module has: a delta per adapter, kept as a bias-free linear module that is called as such.

    (Called modules are what accelerate's offloading hooks work on; a bare parameter would be silently wrong there.)
    """

    adapter_layer_names: tuple[str, ...] = ("edit_delta",)
    base_layer: nn.Module
    in_features: int
    out_features: int

    def __init__(self, base_layer: nn.Module, get_apply_tensor_subclass: Any = None) -> None:
        self.base_layer = base_layer
        self.edit_delta = nn.ModuleDict({})
        self._compute_copies: dict[str, tuple[torch.Tensor, tuple]] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # The base, kept while adapters are merged: its weight, or a quantised module whole (in a tuple, or it would be
        # a submodule), since backends keep scales beside the weight and replace either.
        self.unmerged_weight: torch.Tensor | None = None
        self.unmerged_module: tuple[nn.Module] | None = None
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=get_apply_tensor_subclass
        )
        base: Any = self.get_base_layer()
        self.is_transposed = isinstance(base, Conv1D)
        if self.is_transposed:
            self.in_features, self.out_features = base.nx, base.nf
        else:
            self.in_features, self.out_features = base.in_features, base.out_features

    def update_layer(self, adapter_name: str, config: EditConfig) -> None:
        """Adds an adapter: Δ = 0, or random for `init_weights=False`."""
        delta = nn.Linear(self.in_features, self.out_features, bias=False, dtype=self._delta_dtype())
        if config.init_weights:
            nn.init.zeros_(delta.weight)
        else:
            nn.init.normal_(delta.weight, std=0.02)
        self.edit_delta[adapter_name] = delta
        if not config.trainable and config.init_weights:
            self.frozen_peft_weight_names = {**self.frozen_peft_weight_names, adapter_name: self.adapter_layer_names}
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _delta_dtype(self) -> torch.dtype:
        """float32 whatever the base, so that small edits survive; float64 on a float64 base."""
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        return torch.float64 if dtype == torch.float64 else torch.float32

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Moves the delta, and never rounds it to the base's dtype."""
        if device is None:
            device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if adapter_name not in self.edit_delta or device is None or device.type == "meta":
            return
        delta: Any = self.edit_delta[adapter_name]
        if delta.weight.device.type != "meta":
            delta.to(device)

    # --- the delta itself --------------------------------------------------------------------------------------

    def get_delta(self, adapter_name: str) -> torch.Tensor:
        """The adapter's delta, (d_out, d_in), detached and not copied; also where accelerate keeps it offloaded."""
        delta: Any = self.edit_delta[adapter_name]
        if delta.weight.device.type != "meta":
            return whole(delta.weight.detach())
        weights, key = _offloaded_weight(delta)
        return weights[key]

    def set_delta(self, adapter_name: str, value: torch.Tensor) -> None:
        """Replaces the adapter's delta; the tensor that it had stays as it is.

        Args:
            adapter_name (`str`): The adapter.
            value (`torch.Tensor`): (d_out, d_in); cast to the delta's dtype and moved to its device.

        Raises:
            RuntimeError: if the adapter is merged.
            ValueError: if the shape does not fit.
        """
        if adapter_name in self.merged_adapters:
            raise RuntimeError(
                f"Adapter {adapter_name!r} is merged into the base weights: call unmerge_adapter() first."
            )
        if tuple(value.shape) != (self.out_features, self.in_features):
            raise ValueError(
                f"A delta of this module has shape {(self.out_features, self.in_features)}, got {tuple(value.shape)}."
            )
        delta: Any = self.edit_delta[adapter_name]
        value = value.detach()
        self._compute_copies.pop(adapter_name, None)
        if isinstance(delta.weight, DTensor):
            put(delta.weight, value)
            return
        if delta.weight.device.type != "meta":
            delta.weight.data = value.to(device=delta.weight.device, dtype=delta.weight.dtype)
            return
        weights, key = _offloaded_weight(delta)
        weights[key] = value.to(device="cpu", dtype=delta.weight.dtype)

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The delta in the layout of the base weight: (d_out, d_in), or (d_in, d_out) for Conv1D."""
        delta = self.get_delta(adapter_name)
        return delta.T if self.is_transposed else delta

    def get_base_weight(self) -> torch.Tensor:
        if self.quantization_backend is None:
            return super().get_base_weight()
        return self.quantization_backend.get_base_weight(unpacked(self.get_base_layer()))

    def base_norm(self) -> float:
        """||W0||_F of the unedited base weight, in float64; also while merged, offloaded or quantised."""
        return float(self._whole_base_weight().double().norm())

    def base_matrix(self) -> torch.Tensor:
        """W0, (d_out, d_in), wherever and however it is stored."""
        weight = self._whole_base_weight()
        return weight.T if self.is_transposed else weight

    def _whole_base_weight(self) -> torch.Tensor:
        base: Any = self.get_base_layer()
        if self.unmerged_module is not None:
            backend: Any = self.quantization_backend
            weight = backend.get_base_weight(unpacked(self.unmerged_module[0]))
        elif self.unmerged_weight is not None:
            weight = self.unmerged_weight
        else:
            weight = self.get_base_weight()
        if weight.device.type == "meta":
            weights, key = _offloaded_weight(base)
            weight = weights[key]
        return whole(weight.detach())

    def delete_adapter(self, adapter_name: str) -> None:
        self._compute_copies.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    # --- multiplying with it -----------------------------------------------------------------------------------

    def _add_change(self, adapter_name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """`result` plus the delta times `x`, in the dtype of `result`."""
        weight = self._compute_weight(adapter_name, x, result)
        if weight is None:
            delta: Any = self.edit_delta[adapter_name]
            return result + delta(self._cast_input_dtype(x, delta.weight.dtype)).to(result.dtype)
        rows = x.to(result.dtype).reshape(-1, self.in_features)
        # One operation: the product is added before it is rounded, and not written to memory in between.
        return torch.addmm(result.reshape(-1, self.out_features), rows, weight.T).reshape(result.shape)

    def _compute_weight(self, adapter_name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor | None:
        """The delta in the dtype of `result`, copied where it is another one; None if the module must be called.

        A copy is kept until the delta changes. Like autograd, this notices every change but one in place through
        `weight.data`.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # would take a copy for a constant
            return None
        delta: Any = self.edit_delta[adapter_name]
        plain = x.device == result.device and _only_multiplies(delta, result)
        if not plain or delta.weight.dtype == result.dtype:
            self._compute_copies.pop(adapter_name, None)
            return delta.weight if plain else None
        state = _state_of(delta.weight)
        copied, copied_state = self._compute_copies.get(adapter_name, (None, None))
        if copied is None or copied.dtype != result.dtype or copied_state != state:
            with torch.inference_mode(False), torch.no_grad():  # a later call may need a gradient
                copied = delta.weight.detach().to(result.dtype)
            self._compute_copies[adapter_name] = (copied, state)
        return copied

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """A delta is a plain matrix, so PEFT can factor it."""
        return True


class EditLinear(nn.Module, EditLayer):
    """An edited `nn.Linear`, `Conv1D` or quantised linear module.

    Args:
        base_layer (`nn.Module`): The module, or a tuner layer around it.
        adapter_name (`str`): First adapter.
        config (`EditConfig`): Its settings.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: EditConfig, **quantization: Any) -> None:
        super().__init__()
        EditLayer.__init__(self, base_layer, **quantization)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compute_copies": {}}

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._compute_copies.clear()
        return super()._apply(*args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds deltas to the base weight, which is kept for `unmerge`.

        Args:
            safe_merge (`bool`): Check that the result is finite before anything is changed.
            adapter_names (`list[str]`, *optional*): Adapters to merge; by default the active ones.

        Raises:
            ValueError: with `safe_merge`, if the merged weight is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.edit_delta]
        if not names:
            return
        merged = self.get_base_weight()
        for name in names:
            merged = self._with_delta(merged, name)
            if safe_merge and not bool(torch.isfinite(merged).all()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        if not self.merged:
            self._keep_base()
        self.set_base_weight(merged)
        self._compute_copies.clear()
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Puts the kept base weight back, bit for bit.

        If another type of adapter was merged into, or out of, the same weight since, the kept weight is not the right
        one: then the deltas alone are taken out, to rounding.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self.unmerged_module is not None:
            self._unmerge_quantised(self.unmerged_module[0])
        else:
            self._unmerge_weight(self.get_base_layer(), self.unmerged_weight)
        self.unmerged_weight = self.unmerged_module = None
        self.merged_adapters.clear()

    def _keep_base(self) -> None:
        base: Any = self.get_base_layer()
        if self.quantization_backend is None:
            self.unmerged_weight = base.weight.data
        else:
            self.unmerged_module = (base,)
            self._replace_base(copy.deepcopy(base))

    def _unmerge_weight(self, base: Any, kept: Any) -> None:
        now = base.weight.data
        kept = expected = kept.to(now.device)
        for name in self.merged_adapters:
            expected = self._with_delta(expected, name)
        if torch.allclose(expected.to(now.dtype), now, rtol=0, atol=0, equal_nan=True):
            base.weight.data = kept.to(now.dtype)
        else:
            wide = torch.promote_types(now.dtype, self._delta_dtype())
            base.weight.data = (now.to(wide) - (expected.to(wide) - kept.to(wide))).to(now.dtype)

    def _unmerge_quantised(self, kept: nn.Module) -> None:
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        moved = device is not None and device != self._get_base_layer_device_and_dtype(kept)[0]
        self._replace_base(kept.to(device) if moved else kept)

    def _replace_base(self, module: nn.Module) -> None:
        """Puts a module in the place of the innermost base layer (there may be tuner layers in between)."""
        layer: Any = self
        while isinstance(layer.base_layer, BaseTunerLayer):
            layer = layer.base_layer
        layer.base_layer = module

    def _with_delta(self, weight: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """`weight` plus the delta, added in the wider of the two dtypes and rounded to that of `weight`."""
        delta = self.get_delta_weight(adapter_name)
        wide = torch.promote_types(weight.dtype, delta.dtype)
        return (weight.to(wide) + delta.to(device=weight.device, dtype=wide)).to(weight.dtype)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_forward(x, *args, adapter_names=adapter_names, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if not self.merged:
            for name in self.active_adapters:
                if name in self.edit_delta:
                    result = self._add_change(name, x, result)
        return result

    def _mixed_forward(self, x: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> torch.Tensor:
        """Each sample with its own adapter; "__base__" for none."""
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        beams, rest = divmod(len(x), len(adapter_names))
        if rest:
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        per_sample = [name for name in adapter_names for _ in range(beams)]  # beam search repeats each input
        result = self.base_layer(x, *args, **kwargs)
        for name in dict.fromkeys(per_sample):
            if name in self.edit_delta:
                rows = torch.tensor([i for i, chosen in enumerate(per_sample) if chosen == name], device=x.device)
                result = result.index_copy(0, rows, self._add_change(name, x[rows], result[rows]))
        return result

    def __repr__(self) -> str:
        return "edit." + super().__repr__()


def _state_of(weight: torch.Tensor) -> tuple[StorageWeakRef, int, int]:
    """Differs once the weight has changed. (While a weak reference is held, no other storage is taken for its own.)"""
    return StorageWeakRef(weight.untyped_storage()), weight.data_ptr(), weight._version


def _only_multiplies(delta: nn.Module, result: torch.Tensor) -> bool:
    """Whether calling the module would multiply with a weight at hand that is not being trained, and nothing else."""
    weight: Any = delta.weight
    kind = result.device.type
    return (
        type(delta) is nn.Linear
        and type(weight) is nn.Parameter  # no DTensor or other subclass
        and weight.device == result.device
        and kind != "meta"
        and not (weight.requires_grad and torch.is_grad_enabled())
        and not weight.is_inference()  # has no version
        and not hasattr(delta, "_hf_hook")
        and not (delta._forward_pre_hooks or delta._forward_hooks)
        and not (torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != result.dtype)
    )


def delta_norm(delta: torch.Tensor) -> float:
    """||Δ||_F, the same for a delta that has been saved and loaded."""
    return float(delta.float().norm())


def same_norm(norm: float, expected: float, dtype: torch.dtype) -> bool:
    """Whether two norms differ by no more than rounding to that dtype explains."""
    return math.isclose(norm, expected, rel_tol=2e-2 if dtype.itemsize == 2 else 1e-4)


def unwrapped_name(name: str) -> str:
    """A module's (or tensor's) name as it is without another adapter, such as a LoRA, around an edited module."""
    return re.sub(r"\.base_layer(?=$|\.edit_delta\.)", "", name)


def _offloaded_weight(module: nn.Module) -> tuple[MutableMapping[str, torch.Tensor], str]:
    """Where accelerate keeps the weight of a module that it has offloaded to CPU or disk: a mapping and a key."""
    weights: Any = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    key = "weight"
    if weights is None:
        raise RuntimeError("A weight is on the meta device without offloading: load the adapter's weights first.")
    while hasattr(weights, "dataset"):  # a view on a larger store
        key = weights.prefix + key
        weights = weights.dataset
    if hasattr(weights, "state_dict"):  # a disk loader; what it holds in memory goes first
        if key not in weights.state_dict:
            weights.state_dict[key] = weights[key]
        weights = weights.state_dict
    return weights, key
