"""The forward pass of the target search: from increments at the subject's last token to the logits that are read.

Two ways give the same answer. `FullForward` runs whole sequences through the whole model. `SplitForward` runs only
what depends on the increment: positions from the subject's last token on (what comes before is a read-only key/value
cache, by causality; `prefix.py`) and blocks above the edited one (its own output is remembered). Both apply the output
head at the positions that are read, and nowhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from .hooks import StopForward, like_output, on_input, on_output, replaced_forward
from .prefix import Prefix
from .prompts import FactPrompts
from .residual import ResidualPath


PREPARED_AT_ONCE = 64  # facts


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
        shared (`torch.LongTensor`): (R,) tokens before the subject that are the same in that row of every fact, such
            as those of a context.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    subject: torch.Tensor
    read_positions: torch.Tensor
    read_mask: torch.Tensor
    labels: torch.Tensor
    shared: torch.Tensor

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
            shared=torch.tensor(
                [
                    _common_length([ids[:end] for ids, end in zip(sequences[place::rows_per_fact], ends)])
                    for place in range(rows_per_fact)
                    if (ends := subjects[place::rows_per_fact])
                ]
            ).to(device),
        )

    @property
    def rows_per_fact(self) -> int:
        return self.read_mask.shape[1]

    def of_facts(self, facts: torch.Tensor) -> torch.Tensor:
        """Row indices, (A * R,), of the given facts, (A,)."""
        steps = torch.arange(self.rows_per_fact, device=facts.device)
        return (facts[:, None] * self.rows_per_fact + steps).reshape(-1)


def _common_length(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common beginning."""
    first, last = min(sequences), max(sequences)
    return next((i for i, (one, other) in enumerate(zip(first, last)) if one != other), min(len(first), len(last)))


@dataclass(frozen=True)
class BaseStates:
    """What the model does before any increment, per fact.

    Args:
        hidden (`torch.Tensor`): (F, d_model) output of the edited block, bare prompt, subject's last token.
        module_output (`torch.Tensor`): (F, d_model) output of the edited module there.
        keys (`torch.Tensor`): (F, R - 1, d_in) input of the first edited module at every row's subject.
    """

    hidden: torch.Tensor
    module_output: torch.Tensor
    keys: torch.Tensor


@dataclass
class View:
    """The rows of the facts that are being searched at the moment, in the form that the forward pass takes.

    Args:
        facts (`torch.LongTensor`): (A,).
        row_facts (`torch.LongTensor`): (A * R,) the place among `facts` that each row belongs to.
        read_rows (`torch.LongTensor`), read_columns (`torch.LongTensor`): (M,) hidden states that reach the head:
            first those that predict a target token, then one per essence row.
        target_rows (`torch.LongTensor`): (M - A,) the row of each target token.
        labels (`torch.LongTensor`): (M - A,) the target tokens.
        tokens (`torch.LongTensor`): (A * R,) target tokens of each row.
        state: What the forward pass needs besides.
    """

    facts: torch.Tensor
    row_facts: torch.Tensor
    read_rows: torch.Tensor
    read_columns: torch.Tensor
    target_rows: torch.Tensor
    labels: torch.Tensor
    tokens: torch.Tensor
    state: Any


class FullForward:
    """Whole sequences through the whole model, with the increment added at the module's output.

    Args:
        model: The causal language model.
        blocks (`list[nn.Module]`): Its decoder blocks.
        block_index (`int`): The block of the last edited module.
        module: The last edited module.
        path: How that module's output reaches the residual stream; None if unknown.
        keys_of: The first edited module.
    """

    def __init__(
        self,
        model: Any,
        blocks: list[nn.Module],
        block_index: int,
        module: nn.Module,
        path: ResidualPath | None,
        keys_of: nn.Module | None = None,
    ) -> None:
        self.model = model
        self.blocks = blocks
        self.block_index = block_index
        self.module = module
        self.path = path
        self.keys_of = keys_of or module
        self.accepted = set(inspect.signature(model.forward).parameters)
        self.rows: SearchRows
        self.base: BaseStates

    # --- before the search -------------------------------------------------------------------------------------

    def prepare(self, rows: SearchRows) -> BaseStates:
        """Runs the rows once, without gradient, and keeps what the search reads."""
        self.rows = rows
        count = rows.read_mask.shape[0]
        pieces: list[tuple[torch.Tensor, ...]] = []
        start, chunk = 0, PREPARED_AT_ONCE
        while start < count:
            facts = torch.arange(start, min(start + chunk, count), device=rows.ids.device)
            try:
                with torch.no_grad():
                    pieces.append(self._prepare_chunk(facts))
            except torch.OutOfMemoryError:
                if chunk == 1:
                    raise
                chunk = max(1, chunk // 2)
                continue
            start += len(facts)
        self.base = BaseStates(*(torch.cat(parts) for parts in zip(*(piece[:3] for piece in pieces))))
        self._keep([piece[3:] for piece in pieces])
        return self.base

    def _prepare_chunk(self, facts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = self.rows
        index = rows.of_facts(facts)
        ids, mask = rows.ids[index], self._mask(rows.lengths[index])
        with self._reading() as seen:
            self._run(ids[:, : mask.shape[1]], mask)
        return self._base_states(seen, rows.subject[index], len(facts))

    @contextmanager
    def _reading(self) -> Iterator[dict[str, torch.Tensor]]:
        """Reads the first module's input and the last one's and its block's output; the pass ends there."""
        seen: dict[str, torch.Tensor] = {}

        def keep(name: str, hidden: torch.Tensor) -> None:
            seen[name] = hidden

        def at_block(hidden: torch.Tensor) -> None:
            seen["block"] = hidden
            raise StopForward

        with ExitStack() as stack:
            stack.enter_context(on_input(self.keys_of, partial(keep, "keys")))
            stack.enter_context(on_output(self.module, partial(keep, "module")))
            stack.enter_context(on_output(self.blocks[self.block_index], at_block))
            try:
                yield seen
            except StopForward:
                pass

    def _base_states(
        self, seen: dict[str, torch.Tensor], columns: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, ...]:
        shape = seen["block"].shape[:2]
        every = torch.arange(len(columns), device=columns.device)
        bare, rows_per_fact = every[:: self.rows.rows_per_fact], self.rows.rows_per_fact
        keys = _at(seen["keys"].reshape(*shape, -1), every, columns)
        return (
            _at(seen["block"], bare, columns[bare]),
            _at(seen["module"].reshape(*shape, -1), bare, columns[bare]),
            keys.reshape(count, rows_per_fact, -1)[:, :-1],
        )

    def _keep(self, pieces: list[tuple[torch.Tensor, ...]]) -> None:
        """What else this way of running needs from the first pass: nothing."""

    # --- during the search -------------------------------------------------------------------------------------

    def view(self, facts: torch.Tensor) -> View:
        """Gathers the rows of the given facts, (A,)."""
        rows = self.rows
        index = rows.of_facts(facts)
        labels = rows.labels[facts].flatten(0, 1)
        target_rows, places = (labels >= 0).nonzero(as_tuple=True)
        essence_rows = torch.arange(rows.rows_per_fact - 1, len(index), rows.rows_per_fact, device=index.device)
        read_rows = torch.cat([target_rows, essence_rows])
        positions = rows.read_positions[facts].flatten(0, 1)
        columns = torch.cat([positions[target_rows, places], positions[essence_rows, 0]])
        state, shift = self._gather(index)
        return View(
            facts=facts,
            row_facts=torch.arange(len(facts), device=facts.device).repeat_interleave(rows.rows_per_fact),
            read_rows=read_rows,
            read_columns=columns - shift[read_rows],
            target_rows=target_rows,
            labels=labels[target_rows, places],
            tokens=(labels >= 0).sum(1),
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

        with on_output(self.module, add), self._head_at(view):
            return self._run(ids, self._mask(lengths))

    # --- shared ------------------------------------------------------------------------------------------------

    @staticmethod
    def _mask(lengths: torch.Tensor) -> torch.Tensor:
        return (torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]).long()

    def _run(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor | None = None,
        cache: DynamicCache | None = None,
    ) -> torch.Tensor:
        """The model's own forward: its logits for the first row (there is one only under `_head_at`)."""
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": cache is not None}
        if positions is not None and "position_ids" in self.accepted:
            arguments["position_ids"] = positions
        if cache is not None:
            arguments["past_key_values"] = cache
        return self.model(**arguments).logits[0]

    def _head_at(self, view: View) -> AbstractContextManager[None]:
        """The output head is applied at the read positions only: logits are (1, M, vocabulary)."""

        def gather(hidden: torch.Tensor) -> torch.Tensor:
            return hidden[view.read_rows.to(hidden.device), view.read_columns.to(hidden.device)][None]

        return on_input(self.model.get_output_embeddings(), gather)


class SplitForward(FullForward):
    """Only the positions and the blocks that depend on the increment; needs a known residual path."""

    def prepare(self, rows: SearchRows) -> BaseStates:
        """As `FullForward.prepare`; what is before the subject and equal in all facts is run once."""
        handle = self.blocks[self.block_index].register_forward_hook(self._learn_output_form)
        try:
            self.rows = rows
            with torch.no_grad():
                self._shared = self._run_prefix(rows.ids, rows.shared, None)
            return super().prepare(rows)
        finally:
            handle.remove()

    def _learn_output_form(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._output_form = (None,) * len(output) if isinstance(output, tuple) else None

    def _run_prefix(self, ids: torch.Tensor, until: torch.Tensor, before: Prefix | None) -> Prefix:
        """Keys and values of every block for the tokens of `ids` (n, T) that come after `before`, up to `until` (n,)."""
        start = before.lengths if before is not None else torch.zeros_like(until)
        width = int((until - start).max())
        if width == 0:
            return before if before is not None else Prefix.empty(len(until), until.device)
        ids, positions, mask = _window(ids, start, until, width)
        cache = before.cache() if before is not None else DynamicCache()
        whole = mask if before is None else torch.cat([before.mask, mask], dim=1)

        def stop(_hidden: torch.Tensor) -> None:
            raise StopForward

        with on_output(self.blocks[-1], stop):
            try:
                self._run(ids, whole.long(), positions, cache)
            except StopForward:
                pass
        return Prefix.of(cache, whole)

    def _prepare_chunk(self, facts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = self.rows
        index = rows.of_facts(facts)
        subject, lengths = rows.subject[index], rows.lengths[index]
        shared = self._shared.rows(torch.arange(rows.rows_per_fact, device=facts.device).repeat(len(facts)))
        prefix = self._run_prefix(rows.ids[index], subject, shared)
        ids, positions, mask = _window(rows.ids[index], subject, lengths, int((lengths - subject).max()))
        with self._reading() as seen:
            self._run(ids, torch.cat([prefix.mask, mask], dim=1).long(), positions, prefix.cache())
        prefix = prefix.above(self.block_index)
        output = seen["module"].reshape(seen["block"].shape)[:, 0]
        base = self._base_states(seen, torch.zeros_like(subject), len(facts))
        return (*base, prefix.mask, seen["block"], output, *prefix.states)

    def _keep(self, pieces: list[tuple[torch.Tensor, ...]]) -> None:
        # Chunks were padded to their own longest prefix and suffix; bring them to one size.
        width = max(piece[1].shape[1] for piece in pieces)
        self.hidden = torch.cat([_grow(piece[1], width) for piece in pieces])
        self.module_output = torch.cat([piece[2] for piece in pieces])
        self.prefix = Prefix.joined([Prefix(piece[0], piece[3:]) for piece in pieces])

    def _gather(self, index: torch.Tensor) -> tuple[Any, torch.Tensor]:
        rows = self.rows
        subject, lengths = rows.subject[index], rows.lengths[index]
        suffix = int((lengths - subject).max())
        ids, positions, mask = _window(rows.ids[index], subject, lengths, suffix)
        prefix = self.prefix.rows(index).trimmed()
        mask = torch.cat([prefix.mask, mask], dim=1).long()
        hidden = self.hidden[index.to(self.hidden.device), :suffix]
        return (ids, mask, positions, hidden, self.module_output[index.to(hidden.device)], prefix), subject

    def logits(self, view: View, increment: torch.Tensor) -> torch.Tensor:
        ids, mask, positions, hidden, module_output, prefix = view.state
        assert self.path is not None
        added = increment.to(module_output.device)[view.row_facts.to(module_output.device)]
        change = self.path.push(module_output, added.to(module_output)).to(hidden)
        moved = torch.cat([hidden[:, :1] + change[:, None], hidden[:, 1:]], dim=1)
        with ExitStack() as stack:
            for block in self.blocks[: self.block_index]:
                stack.enter_context(replaced_forward(block, self._pass_through))
            stack.enter_context(
                replaced_forward(self.blocks[self.block_index], lambda *_, **__: self._as_block(moved))
            )
            stack.enter_context(self._head_at(view))
            return self._run(ids, mask, positions, prefix.cache(blocks_below=self.block_index + 1))

    def _pass_through(self, *args: Any, **kwargs: Any) -> Any:
        return self._as_block(args[0] if args else kwargs["hidden_states"])

    def _as_block(self, hidden: torch.Tensor) -> Any:
        """Blocks return a tensor or a tuple that begins with it, depending on the architecture."""
        return like_output(self._output_form, hidden)


def _window(
    ids: torch.Tensor, start: torch.Tensor, end: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, positions and mask, each (n, width), of the tokens from `start` to `end` (n,), right-padded."""
    positions = start[:, None] + torch.arange(width, device=ids.device)
    return ids.gather(1, positions.clamp_max(ids.shape[1] - 1)), positions, positions < end[:, None]


def _at(hidden: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return hidden[rows.to(hidden.device), columns.to(hidden.device)]


def _grow(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """Pads (n, w, d) with zeros to (n, width, d)."""
    return nn.functional.pad(tensor, (0, 0, 0, width - tensor.shape[1]))
