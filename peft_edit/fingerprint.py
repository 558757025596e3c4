"""A fingerprint of the base model, so that statistics and edits are not put on another one by mistake."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from .quantised import unpacked
from .sharded import whole


SAMPLES = 32

# Relative difference of the sampled weights (root mean square) up to which they count as the same. Loading in a
# narrower dtype moves them by up to half a percent, quantisation by up to a tenth; other models differ by more.
SAME_WEIGHTS = 0.02
SAME_QUANTISED_WEIGHTS = 0.3


def model_fingerprint(model: nn.Module, module_names: Sequence[str]) -> dict[str, Any]:
    """Shape and a few base weights of the model; independent of adapters, device and dtype.

    Args:
        model: The causal language model, adapters in place or not (not merged).
        module_names (`Sequence[str]`): The edited modules.

    Returns:
        `dict[str, Any]`: JSON-ready; `samples` holds `SAMPLES` weights of every module.
    """
    config = getattr(model, "config", None)
    samples = {}
    for name in module_names:
        weight = _base_weight(model.get_submodule(name))
        if weight is None:
            continue
        flat = whole(weight.detach()).flatten()
        places = torch.linspace(0, flat.numel() - 1, SAMPLES, device=flat.device, dtype=torch.float64).long()
        samples[name] = [round(float(value), 8) for value in flat[places].float().cpu()]
    return {
        "name_or_path": str(getattr(config, "_name_or_path", "") or ""),
        "model_type": getattr(config, "model_type", type(model).__name__),
        "hidden_size": getattr(config, "hidden_size", None),
        "num_hidden_layers": getattr(config, "num_hidden_layers", None),
        "vocab_size": getattr(config, "vocab_size", None),
        "samples": samples,
    }


def check_fingerprint(
    expected: Mapping[str, Any], actual: Mapping[str, Any], what: str, quantised: bool = False
) -> None:
    """Compares two fingerprints; `name_or_path` is informative only.

    Raises:
        ValueError: saying which part differs, in one sentence that begins with `what`.
    """
    for field in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        if expected.get(field) != actual.get(field):
            raise ValueError(
                f"{what} belong to another base model: {field} is {expected.get(field)!r} there and "
                f"{actual.get(field)!r} here{_named(expected)}."
            )
    for name, values in expected.get("samples", {}).items():
        if name not in actual["samples"]:
            continue
        there, here = torch.tensor(values).double(), torch.tensor(actual["samples"][name]).double()
        if len(there) != len(here):
            raise ValueError(f"{what} carry a damaged fingerprint for '{name}': collect or fetch them again.")
        apart = float((there - here).norm() / there.norm().clamp_min(1e-30))
        if not apart <= (SAME_QUANTISED_WEIGHTS if quantised else SAME_WEIGHTS):
            raise ValueError(
                f"{what} belong to another base model: the weights of '{name}' differ by {100 * apart:.1f} %"
                f"{_named(expected)}."
            )


def is_quantised(model: nn.Module) -> bool:
    """Whether the base weights are stored quantised."""
    return getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None


def _base_weight(module: nn.Module) -> torch.Tensor | None:
    """The unedited weight; None where it is out of reach (offloaded)."""
    base: Any
    weight: Any
    if isinstance(module, BaseTunerLayer):
        base = module.get_base_layer()
        weight = module.get_base_weight()
    else:
        base, weight = module, dequantize_module_weight(unpacked(module))
    if weight.device.type == "meta":
        hook = getattr(base, "_hf_hook", None)
        weights_map = getattr(hook, "weights_map", None)
        return weights_map["weight"] if weights_map is not None else None
    return weight


def _named(expected: Mapping[str, Any]) -> str:
    return f" (made on {expected['name_or_path']!r})" if expected.get("name_or_path") else ""
