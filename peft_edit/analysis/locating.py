"""Where to edit: a cheap trial of each layer, and causal tracing beside it.

Causal tracing says where a model keeps an answer, which is not where an edit of it works best (Hase et al. 2023, arXiv
2301.04213). So the ranking asks what an edit needs of a layer: that a bounded step of its output at the subject's last
token brings the new answer nearer (`gain`), and that the key which it would be stored under is found again behind
other text and belongs to that subject alone (`selectivity`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..architectures import find_blocks
from ..facts import Fact, FactLike, as_facts
from ..hooks import evaluating, on_input, on_output
from ..prompts import PromptEncoder, context_window, generate_contexts
from .passes import Passes, Question, down_projections
from .tracing import LAST_SUBJECT_TOKEN, Tracing, known_questions, trace


MEASURES = ("score", "gain", "selectivity", "traced")


@dataclass(frozen=True)
class LayerTrial:
    """What speaks for editing one layer; means over facts.

    Args:
        layer (`int`): Index of the block.
        gain (`float`): Rise of log P(target), in nats, by a step of fixed relative size at the subject's last token.
        selectivity (`float`): Cosine of a fact's key with its key behind other text, minus that with the nearest key
            of another subject; -2..1.
        traced (`float`, *optional*): Indirect effect of restoring the MLP output at the subject's last token.
    """

    layer: int
    gain: float
    selectivity: float
    traced: float | None = None

    @property
    def score(self) -> float:
        """`gain * selectivity`, or 0 where either is not positive: what an edit gains behind other text, less what it
        does to the nearest other subject."""
        return max(0.0, self.gain) * max(0.0, self.selectivity)


@dataclass(frozen=True)
class LocateReport:
    """Where to edit a model, by some facts. Prints as a table.

    Args:
        layers (`list[LayerTrial]`): One for each block, in order.
        width (`int`): Layers in a band where none is asked for: a sixth of the depth, 1 to 5.
        facts (`int`): Facts that were tried.
        unknown (`int`): Facts left out of the tracing: the model does not answer them with `target_true`.
        step (`float`): Size of the step, as a share of the norm of the hidden state.
        tracing (`Tracing`, *optional*): The heat map; None if it was not asked for, or no fact is known.
        seconds (`dict[str, float]`): Wall-clock seconds per stage.
    """

    layers: list[LayerTrial]
    width: int
    facts: int
    unknown: int
    step: float
    tracing: Tracing | None
    seconds: dict[str, float]

    def ranking(self, by: str = "score") -> list[int]:
        """Layers, the best first; `by`: one of `MEASURES`."""
        values = self._values(by)
        return sorted(range(len(values)), key=lambda layer: -values[layer])

    def bands(self, count: int | None = None, by: str = "score") -> list[tuple[list[int], float]]:
        """Contiguous bands of layers with their mean measure, the best first.

        Args:
            count (`int`, *optional*): Layers in a band; by default bands of 1 to `width` layers are ranked together.
            by (`str`): One of `MEASURES`.

        Raises:
            ValueError: if the model has not so many layers.
        """
        values = self._values(by)
        if count is not None and not 1 <= count <= len(values):
            raise ValueError(
                f"A band of {count} layers does not fit into a model of {len(values)}; ask for 1 to that."
            )
        widths = range(1, self.width + 1) if count is None else [count]
        found = [
            (list(range(first, first + size)), sum(values[first : first + size]) / size)
            for size in widths
            for first in range(len(values) - size + 1)
        ]
        return sorted(found, key=lambda band: -band[1])

    def best_layers(self, count: int | None = None, by: str = "score") -> list[int]:
        """The best contiguous band, for `EditConfig(layers_to_transform=...)`.

        Args:
            count (`int`, *optional*): Layers in it; by default `width`.
            by (`str`): One of `MEASURES`.
        """
        return self.bands(self.width if count is None else count, by)[0][0]

    def to_dict(self) -> dict[str, Any]:
        """Plain Python containers, ready for JSON; NaN as None."""
        found = asdict(self)
        for trial, entry in zip(self.layers, found["layers"]):
            entry["score"] = trial.score
        found["best_layers"] = self.best_layers()
        if self.tracing is not None:
            for kind, rows in self.tracing.effects.items():
                found["tracing"]["effects"][kind] = [
                    [None if effect != effect else effect for effect in row] for row in rows
                ]
        return found

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False)

    def plot(self) -> Any:
        """The heat map of the tracing as a `matplotlib.figure.Figure`."""
        from .plots import plot_tracing

        return plot_tracing(self)

    def _values(self, by: str) -> list[float]:
        if by not in MEASURES:
            raise ValueError(f"by must be one of {', '.join(MEASURES)}, got {by!r}.")
        if by == "traced" and self.tracing is None:
            raise ValueError("There is no tracing to rank by: no fact was known, or locate_layers had tracing=False.")
        return [getattr(trial, by) for trial in self.layers]

    def __str__(self) -> str:
        traced = self.tracing
        total = sum(self.seconds.values())
        lines = [f"Best band of {self.width}: {self.best_layers()}; by {self.facts} facts, {total:.1f} s."]
        if traced is not None:
            lines.append(
                f"Traced: P(answer) {traced.clean:.3f}, with the subject corrupted {traced.corrupted:.3f}; "
                f"{self.unknown} facts are not known and were left out."
            )
        lines += ["", f"{'layer':>5}  {'score':>7}  {'gain':>7}  {'selectivity':>11}  {'traced':>7}"]
        for trial in self.layers:
            effect = "-" if trial.traced is None else f"{trial.traced:.3f}"
            lines.append(
                f"{trial.layer:>5}  {trial.score:>7.2f}  {trial.gain:>7.2f}  {trial.selectivity:>11.2f}  {effect:>7}"
            )
        return "\n".join(lines)


def locate_layers(
    model: Any,
    tokenizer: Any,
    facts: FactLike | Iterable[FactLike] | str,
    tracing: bool = True,
    samples: int = 5,
    noise: float = 3.0,
    window: int | None = None,
    step: float = 0.75,
    most_facts: int = 100,
    batch_size: int = 256,
    seed: int = 0,
) -> LocateReport:
    """Ranks the layers of a model by how well facts can be written there, before any is.

    The ranking takes one pass with gradients and, for each layer, one pass through the blocks above it. Tracing takes
    more (`trace`) and does not change the ranking.

    Args:
        model: A causal language model. It is left as it was; a PEFT model is taken as it stands.
        tokenizer: Its (fast) tokenizer.
        facts: As for `edit_facts`: facts like those that are to be written. The tracing asks for `target_true`, or
            for the model's own next token where a fact has none.
        tracing (`bool`): Trace too.
        samples (`int`), noise (`float`), window (`int`, *optional*): Of the tracing; see `trace`.
        step (`float`): Size of the trial step as a share of the norm of the hidden state; by default the radius in
            which `edit_facts` searches.
        most_facts (`int`): Facts that are used at most, evenly spaced.
        batch_size (`int`): Sequences in a pass at most.
        seed (`int`): Of the noise, and of the text that the model writes to put before prompts.

    Returns:
        `LocateReport`

    Raises:
        FactError: if a fact is malformed.
        ValueError: if there is no fact, an argument is out of range, or the model's blocks are not found.
    """
    chosen = _spaced(as_facts(facts), most_facts)
    if not chosen:
        raise ValueError("locate_layers needs facts like those that are to be written; none was given.")
    if not step > 0 or batch_size < 1:
        raise ValueError(f"step and batch_size must be above 0, got {step!r} and {batch_size!r}.")
    encoder = PromptEncoder(tokenizer, model.get_input_embeddings().num_embeddings, context_window(model.config))
    with evaluating(model):
        start = time.perf_counter()
        gains, keys = try_layers(model, encoder, chosen, step, batch_size)
        (context,) = generate_contexts(model, tokenizer, count=1, seed=seed)
        elsewhere = _keys(model, encoder, chosen, context, batch_size)
        selectivities = key_selectivity(keys, elsewhere, [fact.subject for fact in chosen])
        seconds = {"trial": time.perf_counter() - start}
        found, unknown = None, 0
        if tracing:
            start = time.perf_counter()
            questions, unknown = known_questions(model, encoder, chosen)
            if questions:
                settings = (samples, noise, window)
                found = trace(model, questions, *settings, batch_size=batch_size, seed=seed)
            seconds["tracing"] = time.perf_counter() - start
    traced = found.effects["mlp"][LAST_SUBJECT_TOKEN] if found is not None else [None] * len(gains)
    return LocateReport(
        layers=[
            LayerTrial(layer, *values)
            for layer, values in enumerate(zip(gains.tolist(), selectivities.tolist(), traced))
        ],
        width=band_width(len(find_blocks(model)[1])),
        facts=len(chosen),
        unknown=unknown,
        step=step,
        tracing=found,
        seconds=seconds,
    )


def band_width(layers: int) -> int:
    """Layers to edit in a model of this depth: five of 32, as published, in proportion; 1 to 5."""
    return min(5, max(1, layers * 5 // 32))


def try_layers(
    model: Any, encoder: PromptEncoder, facts: Sequence[Fact], step: float, batch_size: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Rise of log P(target) by one step against its gradient at the subject's last token, layer by layer.

    Args:
        model: The causal language model, in eval mode.
        encoder (`PromptEncoder`): Of its tokenizer.
        facts (`Sequence[Fact]`): F facts.
        step (`float`): Length of the step as a share of the norm of the block's output there.
        batch_size (`int`): Facts in a pass at most.

    Returns:
        (L,) mean rise over facts in nats, float32; and of each layer the down-projection's inputs there, (F, d_in).
    """
    rises, keys = [], []
    for part in _parts(facts, batch_size):
        passes = Passes(model, [Question.of(encoder, fact, fact.target) for fact in part])
        gradients, states, before, own_keys = _gradients(passes, down_projections(model))
        rises.append(
            torch.stack(
                [_after_step(passes, layer, *pair, step) - before for layer, pair in enumerate(zip(states, gradients))]
            )
        )
        keys.append(own_keys)
    return torch.cat(rises, dim=1).mean(1), [torch.cat(layer) for layer in zip(*keys)]


def key_selectivity(
    keys: Sequence[torch.Tensor], elsewhere: Sequence[torch.Tensor], subjects: Sequence[str]
) -> torch.Tensor:
    """How well a fact's key is found again, and told from those of other subjects.

    Args:
        keys (`Sequence[torch.Tensor]`): Of each layer (F, d_in): the keys of F facts.
        elsewhere (`Sequence[torch.Tensor]`): The same behind other text.
        subjects (`Sequence[str]`): Of the facts.

    Returns:
        `torch.Tensor`: (L,) mean cosine with the own key elsewhere, minus that with the nearest key of another
        subject; both of keys minus their mean. With fewer than three subjects there is nothing to compare with: 1.
    """
    names = sorted(set(subjects))
    if len(names) < 3:
        return torch.ones(len(keys))
    places = torch.tensor([names.index(subject) for subject in subjects])
    same = places[:, None] == places
    found = []
    for own, other in zip(keys, elsewhere):
        cosines = (_directions(own) @ _directions(other).T).cpu()
        nearest = cosines.masked_fill(same, -torch.inf).amax(1)
        found.append((cosines.diagonal() - nearest).mean())
    return torch.stack(found)


def _gradients(
    passes: Passes, writers: Sequence[nn.Module]
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
    """One pass forward and back: gradients of log P at each block's output at the subject, the outputs (N, T, width),
    log P (N,), and the keys."""
    increments: list[torch.Tensor] = []
    keys: list[torch.Tensor] = [torch.empty(0)] * len(writers)

    def add(hidden: torch.Tensor) -> torch.Tensor:
        increment = hidden.new_zeros(len(hidden), hidden.shape[-1], requires_grad=True)
        increments.append(increment)
        return _moved(passes, hidden.detach() if len(increments) == 1 else hidden, increment)

    def keep(layer: int, entering: torch.Tensor) -> None:
        width = passes.ids.shape[1]
        keys[layer] = passes.at_subject(entering.detach().reshape(-1, width, entering.shape[-1])).float()

    with torch.enable_grad(), passes.reading(passes.blocks) as states, ExitStack() as stack:
        for layer, (block, writer) in enumerate(zip(passes.blocks, writers)):
            stack.enter_context(on_output(block, add))
            stack.enter_context(on_input(writer, partial(keep, layer)))
        scored = passes.log_probability(passes.every)
        gradients = torch.autograd.grad(scored.sum(), increments)
    return list(gradients), states, scored.detach(), keys


def _after_step(passes: Passes, layer: int, states: torch.Tensor, gradient: torch.Tensor, step: float) -> torch.Tensor:
    """(N,) log P after a step along the gradient, `step` times the norm of the block's output long."""
    length = step * passes.at_subject(states).float().norm(dim=-1, keepdim=True)
    increment = length * nn.functional.normalize(gradient.float(), dim=-1)
    with torch.no_grad(), passes.entering_after(layer, _moved(passes, states, increment.to(states))):
        return passes.log_probability(passes.every)


def _moved(passes: Passes, hidden: torch.Tensor, increment: torch.Tensor) -> torch.Tensor:
    """(N, T, width) states with an increment (N, width) at the subject's last token."""
    places = (passes.every.to(hidden.device), passes.subject.to(hidden.device))
    return hidden.index_put(places, increment, accumulate=True)


def _keys(
    model: Any, encoder: PromptEncoder, facts: Sequence[Fact], prefix: str, batch_size: int
) -> list[torch.Tensor]:
    """Of each layer (F, d_in): the down-projection's inputs at the subject's last token behind a prefix."""
    keys: list[list[torch.Tensor]] = []
    for part in _parts(facts, batch_size):
        passes = Passes(model, [Question.of(encoder, fact, fact.target, prefix) for fact in part])
        width = passes.ids.shape[1]
        seen: list[torch.Tensor] = []

        def keep(entering: torch.Tensor, passes=passes, width=width, seen=seen) -> None:
            seen.append(passes.at_subject(entering.reshape(-1, width, entering.shape[-1])).float())

        with torch.no_grad(), ExitStack() as stack:
            for writer in down_projections(model):
                stack.enter_context(on_input(writer, keep))
            passes.log_probability(passes.every)
        keys.append(seen)
    return [torch.cat(layer) for layer in zip(*keys)]


def _directions(keys: torch.Tensor) -> torch.Tensor:
    return nn.functional.normalize(keys - keys.mean(0), dim=-1)


def _parts(facts: Sequence[Fact], size: int) -> list[Sequence[Fact]]:
    return [facts[start : start + size] for start in range(0, len(facts), size)]


def _spaced(facts: Sequence[Fact], most: int) -> list[Fact]:
    """At most so many facts, evenly spaced, always the same."""
    if most < 1:
        raise ValueError(f"most_facts must be at least 1, got {most!r}.")
    count = min(most, len(facts))
    return [facts[place * len(facts) // count] for place in range(count)]
