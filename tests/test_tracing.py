"""Causal tracing: batches against a plain loop on whole sequences, planted paths, positions, known answers."""

import math

import pytest
import torch
from torch import nn

from peft_edit import Fact
from peft_edit.analysis import POSITIONS, locate_layers
from peft_edit.analysis.passes import Question
from peft_edit.analysis.tracing import (
    LAST_SUBJECT_TOKEN,
    around,
    known_questions,
    position_classes,
    subject_deviation,
    subject_noise,
    trace,
)
from peft_edit.prompts import PromptEncoder

from .models import build_model
from .planted_answers import LAYERS, TOKENIZER, encoder_of, one_word_facts, planted, two_word_facts


class PlainRuns:
    """One question and one sample of noise, traced on whole sequences, one run at a time."""

    def __init__(self, model, question, noise):
        assert len(question.prompt.target_ids) == 1
        self.model, self.question, self.noise = model, question, noise
        self.modules = {
            "hidden": list(model.model.layers),
            "mlp": [block.mlp.down_proj for block in model.model.layers],
        }
        self.clean: dict[tuple[str, int], torch.Tensor] = {}
        self.run(corrupt=False, keep=True)
        self.corrupted = self.run(corrupt=True)

    def effect(self, kind, layers, tokens) -> float:
        """P(answer | restored) - P(answer | corrupted)."""
        return self.run(corrupt=True, restored=[(kind, layer) for layer in layers], tokens=tokens) - self.corrupted

    def run(self, corrupt, keep=False, restored=(), tokens=None) -> float:
        prompt, handles = self.question.prompt, []

        def at_embedding(_module, _args, output):
            output = output.clone()
            output[0, self.question.subject_start : prompt.subject_index + 1] += self.noise
            return output

        def at_module(place):
            def hook(_module, _args, output):
                hidden = output[0] if isinstance(output, tuple) else output
                if keep:
                    self.clean[place] = hidden.clone()
                if place in restored:
                    hidden = hidden.clone()
                    hidden[0, tokens] = self.clean[place][0, tokens]
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            return hook

        if corrupt:
            handles.append(self.model.get_input_embeddings().register_forward_hook(at_embedding))
        for kind, modules in self.modules.items():
            handles += [module.register_forward_hook(at_module((kind, layer))) for layer, module in enumerate(modules)]
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([prompt.ids[:-1]])).logits[0, prompt.prompt_length - 1]
        for handle in handles:
            handle.remove()
        return float(logits.softmax(-1)[prompt.target_ids[0]])


class TestTracing:
    @pytest.mark.parametrize("family, window", [("llama", 1), ("llama", 2), ("gpt2", 3)])
    def test_batches_equal_a_plain_loop(self, family: str, window: int) -> None:
        model = build_model(family)
        if family == "gpt2":  # the names that the plain loop uses
            model.model = nn.Module()
            model.model.layers = model.transformer.h
            for block in model.transformer.h:
                block.mlp.down_proj = block.mlp.c_proj
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(4.0)  # so that effects are far above rounding
            (model.transformer.ln_f if family == "gpt2" else model.model.norm).weight.mul_(8.0)
        questions, unknown = known_questions(model, encoder_of(model), two_word_facts())
        assert (len(questions), unknown) == (4, 0)
        samples, seed = 2, 7
        found = trace(model, questions, samples=samples, window=window, batch_size=30, seed=seed)
        again = trace(model, questions, samples=samples, window=window, batch_size=10_000, seed=seed)
        deviation = 3.0 * subject_deviation(model, questions)
        width = model.get_input_embeddings().weight.shape[1]
        runs = [
            [
                PlainRuns(model, question, noise * deviation)
                for noise in subject_noise(question, samples, width, seed * 1_000_003 + place)
            ]
            for place, question in enumerate(questions)
        ]
        for kind in ("hidden", "mlp"):
            effects = torch.tensor(found.effects[kind])
            torch.testing.assert_close(effects, torch.tensor(again.effects[kind]), atol=1e-6, rtol=1e-5)
            assert float(effects.abs().max()) > 1e-3
            for position in range(len(POSITIONS)):
                tokens = [position_classes(question)[position].nonzero().flatten() for question in questions]
                assert found.facts[position] == sum(len(own) > 0 for own in tokens)
                for layer in range(LAYERS):
                    span = [layer] if kind == "hidden" else list(around(layer, window, LAYERS))
                    values = [
                        run.effect(kind, span, own) for each, own in zip(runs, tokens) if len(own) for run in each
                    ]
                    assert found.effects[kind][position][layer] == pytest.approx(sum(values) / len(values), abs=2e-6)

    def test_a_planted_path_is_found(self) -> None:
        """The subject's MLP of block 1 and the attention of block 2 carry the answer, nothing else does."""
        model = planted(mlp=1, attention=2)
        questions, _ = known_questions(model, encoder_of(model), one_word_facts())
        found = trace(model, questions, samples=3, window=1)
        assert found.total_effect > 0.01
        hidden, mlp = (torch.tensor(found.effects[kind]) for kind in ("hidden", "mlp"))
        # Before it is read, the subject's state is all that was lost; afterwards nothing of it is needed.
        whole = torch.full((2,), found.total_effect)
        torch.testing.assert_close(hidden[LAST_SUBJECT_TOKEN, :2], whole, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(hidden[-1, 2:], whole, atol=1e-6, rtol=1e-5)
        assert hidden[LAST_SUBJECT_TOKEN, 2:].abs().max() < 1e-7 > hidden[-1, :2].abs().max()
        # One MLP writes, so one MLP can be restored.
        assert mlp[LAST_SUBJECT_TOKEN, 1].abs() > 1e-3
        assert mlp[:, [0, 2, 3]][~mlp[:, 0].isnan()].abs().max() < 1e-7
        assert found.facts == [0, 0, 5, 5, 0, 5]
        assert all(math.isnan(value) for value in found.effects["hidden"][0])

    def test_the_planted_layer_leads_the_ranking(self) -> None:
        report = locate_layers(planted(mlp=1, attention=2), TOKENIZER, one_word_facts(), samples=3)
        assert report.ranking("traced")[0] == 1
        assert report.best_layers(1, by="traced") == [1]

    def test_position_classes_are_told_apart(self) -> None:
        model = build_model("llama")
        whole, begins, ends, _ = [Question.of(encoder_of(model), fact, "Rome") for fact in two_word_facts()]
        assert [row.nonzero().flatten().tolist() for row in position_classes(whole)] == [[4], [5], [6], [7], [], [8]]
        assert begins.subject_start == 1 and begins.prompt.subject_index == 3
        classes = position_classes(ends)  # the last subject token is the last token
        assert [row.nonzero().flatten().tolist() for row in classes] == [[4], [5], [6], [], [], []]

    def test_the_subject_is_found_behind_spaces_and_in_word_pieces(self, tiny) -> None:
        model, tokenizer = tiny
        encoder = PromptEncoder(tokenizer, model.get_input_embeddings().num_embeddings)
        fact = Fact(" Sven Wollter ", "The citizenship of {} is", "Norway")
        question = Question.of(encoder, fact, fact.target, prefix="You are here. ")
        ids = question.prompt.ids[question.subject_start : question.prompt.subject_index + 1]
        assert tokenizer.decode(ids).strip() == "Sven Wollter"

    def test_unknown_facts_are_left_out_and_counted(self, tiny, facts) -> None:
        model, tokenizer = tiny
        wrong = [Fact(fact.subject, fact.prompt, fact.target, target_true=fact.target) for fact in facts[3:5]]
        report = locate_layers(model, tokenizer, [*facts[:3], *wrong], samples=1)
        assert (report.facts, report.unknown) == (5, 2)
        assert report.tracing.facts[LAST_SUBJECT_TOKEN] == 3
        assert report.tracing.clean > 0.9
        nothing_known = locate_layers(model, tokenizer, wrong)
        assert nothing_known.tracing is None and nothing_known.unknown == 2

    def test_known_answers_keep_the_order_of_the_facts(self, tiny, facts) -> None:
        model, tokenizer = tiny
        encoder = PromptEncoder(tokenizer, model.get_input_embeddings().num_embeddings)
        mixed = [facts[0], Fact(facts[1].subject, facts[1].prompt, "Oslo"), facts[2]]
        questions, unknown = known_questions(model, encoder, mixed)
        assert unknown == 0
        firsts = [encoder.encode(fact, fact.prompt, "", fact.target_true).target_ids[0] for fact in facts[:3]]
        assert [question.prompt.target_ids[0] for question in questions] == firsts
        assert len(questions[1].prompt.target_ids) == 1
