"""The forward pass of the target search: from increments at the subject's last token to the logits that are read.

Here whole sequences run through the whole model; `split_forward.py` runs less. Both apply the output head at the
positions that are read, and nowhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import DynamicCache

from ..hooks import StopForward, like_output, on_input, on_output
from ..residual import ResidualPath
from ..sharded import until_stopped
from .prefix import joined
from .rows import BaseStates, Part, SearchRows, View, width_buckets


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


def input_device(model: Any) -> torch.device:
    """Where the model takes token ids."""
    device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device


def _at(hidden: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return hidden[rows.to(hidden.device), columns.to(hidden.device)]
