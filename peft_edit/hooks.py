"""Reading and steering a forward pass from outside: every hook that peft-edit sets, all of them temporary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class StopForward(Exception):
    """Raised inside a forward pass once everything that was wanted has been read."""


def first_tensor(output: Any) -> torch.Tensor:
    """The hidden states in a block's output, which is a tensor or a tuple that begins with one."""
    return output[0] if isinstance(output, tuple) else output


def like_output(template: Any, hidden: torch.Tensor) -> Any:
    """`hidden` in the form (tensor or tuple) in which the block returns its output."""
    return (hidden, *template[1:]) if isinstance(template, tuple) else hidden


@contextmanager
def on_output(module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
    """Calls `function(hidden)` after the module; a tensor that it returns replaces the hidden states."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        replaced = function(first_tensor(output))
        return None if replaced is None else like_output(output, replaced)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def on_input(module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
    """Calls `function(hidden)` before the module; a tensor that it returns replaces the first argument."""

    def hook(_module: nn.Module, args: tuple) -> Any:
        replaced = function(args[0])
        return None if replaced is None else (replaced, *args[1:])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replaced_forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """The module runs `function` in the place of its own forward."""
    own = module.__dict__.get("forward")  # accelerate keeps its wrapper here
    module.forward = function
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off, and every module back in its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
