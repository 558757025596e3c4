"""The forward pass of the target search: from increments at the subject's last token to the logits that are read.

Two ways give the same answer. `FullForward` runs whole sequences through the whole model. `SplitForward` runs only
what depends on the increment: positions from the subject's last token on (what comes before is a read-only key/value
cache, by causality) and blocks above the edited one (its own output is remembered). Both apply the output head at the
positions that are read, and nowhere else.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from .hooks import like_output, on_input, on_output, replaced_forward
from .prompts import FactPrompts
from .residual import ResidualPath


@dataclass(frozen=True)
class SearchRows:
    """The sequences of some facts as padded tensors. F facts of R rows (the last is the essence prompt), N = F * R.

    Args:
        ids (`torch.LongTensor`): (N, T), right-padded; the last target token is not fed.
        lengths (`torch.LongTensor`): (N,).
        subject (`torch.LongTensor`): (N,) index of the subject's last token.
        read_positions (`torch.LongTensor`): (F, R, K) positions whose next-token logits are read.
        read_mask (`torch.BoolTensor`): (F, R, K) which of them exist.
        labels (`torch.LongTensor`): (F, R, K) target tokens; -1 where nothing is to be predicted (essence).
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    subject: torch.Tensor
    read_positions: torch.Tensor
    read_mask: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def from_prompts(cls, prompts: list[FactPrompts], device: torch.device | str = "cpu") -> SearchRows:
        """Pads the rows of all facts into one rectangle."""
        rows_per_fact = len(prompts[0].rows) + 1
        rows = [(row, True) for fact in prompts for row in fact.rows]
        width = max(len(row.target_ids) for row, _ in rows)
        sequences, subjects, positions, labels = [], [], [], []
        for fact in prompts:
            for row in fact.rows:
                sequences.append(row.ids[:-1])
                subjects.append(row.subject_index)
                reads = list(range(row.prompt_length - 1, len(row.ids) - 1))
                positions.append(reads + [-1] * (width - len(reads)))
                labels.append(list(row.target_ids) + [-1] * (width - len(reads)))
            sequences.append(fact.essence.ids)
            subjects.append(fact.essence.subject_index)
            positions.append([len(fact.essence.ids) - 1] + [-1] * (width - 1))
            labels.append([-1] * width)
        longest = max(map(len, sequences))
        shape = (len(prompts), rows_per_fact, width)
        read = torch.tensor(positions).reshape(shape)
        return cls(
            ids=torch.tensor([list(ids) + [0] * (longest - len(ids)) for ids in sequences]).to(device),
            lengths=torch.tensor([len(ids) for ids in sequences]).to(device),
            subject=torch.tensor(subjects).to(device),
            read_positions=read.clamp_min(0).to(device),
            read_mask=(read >= 0).to(device),
            labels=torch.tensor(labels).reshape(shape).to(device),
        )

    @property
    def rows_per_fact(self) -> int:
        return self.read_mask.shape[1]

    def of_facts(self, facts: torch.Tensor) -> torch.Tensor:
        """Row indices, (A * R,), of the given facts, (A,)."""
        steps = torch.arange(self.rows_per_fact, device=facts.device)
        return (facts[:, None] * self.rows_per_fact + steps).reshape(-1)


@dataclass(frozen=True)
class BaseStates:
    """What the model does before any increment, per fact.

    Args:
        hidden (`torch.Tensor`): (F, d_model) output of the edited block, bare prompt, subject's last token.
        module_output (`torch.Tensor`): (F, d_model) output of the edited module there.
        essence (`torch.Tensor`): (F, vocabulary) log-probabilities after the essence prompt, float32 or wider.
    """

    hidden: torch.Tensor
    module_output: torch.Tensor
    essence: torch.Tensor


@dataclass
class View:
    """The rows of the facts that are being searched at the moment, in the form that the forward pass takes.

    `read_rows`, `read_columns` (M,) say which hidden states reach the output head, `labels` (M,) what they should
    predict, `slots` (M,) the place of their row among the A * R rows of the view.
    """

    facts: torch.Tensor
    row_facts: torch.Tensor
    read_rows: torch.Tensor
    read_columns: torch.Tensor
    labels: torch.Tensor
    state: Any


class FullForward:
    """Whole sequences through the whole model, with the increment added at the module's output.

    Args:
        model: The causal language model.
        blocks (`list[nn.Module]`): Its decoder blocks.
        block_index (`int`): The block of the last edited module.
        module: The last edited module.
        path: How that module's output reaches the residual stream; None if unknown.
    """

    def __init__(
        self,
        model: Any,
        blocks: list[nn.Module],
        block_index: int,
        module: nn.Module,
        path: ResidualPath | None,
    ) -> None:
        self.model = model
        self.blocks = blocks
        self.block_index = block_index
        self.module = module
        self.path = path
        self.accepted = set(inspect.signature(model.forward).parameters)
        self.rows: SearchRows
        self.base: BaseStates

    # --- before the search -------------------------------------------------------------------------------------

    def prepare(self, rows: SearchRows, chunk: int = 64) -> BaseStates:
        """Runs the rows once, without gradient, and keeps what the search reads. `chunk` is a number of facts."""
        self.rows = rows
        pieces = []
        count = rows.read_mask.shape[0]
        for start in range(0, count, chunk):
            facts = torch.arange(start, min(start + chunk, count), device=rows.ids.device)
            pieces.append(self._prepare_chunk(facts))
        self.base = BaseStates(*(torch.cat(parts) for parts in zip(*pieces)))
        return self.base

    def _prepare_chunk(self, facts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = self.rows
        index = rows.of_facts(facts)
        subject = rows.subject[index]
        seen: dict[str, torch.Tensor] = {}

        def read(name: str) -> Any:
            def keep(hidden: torch.Tensor) -> None:
                seen[name] = hidden.detach()

            return keep

        essence_row = torch.arange(len(facts), device=facts.device) * rows.rows_per_fact + rows.rows_per_fact - 1
        essence_column = rows.lengths[index][essence_row] - 1
        with torch.no_grad(), ExitStack() as stack:
            stack.enter_context(on_output(self.module, read("module")))
            stack.enter_context(on_output(self.blocks[self.block_index], read("block")))
            logits = self._run(
                rows.ids[index], self._mask(rows.lengths[index]), None, self._cache(), essence_row, essence_column
            )
            bare = torch.arange(len(facts), device=facts.device) * rows.rows_per_fact
            position = subject[bare]
            self._remember(index, seen, subject)
        return (
            _at(seen["block"], bare, position),
            _at(seen["module"].reshape(seen["block"].shape), bare, position),
            _log_probabilities(logits),
        )

    def _cache(self) -> DynamicCache | None:
        return None

    def _remember(self, index: torch.Tensor, seen: dict[str, torch.Tensor], subject: torch.Tensor) -> None:
        """What else this way of running needs from the first pass: nothing."""

    # --- during the search -------------------------------------------------------------------------------------

    def view(self, facts: torch.Tensor) -> View:
        """Gathers the rows of the given facts, (A,)."""
        rows = self.rows
        index = rows.of_facts(facts)
        mask = rows.read_mask[facts].flatten(0, 1)
        read_rows, read_places = mask.nonzero(as_tuple=True)
        columns = rows.read_positions[facts].flatten(0, 1)[read_rows, read_places]
        state, shift = self._gather(index)
        return View(
            facts=facts,
            row_facts=torch.arange(len(facts), device=facts.device).repeat_interleave(rows.rows_per_fact),
            read_rows=read_rows,
            read_columns=columns - shift[read_rows],
            labels=rows.labels[facts].flatten(0, 1)[read_rows, read_places],
            state=state,
        )

    def _gather(self, index: torch.Tensor) -> tuple[Any, torch.Tensor]:
        width = int(self.rows.lengths[index].max())
        state = (self.rows.ids[index, :width], self.rows.lengths[index], self.rows.subject[index])
        return state, torch.zeros_like(index)

    def logits(self, view: View, increment: torch.Tensor) -> torch.Tensor:
        """Logits at the read positions.

        Args:
            view: The rows.
            increment (`torch.Tensor`): (A, d_model), added to the module's output at every row's subject.

        Returns:
            `torch.Tensor`: (M, vocabulary), in the model's dtype.
        """
        ids, lengths, subject = view.state
        place = torch.arange(len(ids), device=ids.device)

        def add(hidden: torch.Tensor) -> torch.Tensor:
            shape = hidden.shape
            hidden = hidden.reshape(*ids.shape, shape[-1])
            added = increment.to(hidden)[view.row_facts.to(hidden.device)]
            return hidden.index_put(
                (place.to(hidden.device), subject.to(hidden.device)), added, accumulate=True
            ).reshape(shape)

        with on_output(self.module, add):
            return self._run(ids, self._mask(lengths), None, None, view.read_rows, view.read_columns)

    # --- shared ------------------------------------------------------------------------------------------------

    @staticmethod
    def _mask(lengths: torch.Tensor) -> torch.Tensor:
        return (torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]).long()

    def _run(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor | None,
        cache: DynamicCache | None,
        read_rows: torch.Tensor,
        read_columns: torch.Tensor,
    ) -> torch.Tensor:
        """The model's own forward, with the output head applied to the read positions only: (M, vocabulary)."""
        arguments: dict[str, Any] = {
            "input_ids": ids[:, : mask.shape[1]] if cache is None else ids,
            "attention_mask": mask,
        }
        if positions is not None and "position_ids" in self.accepted:
            arguments["position_ids"] = positions
        if cache is not None:
            arguments["past_key_values"] = cache
        arguments["use_cache"] = cache is not None

        def gather(hidden: torch.Tensor) -> torch.Tensor:
            return hidden[read_rows.to(hidden.device), read_columns.to(hidden.device)][None]

        with on_input(self.model.get_output_embeddings(), gather):
            return self.model(**arguments).logits[0]


class SplitForward(FullForward):
    """Only the positions and the blocks that depend on the increment; needs a known residual path."""

    def prepare(self, rows: SearchRows, chunk: int = 64) -> BaseStates:
        self.stored: list[tuple[torch.Tensor, ...]] = []
        handle = self.blocks[self.block_index].register_forward_hook(self._learn_output_form)
        try:
            base = super().prepare(rows, chunk)
        finally:
            handle.remove()
        # Chunks were padded to their own longest prefix and suffix; bring them to one size.
        prefix = max(piece[0].shape[1] for piece in self.stored)
        suffix = max(piece[1].shape[1] for piece in self.stored)
        layers = len(self.stored[0][3:])
        self.prefix_mask = torch.cat([_grow(piece[0], 1, prefix, left=True) for piece in self.stored])
        self.hidden = torch.cat([_grow(piece[1], 1, suffix) for piece in self.stored])
        self.module_output = torch.cat([piece[2] for piece in self.stored])
        self.keys_values = [
            torch.cat([_grow(piece[3 + layer], 2, prefix, left=True) for piece in self.stored])
            for layer in range(layers)
        ]
        del self.stored
        return base

    def _learn_output_form(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._output_form = (None,) * len(output) if isinstance(output, tuple) else None

    def _cache(self) -> DynamicCache:
        return self._prefilled

    def _prepare_chunk(self, facts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self._prefilled = DynamicCache()
        try:
            return super()._prepare_chunk(facts)
        finally:
            del self._prefilled

    def _remember(self, index: torch.Tensor, seen: dict[str, torch.Tensor], subject: torch.Tensor) -> None:
        hidden = seen["block"]
        lengths = self.rows.lengths[index]
        prefix = int(subject.max())
        source = torch.arange(prefix, device=subject.device) - (prefix - subject[:, None])  # (n, P), right-aligned
        suffix = int((lengths - subject).max())
        columns = (subject[:, None] + torch.arange(suffix, device=subject.device)).clamp_max(hidden.shape[1] - 1)
        kept = [
            source >= 0,
            hidden.gather(1, columns.to(hidden.device)[:, :, None].expand(-1, -1, hidden.shape[-1])),
            _at(seen["module"].reshape(hidden.shape), torch.arange(len(index), device=subject.device), subject),
        ]
        for layer in self._prefilled.layers[self.block_index + 1 :]:
            for states in (layer.keys, layer.values):
                where = source.clamp_min(0).to(states.device)[:, None, :, None]
                kept.append(states.gather(2, where.expand(-1, states.shape[1], -1, states.shape[3])))
        self.stored.append(tuple(kept))

    def _gather(self, index: torch.Tensor) -> tuple[Any, torch.Tensor]:
        rows = self.rows
        subject, lengths = rows.subject[index], rows.lengths[index]
        prefix, suffix = int(subject.max()), int((lengths - subject).max())
        start = self.prefix_mask.shape[1] - prefix
        offsets = torch.arange(suffix, device=index.device)
        columns = (subject[:, None] + offsets).clamp_max(rows.ids.shape[1] - 1)
        mask = torch.cat([self.prefix_mask[index][:, start:], offsets < (lengths - subject)[:, None]], dim=1).long()
        state = (
            rows.ids[index].gather(1, columns),
            mask,
            subject[:, None] + offsets,
            self.hidden[index.to(self.hidden.device), :suffix],
            self.module_output[index.to(self.module_output.device)],
            [states[index.to(states.device), :, start:] for states in self.keys_values],
        )
        return state, subject

    def logits(self, view: View, increment: torch.Tensor) -> torch.Tensor:
        ids, mask, positions, hidden, module_output, keys_values = view.state
        assert self.path is not None
        added = increment.to(module_output.device)[view.row_facts.to(module_output.device)]
        change = self.path.push(module_output, added.to(module_output)).to(hidden)
        moved = torch.cat([hidden[:, :1] + change[:, None], hidden[:, 1:]], dim=1)
        cache = DynamicCache()
        if keys_values and keys_values[0].shape[2]:
            # Blocks that are not run only lend their sequence length; those above read the prefix. `update` makes new
            # tensors, so what is stored stays as it is.
            below = keys_values[:2] * (self.block_index + 1)
            for layer in range(len(below) // 2):
                cache.update(below[2 * layer], below[2 * layer + 1], layer)
            for layer in range(len(keys_values) // 2):
                cache.update(keys_values[2 * layer], keys_values[2 * layer + 1], self.block_index + 1 + layer)
        else:
            mask = mask[:, mask.shape[1] - ids.shape[1] :]
        with ExitStack() as stack:
            for block in self.blocks[: self.block_index]:
                stack.enter_context(replaced_forward(block, self._pass_through))
            stack.enter_context(
                replaced_forward(self.blocks[self.block_index], lambda *_, **__: self._as_block(moved))
            )
            return self._run(ids, mask, positions, cache, view.read_rows, view.read_columns)

    def _pass_through(self, *args: Any, **kwargs: Any) -> Any:
        return self._as_block(args[0] if args else kwargs["hidden_states"])

    def _as_block(self, hidden: torch.Tensor) -> Any:
        """Blocks return a tensor or a tuple that begins with it, depending on the architecture."""
        return like_output(self._output_form, hidden)


def _at(hidden: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return hidden[rows.to(hidden.device), columns.to(hidden.device)]


def _grow(tensor: torch.Tensor, dim: int, size: int, left: bool = False) -> torch.Tensor:
    missing = size - tensor.shape[dim]
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    filler = tensor.new_zeros(shape)
    return torch.cat([filler, tensor] if left else [tensor, filler], dim=dim)


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
