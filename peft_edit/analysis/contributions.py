"""What attention, MLP and edits add to the residual stream, layer by layer (after figure 4 of arXiv 2502.01636).

Under many edits the outputs of edited layers can grow until they make up most of the residual stream, which the layers
above then read in the place of everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..architectures import find_blocks
from ..facts import Fact
from ..hooks import StopForward, evaluating, on_output
from ..prompts import PromptEncoder, context_window
from ..residual import ResidualPath, probe_residual_path
from ..sharded import until_stopped
from .passes import down_projections


PARTS = ("attention", "mlp", "edit")


@dataclass(frozen=True)
class Contributions:
    """Norms of what each block adds to the residual stream, as shares of the norm of the block's output h.

    The shares of a layer are of vectors and do not add up to 1. Each is a mean over positions; L layers.

    Args:
        attention (`list[float]`): (L,) ||attention's output|| / ||h||.
        mlp (`list[float]`): (L,) ||MLP's output|| / ||h||, edits included.
        edit (`list[float]`): (L,) ||what the edits change in the MLP's output|| / ||h||; 0 without an active adapter,
            or if it is merged.
        norm (`list[float]`): (L,) ||h||.
        positions (`int`): Positions that were averaged over.
    """

    attention: list[float]
    mlp: list[float]
    edit: list[float]
    norm: list[float]
    positions: int

    def to_dict(self) -> dict[str, Any]:
        """Plain Python containers, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{'layer':>5}  {'attention':>9}  {'MLP':>6}  {'edit':>6}  {'||h||':>8}"]
        for layer, values in enumerate(zip(self.attention, self.mlp, self.edit, self.norm)):
            attention, mlp, edit, norm = values
            lines.append(f"{layer:>5}  {attention:>9.3f}  {mlp:>6.3f}  {edit:>6.3f}  {norm:>8.2f}")
        return "\n".join(lines)


def residual_contributions(
    model: Any, tokenizer: Any, source: Sequence[Fact] | Sequence[str], batch_size: int = 32
) -> Contributions:
    """Measures what each block's sub-modules add to the residual stream.

    The MLP's part is taken as it enters the stream, behind a norm or factor where the architecture has one; the
    attention's part is the rest of what the block adds. For the state before edits call it under
    `model.disable_adapter()`.

    Args:
        model: A causal language model, a PEFT model or a plain one.
        tokenizer: Its (fast) tokenizer.
        source: Facts, measured at the subject's last token, or texts, averaged over their tokens without the first
            (on which many models rest attention, with a norm of its own).
        batch_size (`int`): Sequences in a pass.

    Returns:
        `Contributions`

    Raises:
        ValueError: if there is nothing to measure on, or a block adds its MLP's output in an unknown way.
    """
    sequences, chosen = _positions(model, tokenizer, list(source))
    if not any(chosen):
        raise ValueError("There is no token to measure on: give facts, or texts of at least two tokens.")
    blocks, writers = list(find_blocks(model)[1]), down_projections(model)
    device = model.get_input_embeddings().weight.device
    device = torch.device("cpu") if device.type == "meta" else device
    totals = torch.zeros(4, len(blocks), dtype=torch.float64)
    with evaluating(model), torch.no_grad():
        paths = _paths(model, blocks, writers, torch.tensor([sequences[0]], device=device))
        for start in range(0, len(sequences), batch_size):
            part = sequences[start : start + batch_size]
            width = max(map(len, part))
            ids = torch.tensor([[*own, *[0] * (width - len(own))] for own in part], device=device)
            mask = torch.tensor([[1] * len(own) + [0] * (width - len(own)) for own in part], device=device)
            places = [(row, column) for row in range(len(part)) for column in chosen[start + row]]
            rows, columns = torch.tensor(places).reshape(-1, 2).T
            seen = _read(model, blocks, writers, ids, mask, rows, columns)
            for layer, path in enumerate(paths):
                totals[:, layer] += _norms(seen[layer], path)
    count = sum(map(len, chosen))
    attention, mlp, edit, norm = (totals / count).tolist()
    return Contributions(attention, mlp, edit, norm, count)


def _norms(seen: dict[str, torch.Tensor], path: ResidualPath) -> torch.Tensor:
    """(4,) sums over positions of the shares of attention, MLP and edit and of the norm of the block's output."""
    before, after, output = (seen[name].double() for name in ("before", "after", "output"))
    zero = torch.zeros_like(seen["output"])
    # norm(0) = 0 for RMS norms, so a push from zero is the whole part.
    mlp = path.push(zero, seen["output"]).double().to(after.device)
    edit = zero.double()
    if "base" in seen:
        edit = path.push(seen["base"], seen["output"] - seen["base"]).double()
    size = after.norm(dim=-1)
    attention = after - before.to(after.device) - mlp
    shares = [part.norm(dim=-1).to(size.device) / size for part in (attention, mlp, edit)]
    return torch.stack([*(share.sum() for share in shares), size.sum()]).cpu()


def _read(
    model: Any,
    blocks: Sequence[nn.Module],
    writers: Sequence[nn.Module],
    ids: torch.Tensor,
    mask: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
) -> list[dict[str, torch.Tensor]]:
    """Of each block what enters and leaves it, its writer's output and, of an edited one, the base's, (n, d_model)."""
    seen: list[dict[str, torch.Tensor]] = [{} for _ in blocks]

    def keep(layer: int, name: str) -> Any:
        def read(hidden: torch.Tensor) -> None:
            states = hidden.reshape(*ids.shape, hidden.shape[-1])
            seen[layer][name] = states[rows.to(states.device), columns.to(states.device)]

        return read

    def entering(layer: int) -> Any:
        def read(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            keep(layer, "before")(args[0] if args else kwargs["hidden_states"])

        return read

    def stop(_module: nn.Module, _args: tuple, _output: Any) -> None:
        raise StopForward

    with ExitStack() as stack:
        for layer, (block, writer) in enumerate(zip(blocks, writers)):
            handle = block.register_forward_pre_hook(entering(layer), with_kwargs=True)
            stack.callback(handle.remove)
            stack.enter_context(on_output(block, keep(layer, "after")))
            stack.enter_context(on_output(writer, keep(layer, "output")))
            base = getattr(writer, "base_layer", None)
            if isinstance(base, nn.Module):
                stack.enter_context(on_output(base, keep(layer, "base")))
        handle = blocks[-1].register_forward_hook(stop)
        stack.callback(handle.remove)
        with until_stopped(model):
            model(input_ids=ids, attention_mask=mask, use_cache=False)
    return seen


def _paths(
    model: Any, blocks: Sequence[nn.Module], writers: Sequence[nn.Module], ids: torch.Tensor
) -> list[ResidualPath]:
    found = []
    for layer, (block, writer) in enumerate(zip(blocks, writers)):
        path = probe_residual_path(model, block, writer, ids)
        if path is None:
            raise ValueError(
                f"Block {layer} of {type(model).__name__} does not add its MLP's output to the residual stream, so "
                "what it contributes cannot be told apart."
            )
        found.append(path)
    return found


def _positions(model: Any, tokenizer: Any, source: list[Any]) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of each sequence, and the positions in it that are measured."""
    encoder = PromptEncoder(tokenizer, model.get_input_embeddings().num_embeddings, context_window(model.config))
    sequences, chosen = [], []
    for item in source:
        if isinstance(item, Fact):
            prompt = encoder.encode(item, item.prompt, "", None)
            sequences.append(list(prompt.ids[: prompt.subject_index + 1]))
            chosen.append([prompt.subject_index])
        else:
            ids = list(tokenizer(item)["input_ids"])[: encoder.max_length]
            if len(ids) > 1:
                sequences.append(ids)
                chosen.append(list(range(1, len(ids))))
    return sequences, chosen
