"""EleutherAI's lm-evaluation-harness on a model in memory, edits unmerged."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..hooks import evaluating
from ..sharded import runnable
from ..workers import Workers


def run_harness(
    model: Any,
    tokenizer: Any,
    tasks: str | Sequence[Any],
    num_fewshot: int | None = None,
    limit: int | float | None = None,
    batch_size: int | str = 16,
    include_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    model_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any] | None:
    """Runs tasks of the lm-evaluation-harness on the model as it stands.

    The model's mode, the tokenizer and the global random states are afterwards what they were. In a run of several
    processes each takes its share of the examples; a task needs at least as many examples as there are processes.

    Args:
        model: The edited (or base) model, a PEFT model or a plain one.
        tokenizer: Its tokenizer.
        tasks (`str` or `Sequence`): One task or several: names that the harness knows, task configurations as
            mappings, or task objects.
        num_fewshot (`int`, *optional*): Shots; each task's own number if not given.
        limit (`int` or `float`, *optional*): Examples per task, or the share of them if below 1.
        batch_size (`int` or `str`): Prompts per forward pass, or "auto".
        include_path (`str` or a sequence, *optional*): Folders with tasks of your own, in YAML files.
        model_options (`Mapping`, *optional*): Passed on to `lm_eval.models.huggingface.HFLM`, such as `max_length`.
        **options: Passed on to `lm_eval.simple_evaluate`, such as `apply_chat_template=True`.

    Returns:
        `dict`: what `simple_evaluate` returns; scores are in `["results"]`. None in all processes but the main one.

    Raises:
        ImportError: if lm-eval is not installed.
        ValueError: if no task is named.
        TypeError: if an option is given twice.
    """
    tasks = [tasks] if isinstance(tasks, (str, Mapping)) else list(tasks)
    if not tasks:
        raise ValueError("There are no tasks to run: name at least one, such as tasks=['hellaswag'].")
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            "run_harness needs the lm-evaluation-harness: pip install 'peft-edit[harness]' (or: pip install lm_eval)."
        ) from error
    if include_path is not None:
        if "task_manager" in options:
            raise TypeError("include_path and task_manager exclude each other: give the folders to the task manager.")
        options["task_manager"] = TaskManager(include_path=_as_paths(include_path))
    with evaluating(model), runnable(model), _random_states():
        return lm_eval.simple_evaluate(
            model=_harness_model(model, tokenizer, batch_size, model_options or {}),
            tasks=tasks,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            **options,
        )


def _as_paths(include_path: Any) -> list[str]:
    folders = [include_path] if isinstance(include_path, (str, os.PathLike)) else include_path
    return [os.fspath(folder) for folder in folders]


def _harness_model(model: Any, tokenizer: Any, batch_size: int | str, options: Mapping[str, Any]) -> Any:
    """The model as the harness sees it. It takes ready models for the only process; here the processes share out."""
    from lm_eval.models.huggingface import HFLM

    workers = Workers.of(model)

    class SharedModel(HFLM):
        @property
        def device(self) -> torch.device:
            device = model.get_input_embeddings().weight.device
            return torch.device("cpu") if device.type == "meta" else device

        @property
        def rank(self) -> int:
            return workers.rank if workers.splits else 0

        @property
        def world_size(self) -> int:
            return workers.size if workers.splits else 1

        def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
            return torch.cat([part.reshape(-1) for part in workers.gather(tensor.cpu())])

        def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
            values = workers.gather(obj)
            return values if self.rank == dst else None

        def barrier(self) -> None:
            workers.wait()

    own_tokenizer = copy.deepcopy(tokenizer)  # the harness sets a padding token
    return SharedModel(pretrained=model, tokenizer=own_tokenizer, batch_size=batch_size, **options)


@contextmanager
def _random_states() -> Iterator[None]:
    """The harness seeds the global generators; here they go on afterwards as if it had not."""
    import numpy

    python, array = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(array)
