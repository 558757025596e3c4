"""What an edited model makes of probes, and how far the edited answer spreads to where it does not belong.

Overfitting is measured as in EVOKE (arXiv 2410.07819): by probabilities of the edit target, of the right answer and
of the original answer. Definitions, and what they do not show: docs/generation_metrics.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..facts import PLACEHOLDER, Fact, fill
from ..prompts import ESSENCE_PROMPT, join
from .cases import Case, Probe
from .generation import Stop, contains_answer, generate_answers
from .scores import fact_means, prompts_of, score_pairs


MODES = ("greedy", "generation")

NEGATION_TEMPLATE = "It is not true that {}"

# Words that open a sentence and are written small inside one.
_SMALL_INSIDE = frozenset("The A An In On At Of As His Her Its Their This That These Those".split())


@dataclass(frozen=True)
class ProbeScore:
    """Scores of one kind of probe, in percent, each the mean over cases of the mean over a case's probes.

    Args:
        answered (`float`): One of the right answers was given; NaN where none is known.
        overfit (`float`): The edit target was given, where it is not a right answer; NaN where it always is one.
        cases (`int`): Cases with such a probe.
        probes (`int`): Number of probes.
        per_case (`dict[str, list[float]]`): Values of each score, by its name, of every case given, in their order;
            NaN for a case without such probes.
    """

    answered: float
    overfit: float
    cases: int
    probes: int
    per_case: dict[str, list[float]] = field(repr=False)


@dataclass(frozen=True)
class ProbeScores:
    """Scores of probes by kind. Prints as a table.

    Args:
        mode (`str`): How they were asked: one of `MODES`.
        kinds (`dict[str, ProbeScore]`): Scores of every kind that a case has a probe of.
    """

    mode: str
    kinds: dict[str, ProbeScore]

    def to_dict(self, per_case: bool = False) -> dict[str, Any]:
        """Plain mapping by kind; the values of every case are in it only if asked for."""
        return {"mode": self.mode, "kinds": _plain(self.kinds, per_case)}

    def __str__(self) -> str:
        return _table(f"probes ({self.mode})", self.kinds, ("answered", "overfit"))


@dataclass(frozen=True)
class OverfitScore:
    """Probabilities and rates of one kind of prompt, in percent, as in EVOKE (arXiv 2410.07819).

    A probability is exp of the mean log-probability of the answer's tokens. Each value is the mean over cases of the
    mean over a case's prompts, and NaN where the kind has no such answer.

    Args:
        dp (`float`): Direct probability, of the edit target.
        cap (`float`): Correct answer probability, of the most probable right answer.
        oap (`float`): Original answer probability, of `target_true`, where the edit has made it wrong.
        eos (`float`): Editing overfit score: the share of prompts with a right answer more probable than the edit
            target; high is good.
        ams (`float`): Answer modify score: the share of prompts with the edit target more probable than the original
            answer, where the edit target is right; high is good.
        cases (`int`): Cases with such a prompt.
        prompts (`int`): Number of prompts.
        per_case (`dict[str, list[float]]`): Values of each score, by its name, of every case given, in their order.
    """

    dp: float
    cap: float
    oap: float
    eos: float
    ams: float
    cases: int
    prompts: int
    per_case: dict[str, list[float]] = field(repr=False)


@dataclass(frozen=True)
class OverfitScores:
    """Overfitting by kind of prompt. Prints as a table.

    Args:
        kinds (`dict[str, OverfitScore]`): See `score_overfitting`.
    """

    kinds: dict[str, OverfitScore]

    def to_dict(self, per_case: bool = False) -> dict[str, Any]:
        """Plain mapping by kind; the values of every case are in it only if asked for."""
        return _plain(self.kinds, per_case)

    def __str__(self) -> str:
        return _table("overfitting", self.kinds, ("dp", "cap", "oap", "eos", "ams"))


def score_probes(
    model: Any,
    tokenizer: Any,
    cases: Sequence[Case],
    mode: str = "greedy",
    batch_size: int = 64,
    max_new_tokens: int = 32,
    stop: Stop = "sentence",
    template: str | None = None,
) -> ProbeScores:
    """Which probes the model answers rightly, and which with the edit target where that is wrong.

    Args:
        model: The edited (or base) model, a PEFT model or a plain one.
        tokenizer: Its tokenizer.
        cases (`Sequence[Case]`): Cases with probes.
        mode (`str`): `"greedy"`: the answer's tokens are the most probable ones, one after the other, whatever would
            follow. `"generation"`: the answer's words stand in what the model freely says before its stop.
        batch_size (`int`): Prompts per pass.
        max_new_tokens, stop: See `generate_until_stop`; for the mode `"generation"` alone.
        template (`str`, *optional*): A frame with `{}` for the probe's prompt, such as `QA_TEMPLATE`.

    Raises:
        ValueError: if there is no probe, or `mode` is another.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")
    if template is not None and PLACEHOLDER not in template:
        raise ValueError(f"The template {template!r} has no {{}} for the prompt to stand in.")
    asked = [
        _Question(kind, place, probe.prompt if template is None else fill(template, probe.prompt), probe.answers)
        for place, case in enumerate(cases)
        for kind, probes in case.probes.items()
        for probe in probes
    ]
    if not asked:
        raise ValueError(f"There are no probes in the {len(cases)} cases.")
    targets = [case.fact.target for case in cases]
    if mode == "generation":
        prompts = list(dict.fromkeys(question.prompt for question in asked))
        said = dict(zip(prompts, generate_answers(model, tokenizer, prompts, max_new_tokens, stop, batch_size)))

        def given(prompt: str, answer: str) -> bool:
            return contains_answer(said[prompt], answer)
    else:
        pairs = [(each.prompt, answer) for each in asked for answer in (*each.right, targets[each.place])]
        pairs = list(dict.fromkeys(pairs))
        greedy = dict(zip(pairs, score_pairs(model, tokenizer, pairs, batch_size).greedy.tolist()))

        def given(prompt: str, answer: str) -> bool:
            return greedy[prompt, answer]

    kinds = {}
    for kind in dict.fromkeys(question.kind for question in asked):
        own = [question for question in asked if question.kind == kind]
        values = [
            {
                "answered": float(any(given(each.prompt, answer) for answer in each.right))
                if each.right
                else math.nan,
                "overfit": math.nan
                if _is_right(targets[each.place], each.right)
                else float(given(each.prompt, targets[each.place])),
            }
            for each in own
        ]
        per_case = _per_case(own, values, len(cases))
        kinds[kind] = ProbeScore(**_means(per_case), cases=_cases(own), probes=len(own), per_case=per_case)
    return ProbeScores(mode, kinds)


def score_overfitting(
    model: Any,
    tokenizer: Any,
    cases: Sequence[Case | Fact],
    batch_size: int = 128,
    negation: str | None = NEGATION_TEMPLATE,
) -> OverfitScores:
    """How probable the edit target is where it belongs, and where it does not.

    The kinds, of which those without any prompt are left out:

    - `efficacy`, `paraphrase`: the target is right, `target_true` was. CAP of the target, OAP, AMS.
    - `neighborhood`: other subjects, `target_true` is right. DP, CAP, EOS.
    - `distraction`: the same behind the edited statement (`distraction_prompts`). DP, CAP, EOS.
    - `essence`: "{subject} is a". No answer is right; DP alone.
    - `negation`: the negated statement (`negation_probe`), of facts that are no questions. DP, CAP, EOS.
    - every kind of probe that the cases hold, without the probes that the target answers rightly. DP, CAP, EOS.

    Args:
        model: The edited (or base) model, a PEFT model or a plain one.
        tokenizer: Its tokenizer.
        cases (`Sequence[Case | Fact]`): Cases, or facts alone. Without `target_true` only what needs none is measured.
        batch_size (`int`): Prompts per forward pass.
        negation (`str`, *optional*): Template of the negated statement; None leaves them out.

    Raises:
        ValueError: if there is no case.
    """
    own_cases = [Case(case) if isinstance(case, Fact) else case for case in cases]
    facts = [case.fact for case in own_cases]
    asked = _overfit_questions(own_cases, negation)
    pairs: dict[tuple[str, str], int] = {}
    for question in asked:
        for answer in (facts[question.place].target, *question.right, *question.original):
            pairs.setdefault((question.prompt, answer), len(pairs))
    found = score_pairs(model, tokenizer, list(pairs), batch_size).log_probability.double().exp().tolist()

    def probability(question: _Question, answers: Sequence[str]) -> float:
        return max((found[pairs[question.prompt, answer]] for answer in answers), default=math.nan)

    kinds = {}
    for kind in dict.fromkeys(question.kind for question in asked):
        own = [question for question in asked if question.kind == kind]
        values = []
        for each in own:
            target = [facts[each.place].target]
            wrong = each.right != tuple(target)
            direct = probability(each, target) if wrong else math.nan
            right, original = probability(each, each.right), probability(each, each.original)
            rates = {"eos": _greater(right, direct), "ams": _greater(right, original)}
            values.append({"dp": direct, "cap": right, "oap": original, **rates})
        per_case = _per_case(own, values, len(facts))
        kinds[kind] = OverfitScore(**_means(per_case), cases=_cases(own), prompts=len(own), per_case=per_case)
    return OverfitScores(kinds)


def negation_probe(fact: Fact, template: str = NEGATION_TEMPLATE) -> Probe:
    """Asks what is *not* so. The right answer is `target_true`, which the edit has made false (none if not known).

    Args:
        fact (`Fact`): The edited fact.
        template (`str`): With `{}` for the edited prompt, whose first word is written small where it allows that.

    Raises:
        ValueError: if the template has no `{}`, or the prompt is a question, which cannot be negated so.
    """
    if PLACEHOLDER not in template:
        raise ValueError(f"The template {template!r} holds no {{}}: write it where the statement stands.")
    if fact.prompt.rstrip().endswith("?"):
        raise ValueError(
            f"The prompt {fact.filled_prompt!r} is a question: a negated statement needs a prompt that the answer "
            "completes."
        )
    statement = fact.filled_prompt
    if not template.startswith(PLACEHOLDER) and fact.prompt.split(maxsplit=1)[0] in _SMALL_INSIDE:
        statement = statement[0].lower() + statement[1:]
    return Probe(fill(template, statement), () if fact.target_true is None else (fact.target_true,), fact.subject)


def distraction_prompts(fact: Fact) -> list[str]:
    """The edited statement, then a neighbouring prompt: the target has just been read, and does not belong."""
    statement = "".join(join(fact.filled_prompt, fact.target)).rstrip(". ")
    return [f"{statement}. {prompt}" for prompt in fact.neighborhood]


@dataclass(frozen=True)
class _Question:
    """A prompt of a kind, about the case at some place, with its right answers and what was right before."""

    kind: str
    place: int
    prompt: str
    right: tuple[str, ...] = ()
    original: tuple[str, ...] = ()


def _overfit_questions(cases: Sequence[Case], negation: str | None) -> list[_Question]:
    facts = [case.fact for case in cases]
    true = [() if fact.target_true is None else (fact.target_true,) for fact in facts]
    asked = []
    for kind, prompts in prompts_of(facts).items():
        for place, text in prompts:
            answers = (true[place],) if kind == "neighborhood" else ((facts[place].target,), true[place])
            asked.append(_Question(kind, place, text, *answers))
    for place, (case, fact) in enumerate(zip(cases, facts)):
        asked += [_Question("distraction", place, text, true[place]) for text in distraction_prompts(fact)]
        asked.append(_Question("essence", place, fill(ESSENCE_PROMPT, fact.subject)))
        probes = [(kind, probe) for kind, own in case.probes.items() for probe in own]
        if negation is not None and not fact.prompt.rstrip().endswith("?"):
            probes.append(("negation", negation_probe(fact, negation)))
        asked += [
            _Question(kind, place, probe.prompt, probe.answers)
            for kind, probe in probes
            if not _is_right(fact.target, probe.answers)
        ]
    return asked


def _is_right(target: str, answers: Sequence[str]) -> bool:
    """Whether target and one of the answers are the same, or one stands in the other ("York", "New York")."""
    return any(contains_answer(answer, target) or contains_answer(target, answer) for answer in answers)


def _greater(first: float, second: float) -> float:
    """1 or 0; NaN where one is not known."""
    return math.nan if math.isnan(first) or math.isnan(second) else float(first > second)


def _per_case(asked: Sequence[_Question], values: Sequence[Mapping[str, float]], count: int) -> dict[str, list[float]]:
    """Mean of each value over a case's questions that have it, in percent; NaN for a case without."""
    means = {}
    for name in values[0]:
        known = [(each.place, value[name]) for each, value in zip(asked, values) if not math.isnan(value[name])]
        means[name] = fact_means([100.0 * value for _, value in known], [place for place, _ in known], count)
    return means


def _means(per_case: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    known = {name: [value for value in values if not math.isnan(value)] for name, values in per_case.items()}
    return {name: sum(values) / len(values) if values else math.nan for name, values in known.items()}


def _cases(asked: Sequence[_Question]) -> int:
    return len({question.place for question in asked})


def _plain(kinds: Mapping[str, Any], per_case: bool) -> dict[str, Any]:
    return {
        kind: {name: value for name, value in asdict(score).items() if per_case or name != "per_case"}
        for kind, score in kinds.items()
    }


def _table(title: str, kinds: Mapping[str, Any], columns: Sequence[str]) -> str:
    lines = [f"{title:26}{'cases':>8}" + "".join(f"{name:>10}" for name in columns)]
    for kind, score in kinds.items():
        cells = [getattr(score, name) for name in columns]
        texts = ["-" if math.isnan(cell) else f"{cell:.1f}" for cell in cells]
        lines.append(f"{kind:26}{score.cases:>8}" + "".join(f"{text:>10}" for text in texts))
    return "\n".join(lines)
