"""Forward passes over questions with given answers, which may begin in the middle of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..architectures import find_blocks, find_down_projections
from ..facts import PLACEHOLDER, Fact
from ..hooks import like_output, on_output, replaced_forward
from ..prompts import PromptEncoder, TokenizedPrompt


@dataclass(frozen=True)
class Question:
    """A prompt, an answer to it, and where in the prompt the subject stands.

    Args:
        prompt (`TokenizedPrompt`): Prompt and answer.
        subject_start (`int`): Index of the subject's first token.
    """

    prompt: TokenizedPrompt
    subject_start: int

    @classmethod
    def of(cls, encoder: PromptEncoder, fact: Fact, answer: str | None, prefix: str = "") -> Question:
        """The fact's prompt behind a prefix, with an answer (None: none yet)."""
        prompt = encoder.encode(fact, fact.prompt, prefix, answer)
        begin = len(prefix) + fact.prompt.index(PLACEHOLDER) + len(fact.subject) - len(fact.subject.lstrip())
        text = (prefix + fact.filled_prompt).rstrip()
        offsets = encoder.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        start = next((place for place, (_, end) in enumerate(offsets) if end > begin), prompt.subject_index)
        return cls(prompt, min(start, prompt.subject_index))

    def answered(self, token: int) -> Question:
        """The same with one token as its answer."""
        prompt = self.prompt
        ids = (*prompt.ids[: prompt.prompt_length], token)
        return Question(TokenizedPrompt(ids, prompt.subject_index, prompt.prompt_length), self.subject_start)


class Passes:
    """Runs N questions, padded to T tokens, and reads the log-probability of their answers.

    The output head is applied where an answer's token is predicted, and nowhere else.

    Args:
        model: The causal language model, in eval mode.
        questions (`Sequence[Question]`): Each with an answer.
    """

    def __init__(self, model: Any, questions: Sequence[Question]) -> None:
        self.model = model
        self.blocks: list[nn.Module] = list(find_blocks(model)[1])
        self.prompts = [question.prompt for question in questions]
        device = model.get_input_embeddings().weight.device
        self.device = torch.device("cpu") if device.type == "meta" else device
        self.lengths = torch.tensor([len(prompt.ids) - 1 for prompt in self.prompts])
        width = int(self.lengths.max())
        ids = [[*prompt.ids[:-1], *[0] * (width - len(prompt.ids) + 1)] for prompt in self.prompts]
        self.ids = torch.tensor(ids)
        self.subject = torch.tensor([prompt.subject_index for prompt in self.prompts])
        self._output_form: Any = None

    @property
    def every(self) -> torch.Tensor:
        """(N,) the places of all questions."""
        return torch.arange(len(self.prompts))

    def log_probability(self, rows: torch.Tensor) -> torch.Tensor:
        """Log-probability of the whole answer, teacher-forced, under whatever hooks are set.

        Args:
            rows (`torch.LongTensor`): (n,) places of questions, which may be repeated.

        Returns:
            `torch.Tensor`: (n,), float32, in nats; differentiable where gradients are on.
        """
        prompts = [self.prompts[row] for row in rows.tolist()]
        steps = [(row, step) for row, prompt in enumerate(prompts) for step in range(len(prompt.target_ids))]
        read_rows = torch.tensor([row for row, _ in steps])
        columns = torch.tensor([prompts[row].prompt_length - 1 + step for row, step in steps])
        labels = torch.tensor([prompts[row].target_ids[step] for row, step in steps])

        def gather(_module: nn.Module, args: tuple) -> tuple:
            hidden = args[0]
            return (hidden[read_rows.to(hidden.device), columns.to(hidden.device)][None], *args[1:])

        mask = (torch.arange(self.ids.shape[1]) < self.lengths[rows, None]).long()
        handle = self.model.get_output_embeddings().register_forward_pre_hook(gather)
        try:
            logits = self.model(
                input_ids=self.ids[rows].to(self.device), attention_mask=mask.to(self.device), use_cache=False
            ).logits[0]
        finally:
            handle.remove()
        scored = -nn.functional.cross_entropy(logits.float(), labels.to(logits.device), reduction="none")
        return torch.zeros(len(rows), device=scored.device).index_add(0, read_rows.to(scored.device), scored)

    def at_subject(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, width) of (N, T, width) states: those of the subject's last token."""
        return hidden[self.every.to(hidden.device), self.subject.to(hidden.device)]

    @contextmanager
    def reading(self, modules: Sequence[nn.Module]) -> Iterator[list[torch.Tensor]]:
        """The outputs of modules, each (n, T, width), in their order, once a pass has been run inside."""
        seen: list[torch.Tensor] = [torch.empty(0)] * len(modules)

        def keep(place: int, hidden: torch.Tensor) -> None:
            seen[place] = hidden.detach()

        with ExitStack() as stack:
            handle = self.blocks[0].register_forward_hook(self._learn_output_form)
            stack.callback(handle.remove)
            for place, module in enumerate(modules):
                stack.enter_context(self.on_states(module, partial(keep, place)))
            yield seen

    def on_states(self, module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor | None]) -> Any:
        """As `on_output`, with states in the form (n, T, width) where a block flattens the first two."""
        width = self.ids.shape[1]

        def shaped(hidden: torch.Tensor) -> torch.Tensor | None:
            replaced = function(hidden.reshape(-1, width, hidden.shape[-1]))
            return None if replaced is None else replaced.reshape(hidden.shape).to(hidden)

        return on_output(module, shaped)

    @contextmanager
    def entering_after(self, block: int, states: torch.Tensor) -> Iterator[None]:
        """Passes begin behind block `block`, whose output (n, T, d_model) is taken from `states`.

        Needs a pass under `reading` before, which shows in what form the blocks return their output.
        """

        def skip(*_args: Any, **_kwargs: Any) -> Any:
            return like_output(self._output_form, states)

        with ExitStack() as stack:
            for skipped in self.blocks[: block + 1]:
                stack.enter_context(replaced_forward(skipped, skip))
            yield

    def _learn_output_form(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._output_form = (None,) * len(output) if isinstance(output, tuple) else None


def down_projections(model: Any) -> list[nn.Module]:
    """The module of each block's MLP that writes to the residual stream, adapters included.

    Raises:
        ValueError: if blocks or modules are not found; see `peft_edit.architectures`.
    """
    names = find_down_projections(model)
    return [_down_projection(dict(block.named_modules()), names) for block in find_blocks(model)[1]]


def _down_projection(modules: dict[str, nn.Module], names: Sequence[str]) -> nn.Module:
    """Of a block's modules; of an adapted one the whole, not the base or a weight of the adapter inside."""
    name = next(name for name in names if name in modules)
    parts = name.split(".")
    around = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return modules[next((outer for outer in around if isinstance(modules[outer], BaseTunerLayer)), name)]
