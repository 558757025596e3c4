"""The forward pass of the target search, in which only what depends on the increment is run.

That is positions from the subject's last token on (what comes before is a read-only key/value cache, by causality;
`prefix.py`) and blocks above the edited one (its own output is remembered). `choose_forward` makes sure that it gives
the same answer as `FullForward`.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from ..hooks import StopForward, on_input, on_output, replaced_forward
from ..prompts import FactPrompts
from ..residual import ResidualPath
from ..sharded import until_stopped
from .forward import FullForward, input_device
from .prefix import Prefix
from .rows import BaseStates, Part, SearchRows


def choose_forward(
    model: Any,
    blocks: Sequence[nn.Module],
    block_index: int,
    module: nn.Module,
    path: ResidualPath | None,
    example: FactPrompts,
    keys_of: nn.Module | None = None,
    force_full: bool = False,
) -> FullForward:
    """The split forward pass where it gives the full one's answer on an example, else the full one.

    Args:
        model (`nn.Module`): The causal language model with its adapters in place, in eval mode.
        blocks (`Sequence[nn.Module]`): Its decoder blocks.
        block_index (`int`): Index of the block that holds the last edited module.
        module (`nn.Module`): The last edited module; increments are added to its output.
        path (`ResidualPath`, *optional*): How that output reaches the residual stream; None if unknown.
        example (`FactPrompts`): A fact to compare on.
        keys_of (`nn.Module`, *optional*): The first edited module, if that is another one.
        force_full (`bool`): Run whole sequences even where the forward pass can be split.
    """
    place = (model, list(blocks), block_index, module, path, keys_of)
    full = FullForward(*place)
    if path is None or force_full:
        return full
    split, reason = SplitForward(*place), ""
    try:
        if _agree(split, full, SearchRows.from_prompts([example], input_device(model))):
            return split
    except (TypeError, AttributeError, IndexError, KeyError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = f" ({type(error).__name__}: {error})"
    warnings.warn(
        f"The forward pass of {type(model).__name__} cannot be split at the subject{reason}; the target search "
        "runs whole sequences instead: the same result, only slower.",
        stacklevel=2,
    )
    return full


class SplitForward(FullForward):
    """Only the positions and the blocks that depend on the increment; needs a known residual path."""

    def prepare(self, rows: SearchRows) -> BaseStates:
        """As `FullForward.prepare`; what is before the subject and equal in all facts is run once."""
        self.rows = rows
        every = torch.arange(len(rows.ids), device=rows.ids.device)
        with torch.no_grad(), self.learning_output_form(self.block_index):
            shared = self._run_prefix(rows.ids[: rows.rows_per_fact], rows.shared, None)

            def own(index: torch.Tensor) -> Sequence[torch.Tensor]:
                before = shared.rows(index % rows.rows_per_fact)
                prefix = self._run_prefix(rows.ids[index], rows.subject[index], before)
                return (prefix.mask, *prefix.states)

            shared_lengths = rows.shared.repeat(len(every) // rows.rows_per_fact)
            mask, *states = self.in_buckets(rows.subject - shared_lengths, every, own)
            self.prefix = Prefix(mask, states)
            *base, self.hidden, self.module_output = self.in_buckets(
                rows.lengths - rows.subject, every, self._suffix_states
            )
        self.prefix = self.prefix.above(self.block_index)
        return self._keep_base(base)

    def _suffix_states(self, index: torch.Tensor) -> Sequence[torch.Tensor]:
        ids, mask, positions, prefix = self._suffix(index)
        with self._reading() as seen:
            self.run(ids, mask, positions, prefix.cache())
        hidden = seen["block"]
        output, keys = (seen[name].reshape(*hidden.shape[:2], -1)[:, 0] for name in ("module", "keys"))
        return [hidden[:, 0], output, keys, hidden, output]

    def _suffix(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Prefix]:
        """Ids, mask (with that of the prefix) and positions from the subject's last token on, and the prefix."""
        subject, lengths = self.rows.subject[index], self.rows.lengths[index]
        ids, positions, mask = _window(self.rows.ids[index], subject, lengths, int((lengths - subject).max()))
        prefix = self.prefix.rows(index).trimmed()
        return ids, torch.cat([prefix.mask, mask], dim=1).long(), positions, prefix

    @cached_property
    def _last_mlp(self) -> nn.Module | None:
        """The last block's counterpart of the module around the edited one, if it maps hidden states one by one."""
        if self.block_index == len(self.blocks) - 1:
            return None
        edited = self.blocks[self.block_index]
        name = next(name for name, module in edited.named_modules() if module is self.module)
        parent = name.rpartition(".")[0]
        mlp: Any = self.blocks[-1].get_submodule(parent) if parent else None
        return mlp if mlp is not None and len(inspect.signature(mlp.forward).parameters) == 1 else None

    def _run_prefix(self, ids: torch.Tensor, until: torch.Tensor, before: Prefix | None) -> Prefix:
        """Keys and values of every block for the tokens of `ids` (n, T) up to `until` (n,), going on from `before`."""
        start = before.lengths if before is not None else torch.zeros_like(until)
        width = int((until - start).max())
        if before is not None and width == 0:
            return before
        ids, positions, own = _window(ids, start, until, max(1, width))
        whole = own if before is None else torch.cat([before.mask, own], dim=1)
        # A row without any token yet still needs one to attend to, or it would not be finite.
        visible = whole.clone()
        visible[:, -own.shape[1]] |= ~whole.any(1)
        cache = before.cache() if before is not None else DynamicCache()

        def stop(_hidden: torch.Tensor) -> None:
            raise StopForward

        with on_output(self.blocks[-1], stop):
            with until_stopped(self.model):
                self.run(ids, visible.long(), positions, cache)
        return Prefix.of(cache, whole)

    def _run_lengths(self, index: torch.Tensor) -> torch.Tensor:
        return self.rows.lengths[index] - self.rows.subject[index]

    def _gather(self, index: torch.Tensor) -> tuple[Any, torch.Tensor]:
        ids, mask, positions, prefix = self._suffix(index)
        hidden = self.hidden[index.to(self.hidden.device), : ids.shape[1]]
        output = self.module_output[index.to(hidden.device)]
        return (ids, mask, positions, hidden, output, prefix), self.rows.subject[index]

    def logits(self, part: Part, increment: torch.Tensor) -> torch.Tensor:
        ids, mask, positions, hidden, module_output, prefix = part.state
        assert self.path is not None
        added = increment.to(module_output.device)[part.row_slots.to(module_output.device)]
        change = self.path.push(module_output, added.to(module_output)).to(hidden)
        moved = torch.cat([hidden[:, :1] + change[:, None], hidden[:, 1:]], dim=1)
        with ExitStack() as stack:
            for block in self.blocks[: self.block_index]:
                stack.enter_context(replaced_forward(block, self.pass_through))
            stack.enter_context(replaced_forward(self.blocks[self.block_index], lambda *_, **__: self.as_block(moved)))
            stack.enter_context(self._head_at(part))
            stack.enter_context(self._last_mlp_at(part, ids.shape))
            return self.run(ids, mask, positions, prefix.cache(blocks_below=self.block_index + 1))

    def at_subjects(self, part: Part, hidden: torch.Tensor) -> torch.Tensor:
        """As `FullForward.at_subjects`; each row begins with the subject's last token."""
        return hidden[:, 0]

    @contextmanager
    def _last_mlp_at(self, part: Part, shape: torch.Size) -> Iterator[None]:
        """The last block's MLP runs at the read positions only: nothing attends to what it writes elsewhere."""
        mlp = self._last_mlp
        if mlp is None:
            yield
            return

        def gather(hidden: torch.Tensor) -> torch.Tensor:
            return hidden[part.read_rows.to(hidden.device), part.read_columns.to(hidden.device)][None]

        def scatter(hidden: torch.Tensor) -> torch.Tensor:
            places = (part.read_rows.to(hidden.device), part.read_columns.to(hidden.device))
            return hidden.new_zeros(*shape, hidden.shape[-1]).index_put(places, hidden[0])

        with on_input(mlp, gather), on_output(mlp, scatter):
            yield


def _agree(split: SplitForward, full: FullForward, rows: SearchRows) -> bool:
    """Whether both ways give the same logits with an arbitrary increment."""
    base = split.prepare(rows)
    full.rows, full.base = rows, base
    first = torch.zeros(1, dtype=torch.long, device=rows.ids.device)
    generator = torch.Generator().manual_seed(0)
    output = base.module_output
    increment = torch.randn(output.shape, generator=generator).to(output)
    increment = 0.3 * increment * output.norm() / increment.norm()
    with torch.no_grad():
        one, other = (way.logits(way.view(first, whole=True).parts[0], increment).double() for way in (split, full))
    if not (one.isfinite().all() and other.isfinite().all()):
        return True  # nothing to compare; the search itself reports facts that are not finite
    spread = float((other - other.mean(-1, keepdim=True)).abs().max())
    return float((one - other).abs().max()) <= 0.4 * math.sqrt(torch.finfo(output.dtype).eps) * max(spread, 1e-3)


def _window(
    ids: torch.Tensor, start: torch.Tensor, end: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, positions and mask, each (n, width), of the tokens from `start` to `end` (n,), right-padded."""
    positions = start[:, None] + torch.arange(width, device=ids.device)
    return ids.gather(1, positions.clamp_max(ids.shape[1] - 1)), positions, positions < end[:, None]
