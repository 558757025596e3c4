"""The forward pass of the target search: from increments at the subject's last token to the logits that are read.

Two ways give the same answer. `FullForward` runs whole sequences through the whole model. `SplitForward` runs only
what depends on the increment: positions from the subject's last token on (what comes before is a read-only key/value
cache, by causality; `prefix.py`) and blocks above the edited one (its own output is remembered). Both apply the output
head at the positions that are read, and nowhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import DynamicCache

from .hooks import StopForward, like_output, on_input, on_output, replaced_forward
from .prefix import Prefix, joined
from .residual import ResidualPath
from .rows import BaseStates, Part, SearchRows, View, width_buckets
from .sharded import until_stopped


# Tokens of padding that cost no more than another pass through the blocks.
SPARE_TOKENS = 128
SPARE_TOKENS_ON_GPU = 1024


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
        every = torch.arange(len(rows.ids), device=rows.ids.device)
        with torch.no_grad():
            states = self.in_buckets(rows.lengths, every, self._base_states)
        return self._keep_base(states)

    def _keep_base(self, states: Sequence[torch.Tensor]) -> BaseStates:
        hidden, output, keys = states
        rows = self.rows.rows_per_fact
        self.base = BaseStates(hidden[::rows], output[::rows], keys.unflatten(0, (-1, rows))[:, :-1])
        return self.base

    def in_buckets(
        self, lengths: torch.Tensor, index: torch.Tensor, run: Callable[[torch.Tensor], Sequence[torch.Tensor]]
    ) -> list[torch.Tensor]:
        """What `run` makes of the rows, in few passes with little padding, in the order of `index`."""
        buckets = width_buckets(lengths[index].tolist(), self._spare_tokens())
        pieces: list[Sequence[torch.Tensor]] = []
        order: list[int] = []
        while buckets:
            bucket = buckets.pop()
            try:
                pieces.append(run(index[torch.tensor(bucket, device=index.device)]))
                order += bucket
            except torch.OutOfMemoryError:
                if len(bucket) == 1:
                    raise
                buckets += [bucket[len(bucket) // 2 :], bucket[: len(bucket) // 2]]
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order)] = torch.arange(len(order))
        return [joined(parts)[back.to(parts[0].device)] for parts in zip(*pieces)]

    def _spare_tokens(self) -> int:
        return SPARE_TOKENS_ON_GPU if self.rows.ids.device.type == "cuda" else SPARE_TOKENS

    def _base_states(self, index: torch.Tensor) -> Sequence[torch.Tensor]:
        """Output of the edited block and module, and the first module's input, at the subject of each row."""
        mask = self._mask(self.rows.lengths[index])
        with self._reading() as seen:
            self.run(self.rows.ids[index, : mask.shape[1]], mask)
        shape = seen["block"].shape[:2]
        rows, subject = torch.arange(len(index), device=index.device), self.rows.subject[index]
        return [_at(seen[name].reshape(*shape, -1), rows, subject) for name in ("block", "module", "keys")]

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
            with until_stopped(self.model):
                yield seen

    # --- during the search -------------------------------------------------------------------------------------

    def view(self, facts: torch.Tensor, whole: bool = False) -> View:
        """Gathers the rows of the given facts, (A,); `whole`: all of them in one part."""
        rows = self.rows
        index = rows.of_facts(facts)
        lengths = self._run_lengths(index).tolist()
        buckets = [list(range(len(index)))] if whole else width_buckets(lengths, self._spare_tokens())
        parts = [self._part(index, torch.tensor(bucket, device=index.device)) for bucket in buckets]
        return View(facts=facts, tokens=(rows.labels[facts] >= 0).sum(-1).flatten(), parts=parts)

    def _part(self, index: torch.Tensor, places: torch.Tensor) -> Part:
        """The rows at some places of a view, whose rows are `index` (A * R,)."""
        rows = self.rows
        chosen = index[places]
        facts, row = chosen // rows.rows_per_fact, chosen % rows.rows_per_fact
        labels, positions = rows.labels[facts, row], rows.read_positions[facts, row]
        target_rows, which = (labels >= 0).nonzero(as_tuple=True)
        (essence_rows,) = (row == rows.rows_per_fact - 1).nonzero(as_tuple=True)
        read_rows = torch.cat([target_rows, essence_rows])
        columns = torch.cat([positions[target_rows, which], positions[essence_rows, 0]])
        state, shift = self._gather(chosen)
        slots = places // rows.rows_per_fact
        return Part(
            rows=places,
            row_slots=slots,
            read_rows=read_rows,
            read_columns=columns - shift[read_rows],
            target_rows=places[target_rows],
            labels=labels[target_rows, which],
            essence_slots=slots[essence_rows].tolist(),
            state=state,
        )

    def _run_lengths(self, index: torch.Tensor) -> torch.Tensor:
        """How many tokens of each row are run in a step of the search."""
        return self.rows.lengths[index]

    def _gather(self, index: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """What a part needs of its rows, and how far columns are shifted against positions."""
        width = int(self.rows.lengths[index].max())
        state = (self.rows.ids[index, :width], self.rows.lengths[index], self.rows.subject[index])
        return state, torch.zeros_like(index)

    def logits(self, part: Part, increment: torch.Tensor) -> torch.Tensor:
        """Logits at the read positions.

        Args:
            part: The rows.
            increment (`torch.Tensor`): (A, d_model), added to the module's output at every row's subject.

        Returns:
            `torch.Tensor`: (M, vocabulary), in the model's dtype.
        """
        ids, lengths, subject = part.state
        place = torch.arange(len(ids), device=ids.device)

        def add(hidden: torch.Tensor) -> torch.Tensor:
            shape = hidden.shape
            hidden = hidden.reshape(*ids.shape, shape[-1])
            added = increment.to(hidden)[part.row_slots.to(hidden.device)]
            return hidden.index_put(
                (place.to(hidden.device), subject.to(hidden.device)), added, accumulate=True
            ).reshape(shape)

        with on_output(self.module, add), self._head_at(part):
            return self.run(ids, self._mask(lengths))

    def at_subjects(self, part: Part, hidden: torch.Tensor) -> torch.Tensor:
        """Of hidden states (n, tokens, d_model) of that pass, those at each row's subject: (n, d_model)."""
        ids, _, subject = part.state
        return _at(hidden, torch.arange(len(ids)), subject)

    # --- shared ------------------------------------------------------------------------------------------------

    @staticmethod
    def _mask(lengths: torch.Tensor) -> torch.Tensor:
        return (torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]).long()

    def run(
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
        # On a CPU the fused attention's backward pass takes several times as long in 16 bit as the plain one.
        slow = ids.device.type == "cpu" and self.model.dtype.itemsize == 2
        with sdpa_kernel(SDPBackend.MATH) if slow else nullcontext():
            return self.model(**arguments).logits[0]

    def _head_at(self, part: Part) -> AbstractContextManager[None]:
        """The output head is applied at the read positions only: logits are (1, M, vocabulary)."""

        def gather(hidden: torch.Tensor) -> torch.Tensor:
            return hidden[part.read_rows.to(hidden.device), part.read_columns.to(hidden.device)][None]

        return on_input(self.model.get_output_embeddings(), gather)

    # --- standing in for blocks --------------------------------------------------------------------------------

    @contextmanager
    def learning_output_form(self, block: int) -> Iterator[None]:
        """While the model runs: how its blocks return their output, which `as_block` needs to know."""

        def learn(_module: nn.Module, _args: Any, output: Any) -> None:
            self._output_form = (None,) * len(output) if isinstance(output, tuple) else None

        handle = self.blocks[block].register_forward_hook(learn)
        try:
            yield
        finally:
            handle.remove()

    def pass_through(self, *args: Any, **kwargs: Any) -> Any:
        """A block's forward that changes nothing."""
        return self.as_block(args[0] if args else kwargs["hidden_states"])

    def as_block(self, hidden: torch.Tensor) -> Any:
        """Blocks return a tensor or a tuple that begins with it, depending on the architecture."""
        return like_output(self._output_form, hidden)


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


def _window(
    ids: torch.Tensor, start: torch.Tensor, end: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, positions and mask, each (n, width), of the tokens from `start` to `end` (n,), right-padded."""
    positions = start[:, None] + torch.arange(width, device=ids.device)
    return ids.gather(1, positions.clamp_max(ids.shape[1] - 1)), positions, positions < end[:, None]


def _at(hidden: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return hidden[rows.to(hidden.device), columns.to(hidden.device)]
