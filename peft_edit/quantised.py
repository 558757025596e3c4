"""Quantised base weights, where a backend needs help."""

from __future__ import annotations

import copy
from typing import Any


def unpacked(base: Any) -> Any:
    """The module, or a copy if bitsandbytes has given its 4-bit weight the CPU layout, which cannot be dequantised."""
    state = getattr(getattr(base, "weight", None), "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return base
    base = copy.deepcopy(base)
    base.state_dict()  # unpacks in place
    state = base.weight.quant_state
    if state.absmax.dim() == 2:  # forgotten by bitsandbytes 0.50
        state.absmax = state.absmax.T.reshape(-1).float()
    return base
