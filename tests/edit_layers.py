"""Edit layers with random deltas around small base layers of every kind and dtype."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_edit import EditConfig
from peft_edit.layer import EditLinear


D_IN, D_OUT = 6, 4
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
RANDOM = EditConfig(target_modules=["x"], init_weights=False)


def base_layer(kind: str = "linear", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return (nn.Linear(D_IN, D_OUT) if kind == "linear" else Conv1D(D_OUT, D_IN)).to(dtype)


def edited(kind: str = "linear", dtype: torch.dtype = torch.float32, adapters=("default",)) -> EditLinear:
    """A layer with random deltas, all of them active."""
    layer = EditLinear(base_layer(kind, dtype), adapters[0], RANDOM)
    for name in adapters[1:]:
        layer.update_layer(name, RANDOM)
    layer.set_adapter(list(adapters))
    return layer.requires_grad_(False)


kinds = pytest.mark.parametrize("kind", ("linear", "conv1d"))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
