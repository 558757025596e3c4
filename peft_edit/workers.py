"""The processes that edit together: each takes a share of the facts, and all end with the same adapter.

Started with `accelerate launch` (or torchrun) every process makes the same calls with the same facts. What one of them
raises, all raise, so that none goes on with half of the work.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import distributed, nn

from .sharded import is_sharded


T = TypeVar("T")


class Workers:
    """The processes of this run; one alone where nothing is distributed.

    Args:
        splits (`bool`): Whether they share the work out. A model whose weights are spread over the processes (FSDP)
            has to run the same in all of them.
    """

    def __init__(self, splits: bool = True) -> None:
        self.rank, self.size = 0, 1
        if distributed.is_available():
            if not distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
                from accelerate import PartialState

                PartialState()
            if distributed.is_initialized():
                self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.splits = splits and self.size > 1

    @classmethod
    def of(cls, model: nn.Module) -> Workers:
        """The processes that edit this model."""
        return cls(splits=not is_sharded(model))

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    def share(self, count: int) -> list[int]:
        """Which of `count` things this process does: every size-th one, or all."""
        return list(range(self.rank, count, self.size) if self.splits else range(count))

    def every_own(self, things: Iterable[T]) -> Iterator[T]:
        """This process's share of things whose number is not known."""
        return islice(things, self.rank, None, self.size) if self.splits else iter(things)

    def rows(
        self,
        count: int,
        work: Callable[[list[int]], Sequence[torch.Tensor]],
        groups: Sequence[Sequence[int]] | None = None,
    ) -> list[torch.Tensor]:
        """Tensors with one row for each of `count` things, of which each process works out its share.

        Args:
            count (`int`): How many things, > 0.
            work: From places to tensors with a row for each; not called without any place.
            groups (`Sequence[Sequence[int]]`, *optional*): Places that are worked out together, whichever process does
                it, so that rounding does not depend on the number of processes. By default each process works out
                its share in one go.

        Returns:
            `list[torch.Tensor]`: (count, …) each, the same in every process; on the CPU where they were gathered.
        """
        own = [self.share(count)] if groups is None else [list(groups[place]) for place in self.share(len(groups))]
        own = [group for group in own if group]
        pieces = self.together(lambda: [(group, list(work(group))) for group in own])
        if self.splits:
            on_cpu = [(group, [tensor.cpu() for tensor in tensors]) for group, tensors in pieces]
            pieces = [piece for each in self.gather(on_cpu) for piece in each]
        order = torch.tensor([place for group, _ in pieces for place in group]).argsort()
        return [torch.cat(parts)[order.to(parts[0].device)] for parts in zip(*(tensors for _, tensors in pieces))]

    def gather(self, value: T) -> list[T]:
        """The value of every process, in the order of ranks. Tensors in it come to the CPU."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, the same everywhere."""
        if self.splits:
            distributed.all_reduce(tensor)
        return tensor

    def together(self, work: Callable[[], T]) -> T:
        """Does `work` here; if it fails in any process, every process raises that error."""
        if self.size == 1:
            return work()
        result: Any = None
        failure: BaseException | None = None
        try:
            result = work()
        except BaseException as error:
            failure = error
        failures = [found for found in self.gather(_portable(failure, self.rank)) if found is not None]
        if not failures:
            return result
        if failure is not None and failures[0] == _portable(failure, self.rank):
            raise failure
        raise pickle.loads(failures[0])

    def check_same(self, value: str, what: str) -> None:
        """Raises a ValueError everywhere if the processes do not agree on `value`."""
        values = self.gather(value)
        if any(other != values[0] for other in values):
            raise ValueError(
                f"The processes were given different {what}: every process must make the same call with the same "
                "arguments; peft-edit splits the work itself."
            )

    def wait(self) -> None:
        """Until every process has come here."""
        if self.size > 1:
            distributed.barrier()


def _portable(failure: BaseException | None, rank: int) -> bytes | None:
    """An error as bytes that another process can raise."""
    if failure is None:
        return None
    try:
        data = pickle.dumps(failure)
        pickle.loads(data)
        return data
    except Exception:
        return pickle.dumps(RuntimeError(f"Process {rank} failed with {type(failure).__name__}: {failure}"))
