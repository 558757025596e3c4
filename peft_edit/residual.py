"""How the output of an edited module enters the residual stream, found by probing the block itself.

Targets are wanted in the residual stream, values are written at the output of the down-projection. In most models the
two are the same (the block adds the MLP's output); some scale it first (Granite), some normalise it first (Gemma 2 and
3, OLMo 2). A probe tells which, so that no architecture has to be named here.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from .hooks import StopForward, on_input, on_output
from .sharded import until_stopped


@dataclass(frozen=True)
class ResidualPath:
    """The way from a module's output `u` to the block's output `z`: `z = rest + scale * norm(u)`, norm optional.

    Args:
        scale (`float`): Factor in front of the module's output.
        norm (`nn.Module`, *optional*): RMS norm between the module and the residual stream.
    """

    scale: float = 1.0
    norm: nn.Module | None = None

    def push(self, output: torch.Tensor, increment: torch.Tensor) -> torch.Tensor:
        """The change of the block's output when the module's output changes by `increment`; both (..., d_model)."""
        if self.norm is None:
            return increment if self.scale == 1.0 else increment * self.scale
        return self.scale * (self._normed(output + increment) - self._normed(output))

    def pull(self, output: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """The increment of the module's output that changes the block's output by `change`; both (..., d_model).

        Exact for a change that the norm can express. For another it is the one in the same direction: behind a norm
        the length of the module's output hardly counts, so it is kept.
        """
        if self.norm is None:
            return change if self.scale == 1.0 else change / self.scale
        gain = self._gain(output)
        usable = gain.abs() > 1e-4 * gain.abs().amax(-1, keepdim=True)
        wanted = (self._normed(output) + change / self.scale) / torch.where(usable, gain, torch.ones_like(gain))
        size, epsilon = wanted.square().mean(-1, keepdim=True), self._epsilon()
        length = output.square().mean(-1, keepdim=True)
        # norm(s q) = w q s / sqrt(s² mean(q²) + ε) is w q at s² = ε / (1 − mean(q²)), where mean(q²) < 1.
        exact = epsilon / (1 - size).clamp_min(1e-12)
        small = (epsilon > 1e-4 * length) & (size < 1) & (exact < 1e4 * length.clamp_min(epsilon))
        factor = torch.where(small, exact, length / size.clamp_min(1e-12)).sqrt()
        return torch.where(usable, wanted * factor - output, torch.zeros_like(output))

    def unit(self, output: torch.Tensor) -> torch.Tensor:
        """Length of an increment of `u` per unit of change in the residual stream, (..., 1), for scaling only."""
        if self.norm is None:
            return torch.full_like(output[..., :1], 1.0 / abs(self.scale))
        change = abs(self.scale) * self._normed(output).norm(dim=-1, keepdim=True)
        return output.norm(dim=-1, keepdim=True) / change.clamp_min(torch.finfo(output.dtype).tiny)

    def _normed(self, output: torch.Tensor) -> torch.Tensor:
        assert self.norm is not None
        return self.norm(output)

    def _epsilon(self) -> float:
        return float(getattr(self.norm, "variance_epsilon", getattr(self.norm, "eps", 0.0)) or 0.0)

    def _gain(self, output: torch.Tensor) -> torch.Tensor:
        return self._normed(torch.ones_like(output[..., :1]).expand_as(output).contiguous())


def probe_residual_path(
    model: nn.Module, block: nn.Module, module: nn.Module, input_ids: torch.Tensor
) -> ResidualPath | None:
    """Finds the path by moving the module's output a little and looking at the block's output.

    Args:
        model: The causal language model, in eval mode.
        block: The decoder block that holds the module.
        module: The edited module.
        input_ids (`torch.LongTensor`): One sequence, (1, tokens); the last position is probed.

    Returns:
        `ResidualPath`, or None where the module's output reaches the residual stream in another way.

    Raises:
        ValueError: if the output is not as wide as the residual stream.
    """
    norms = [child for child in block.modules() if child is not module and "norm" in type(child).__name__.lower()]

    def run(shift: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, list[nn.Module]]:
        seen: dict[str, torch.Tensor] = {}
        fed: list[nn.Module] = []

        def at_module(hidden: torch.Tensor) -> torch.Tensor | None:
            moved = hidden.reshape(-1, hidden.shape[-1]).clone()  # some blocks flatten batch and positions
            if shift is not None:
                moved[-1] += shift.to(hidden)
            seen["output"] = moved[-1].detach().clone()
            return None if shift is None else moved.reshape(hidden.shape)

        def at_block(hidden: torch.Tensor) -> None:
            seen["block"] = hidden.reshape(-1, hidden.shape[-1])[-1].detach().clone()
            raise StopForward

        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(on_output(module, at_module))
            for norm in norms:

                def at_norm(hidden: torch.Tensor, norm: nn.Module = norm) -> None:
                    if "output" in seen and hidden.shape[-1] == seen["output"].shape[-1]:
                        if torch.equal(hidden.reshape(-1, hidden.shape[-1])[-1], seen["output"].to(hidden.device)):
                            fed.append(norm)

                stack.enter_context(on_input(norm, at_norm))
            stack.enter_context(on_output(block, at_block))
            with until_stopped(model):
                model(input_ids=input_ids, use_cache=False)
        return seen["output"], seen["block"], fed

    output, before, fed = run(None)
    if output.shape != before.shape:
        raise ValueError(
            f"A module of type {type(module).__name__} has {len(output)} outputs where the residual stream is "
            f"{len(before)} wide: facts are written into modules that write to the stream, such as MLP "
            "down-projections; name those in target_modules."
        )
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(output.shape, generator=generator).to(output)
    shift = probe * (0.5 * output.float().norm() / probe.float().norm()).clamp_min(1e-3).to(output)
    moved, after, _ = run(shift)
    increment = (moved - output).double()
    change = (after.double() - before.double()).to(increment.device)
    noise = 4 * torch.finfo(output.dtype).eps * max(float(before.double().norm()), float(after.double().norm()))
    tolerance = 0.02 * float(change.norm()) + noise
    for norm in fed:
        expected = (norm(moved) - norm(output)).detach().double().to(change.device)
        scale = _rounded(float(change @ expected / (expected @ expected).clamp_min(1e-300)))
        scale = 1.0 if abs(scale - 1.0) * float(expected.norm()) <= tolerance else scale
        path = ResidualPath(scale=scale, norm=norm)
        with torch.no_grad():
            recovered = path.push(output, path.pull(output, path.push(output, increment.to(output))))
        if float((change - scale * expected).norm()) <= tolerance and (
            float((recovered.double().to(change.device) - change).norm()) <= tolerance
        ):
            return path
    # No norm is fed with the module's output: addition, scaled or not.
    scale = _rounded(float(change @ increment / (increment @ increment)))
    if float((change - scale * increment).norm()) <= tolerance:
        return ResidualPath(scale=1.0 if abs(scale - 1.0) * float(increment.norm()) <= tolerance else scale)
    return None


def _rounded(scale: float) -> float:
    """To five digits: a model's constant, not the rounding of one probe."""
    return float(f"{scale:.5g}")
