"""Keys and value gradients of facts, all edited modules in one pass forward and back: what UltraEdit edits from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .hooks import on_input, on_output
from .prompts import FactPrompts, TokenizedPrompt
from .search.rows import width_buckets


SPARE_TOKENS = 256  # of padding that cost no more than another pass
MOST_ROWS = 64


@dataclass(frozen=True)
class FactGradients:
    """What one pass over F facts gives, for the bare prompts.

    Args:
        keys (`tuple[torch.Tensor, ...]`): Per module (F, d_in), its input at the subject's last token.
        gradients (`tuple[torch.Tensor, ...]`): Per module (F, d_out), of the target's negative log-likelihood, summed
            over its tokens, with respect to the module's output there; float32 or wider.
        converged (`torch.BoolTensor`): (F,) every target token is the most probable one already.
        probability (`torch.Tensor`): (F,) of the target (geometric mean over its tokens), before the edit.
        failed (`torch.BoolTensor`): (F,) something is not finite.
    """

    keys: tuple[torch.Tensor, ...]
    gradients: tuple[torch.Tensor, ...]
    converged: torch.Tensor
    probability: torch.Tensor
    failed: torch.Tensor

    @property
    def steps(self) -> torch.Tensor:
        """(F,) updates of a search: none."""
        return torch.zeros_like(self.failed, dtype=torch.long)

    def tensors(self) -> list[torch.Tensor]:
        """All of it, one row for each fact."""
        return [*self.keys, *self.gradients, self.converged, self.probability, self.failed]

    @classmethod
    def from_tensors(cls, tensors: Sequence[torch.Tensor]) -> FactGradients:
        """What `tensors` gave."""
        *pairs, converged, probability, failed = tensors
        half = len(pairs) // 2
        return cls(tuple(pairs[:half]), tuple(pairs[half:]), converged, probability, failed)

    def of(self, facts: Sequence[int]) -> FactGradients:
        """Of some of the facts."""
        return FactGradients.from_tensors([tensor[list(facts)] for tensor in self.tensors()])


def read_gradients(model: Any, modules: Mapping[str, nn.Module], prompts: Sequence[FactPrompts]) -> FactGradients:
    """Reads keys and value gradients of facts under the model as it stands.

    Args:
        model: The causal language model, in eval mode.
        modules (`Mapping[str, nn.Module]`): The edited modules.
        prompts (`Sequence[FactPrompts]`): The facts; only their bare prompts are run.

    Raises:
        torch.OutOfMemoryError: if not even one fact at a time fits.
    """
    rows = [fact.rows[0] for fact in prompts]
    buckets = width_buckets([len(row.ids) for row in rows], SPARE_TOKENS, MOST_ROWS)
    pieces, order = [], []
    while buckets:
        bucket = buckets.pop()
        try:
            pieces.append(_pass(model, modules, [rows[place] for place in bucket]))
            order += bucket
        except torch.OutOfMemoryError:
            if len(bucket) == 1:
                raise
            buckets += [bucket[len(bucket) // 2 :], bucket[: len(bucket) // 2]]
    back = torch.tensor(order).argsort()
    return FactGradients.from_tensors([torch.cat(each)[back.to(each[0].device)] for each in zip(*pieces)])


def _pass(model: Any, modules: Mapping[str, nn.Module], rows: Sequence[TokenizedPrompt]) -> list[torch.Tensor]:
    """One pass over n rows; as `FactGradients.tensors`."""
    device = model.get_input_embeddings().weight.device
    device = torch.device("cpu") if device.type == "meta" else device
    width = max(len(row.ids) for row in rows) - 1
    ids = torch.tensor([[*row.ids[:-1], *[0] * (width - len(row.ids) + 1)] for row in rows])
    mask = torch.tensor([[1] * (len(row.ids) - 1) + [0] * (width - len(row.ids) + 1) for row in rows])
    subjects = torch.tensor([row.subject_index for row in rows])
    places = torch.arange(len(rows))
    owners = torch.tensor([place for place, row in enumerate(rows) for _ in row.target_ids])
    columns = torch.tensor([column for row in rows for column in range(row.prompt_length - 1, len(row.ids) - 1)])
    labels = torch.tensor([token for row in rows for token in row.target_ids])
    keys: dict[str, torch.Tensor] = {}
    probes: dict[str, torch.Tensor] = {}

    def reading(name: str) -> Any:
        def read(hidden: torch.Tensor) -> None:
            hidden = hidden.detach().reshape(*ids.shape, -1)
            keys[name] = hidden[places.to(hidden.device), subjects.to(hidden.device)]

        return read

    def probing(name: str) -> Any:
        """Adds zeros whose gradient is that of the module's output."""

        def add(hidden: torch.Tensor) -> torch.Tensor:
            shape = hidden.shape
            probe = torch.zeros(len(rows), shape[-1], device=hidden.device, dtype=hidden.dtype, requires_grad=True)
            probes[name] = probe
            at = (places.to(hidden.device), subjects.to(hidden.device))
            return hidden.reshape(*ids.shape, -1).index_put(at, probe, accumulate=True).reshape(shape)

        return add

    def gather(hidden: torch.Tensor) -> torch.Tensor:
        return hidden[owners.to(hidden.device), columns.to(hidden.device)][None]

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(on_input(module, reading(name)))
            stack.enter_context(on_output(module, probing(name)))
        stack.enter_context(on_input(model.get_output_embeddings(), gather))
        stack.enter_context(torch.enable_grad())
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits[0]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        tokens, owners = labels.to(logits.device), owners.to(logits.device)
        losses = nn.functional.cross_entropy(logits, tokens, reduction="none")
        found = torch.autograd.grad(losses.sum(), [probes[name] for name in modules])
    gradients = [each.to(torch.promote_types(each.dtype, torch.float32)) for each in found]
    count = torch.bincount(owners, minlength=len(rows))
    total, missed = (
        torch.zeros(len(rows), device=logits.device, dtype=logits.dtype).index_add(0, owners, each.to(logits.dtype))
        for each in (losses.detach(), logits.argmax(-1) != tokens)
    )
    last = gradients[-1].device
    failed = ~total.isfinite().to(last)
    for each in _on(last, [*(keys[name] for name in modules), *gradients]):
        failed = failed | ~each.isfinite().all(-1)
    kept = [keys[name] for name in modules]
    return [*kept, *gradients, (missed == 0).to(last) & ~failed, (-total / count).exp().to(last), failed]


def _on(device: torch.device, tensors: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    return (tensor.to(device) for tensor in tensors)
