"""Edit adapters with random deltas on tiny models of several families: what they hold, what they answer."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_edit import EditConfig

from .models import NUM_LAYERS, build_model


SOME = ("gpt2", "opt", "gpt_neox", "llama", "qwen2")  # Conv1D, biases, parallel and gated MLPs, tied heads
some = pytest.mark.parametrize("family", SOME)
dtypes = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
TOKENS = torch.tensor([[5, 9, 13, 7], [8, 3, 6, 11]])


def random_config(**changes) -> EditConfig:
    """An adapter on every block whose delta is random, so that it can be told from none."""
    return EditConfig(
        **{"task_type": "CAUSAL_LM", "layers_to_transform": list(range(NUM_LAYERS)), "init_weights": False, **changes}
    )


def random_adapter(family: str, dtype: torch.dtype = torch.float32, **changes) -> PeftModel:
    """A tiny model with such an adapter; same arguments, same weights and deltas."""
    torch.manual_seed(1)
    return get_peft_model(build_model(family, dtype), random_config(**changes)).eval()


@torch.no_grad()
def logits(model: nn.Module, tokens: torch.Tensor = TOKENS, **options) -> torch.Tensor:
    return model(tokens, **options).logits


def deltas(model: PeftModel, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    return {name: layer.get_delta(adapter_name) for name, layer in model.base_model.edit_layers(adapter_name).items()}


def same_deltas(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    same_dtypes = all(left[name].dtype == right[name].dtype for name in left)
    return left.keys() == right.keys() and same_dtypes and all(torch.equal(left[name], right[name]) for name in left)


def apart(left: torch.Tensor, right: torch.Tensor) -> float:
    """||left − right|| / ||right||."""
    return float((left.double() - right.double()).norm() / right.double().norm())


class Custom(nn.Module):
    """No transformers model; one module's name contains the parameter prefix."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.ModuleDict({"lin": nn.Linear(4, 4)}) for _ in range(3)])
        self.credit_head = nn.Linear(4, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer["lin"](x).tanh()
        return self.credit_head(x)
