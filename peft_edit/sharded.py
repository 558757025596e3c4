"""Weights that are spread over processes (FSDP2): each holds a part, and forward passes gather them block by block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from .hooks import StopForward


def is_sharded(model: nn.Module) -> bool:
    """Whether weights of the model are spread over processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def check_started(model: nn.Module) -> None:
    """Whether FSDP knows its root, which it learns when the outermost module is called.

    Raises:
        RuntimeError: if not; the passes of an edit run the model inside, and a part would be taken for the root.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule) and module._get_fsdp_state()._is_root is None:
            raise RuntimeError(
                "The model is spread over processes but has not been run yet: call the prepared model once before "
                "editing, such as model(input_ids=torch.tensor([[1]])), in every process."
            )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor; every process has to ask for it if it is spread."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Writes a whole value into a parameter that is spread, each process its part."""
    assert isinstance(parameter, DTensor)
    value = value.to(device=parameter.device, dtype=parameter.dtype)
    part = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.to_local().copy_(part.to_local())


@contextmanager
def runnable(model: nn.Module) -> Iterator[None]:
    """The model can be run by itself, though FSDP gathers some weights only when the module around it is called.

    Those (as a rule the last norm) are gathered here, for the time being.
    """
    outside: list[tuple[nn.Module, str, nn.Parameter]] = []
    if is_sharded(model):
        check_started(model)
        parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for state in parts[0]._get_fsdp_state()._state_ctx.all_states:  # the module around it, too, gives up its own
            for module in state._modules:
                module.reshard()
        managed = {id(module) for part in parts for module in part.modules()}
        outside = [
            (module, name, parameter)
            for module in model.modules()
            if id(module) not in managed
            for name, parameter in module.named_parameters(recurse=False)
            if isinstance(parameter, DTensor)
        ]
    try:
        for module, name, parameter in outside:
            module._parameters[name] = nn.Parameter(whole(parameter.detach()), requires_grad=False)
        yield
    finally:
        for module, name, parameter in outside:
            module._parameters[name] = parameter


@contextmanager
def until_stopped(model: nn.Module) -> Iterator[None]:
    """A forward pass that may end early, by `StopForward`. Blocks that it leaves gathered are spread again."""
    try:
        yield
    except StopForward:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
