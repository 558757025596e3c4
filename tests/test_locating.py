"""Locating layers: planted answers, batches against a plain loop, and what residual streams are made of."""

import copy
import json
import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_edit import EditConfig, Fact
from peft_edit.analysis import POSITIONS, locate_layers, residual_contributions
from peft_edit.analysis.locating import band_width, key_selectivity, try_layers
from peft_edit.analysis.passes import Question, down_projections
from peft_edit.analysis.tracing import (
    LAST_SUBJECT_TOKEN,
    around,
    known_questions,
    position_classes,
    subject_deviation,
    subject_noise,
    trace,
)
from peft_edit.architectures import block_index
from peft_edit.prompts import PromptEncoder
from peft_edit.tiny import load_tiny_model

from .models import build_model
from .world import word_tokenizer


TOKENIZER = word_tokenizer()
LAYERS = 4


def encoder_of(model):
    return PromptEncoder(TOKENIZER, model.get_input_embeddings().num_embeddings)


def one_word_facts() -> list[Fact]:
    """Subjects of one token, so that nothing of them is anywhere but at their last token."""
    return [Fact(name, "The town of {} is a", "Rome") for name in ("Ada", "Ben", "Cleo", "Dan", "Eve")]


def two_word_facts() -> list[Fact]:
    """Prompts of different length, some that begin or end with their subject."""
    prompts = ("The town of {} is a", "{} is a", "The town of {}", "Because I is a town of {} . You is")
    return [
        Fact(f"{first} Stone Vale", prompt, city)
        for first, prompt, city in zip(("Ada", "Ben", "Cleo", "Dan"), prompts, ("Rome", "Oslo", "Lima", "Cairo"))
    ]


def planted(mlp: int, attention: int) -> nn.Module:
    """A random Llama in which one block's MLP and one block's attention alone write to the residual stream."""
    model = build_model("llama")
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            # Larger than at the start of training, so that what is written counts beside the embeddings.
            block.mlp.down_proj.weight.mul_(60.0 if layer == mlp else 0.0)
            block.self_attn.o_proj.weight.mul_(60.0 if layer == attention else 0.0)
        model.model.norm.weight.mul_(30.0)  # probabilities far from uniform
    return model


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


class TestTrial:
    def test_gain_is_that_of_a_plain_step(self) -> None:
        model = build_model("llama")
        facts = two_word_facts()
        encoder = encoder_of(model)
        gains, keys = try_layers(model, encoder, facts, step=0.75, batch_size=3)
        for layer, block in enumerate(model.model.layers):
            rises = []
            for place, fact in enumerate(facts):
                prompt = encoder.encode(fact, fact.prompt, "", fact.target)
                state = {}

                def hook(_module, _args, output, state=state, at=prompt.subject_index):
                    hidden = output[0] if isinstance(output, tuple) else output
                    state.setdefault("norm", hidden[0, at].norm().detach())
                    hidden = hidden.clone()
                    hidden[0, at] = hidden[0, at] + state["shift"]
                    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

                def key_hook(_module, args, state=state, at=prompt.subject_index):
                    state["key"] = args[0][0, at].detach()

                def score(shift, state=state, prompt=prompt):
                    state["shift"] = shift
                    logits = model(input_ids=torch.tensor([prompt.ids[:-1]])).logits[0, prompt.prompt_length - 1]
                    return logits.log_softmax(-1)[prompt.target_ids[0]]

                handles = [block.register_forward_hook(hook)]
                handles.append(block.mlp.down_proj.register_forward_pre_hook(key_hook))
                shift = torch.zeros(32, requires_grad=True)
                before = score(shift)
                (gradient,) = torch.autograd.grad(before, shift)
                torch.testing.assert_close(keys[layer][place], state["key"])
                length = gradient.norm()
                direction = gradient / length if length > 0 else gradient
                with torch.no_grad():
                    rises.append(float(score(0.75 * state["norm"] * direction) - before))
                for handle in handles:
                    handle.remove()
            assert float(gains[layer]) == pytest.approx(sum(rises) / len(rises), abs=1e-4)

    @pytest.mark.parametrize("attention", [1, 2, 3])
    def test_layers_past_the_only_reader_gain_nothing(self, attention: int) -> None:
        """What the subject's state says is read in one block; a step there or later comes too late."""
        report = locate_layers(planted(mlp=0, attention=attention), TOKENIZER, one_word_facts(), tracing=False)
        gains = [trial.gain for trial in report.layers]
        assert all(gain > 0.01 for gain in gains[:attention])
        assert gains[attention:] == [0.0] * (LAYERS - attention)
        assert report.best_layers(1)[0] < attention

    def test_selectivity_by_hand(self) -> None:
        """Four keys on the axes, minus their mean; elsewhere the first two are exchanged."""
        keys = torch.eye(4)
        moved = keys[[1, 0, 2, 3]]
        # Of centred axes: own cosine 1, another's -1/3.
        (same,) = key_selectivity([keys], [keys], list("abcd"))
        assert float(same) == pytest.approx(1 + 1 / 3, abs=1e-6)
        (found,) = key_selectivity([keys], [moved], list("abcd"))
        exchanged, kept = -1 / 3 - 1, 1 + 1 / 3
        assert float(found) == pytest.approx((2 * exchanged + 2 * kept) / 4, abs=1e-6)
        # Two facts of one subject share their key by right.
        (shared,) = key_selectivity([keys], [moved], ["a", "a", "c", "d"])
        assert float(shared) == pytest.approx((2 * (-1 / 3 + 1 / 3) + 2 * kept) / 4, abs=1e-6)
        assert key_selectivity([keys[:2]], [keys[:2]], ["a", "b"]).tolist() == [1.0]

    def test_the_tiny_models_best_layer_is_found_in_every_measure(self, tiny, facts) -> None:
        """`benchmarks/layers.py` edits every layer: block 0 takes edits best, block 4 none."""
        model, tokenizer = tiny
        report = locate_layers(model, tokenizer, facts[200:212], samples=2)
        for by in ("score", "gain", "traced"):
            assert report.ranking(by)[:3] == [0, 1, 2]
        assert report.layers[4].gain == 0.0
        assert report.best_layers() == [0] and report.best_layers(2) == [0, 1]


class TestReport:
    def test_the_model_is_left_untouched(self, tiny, facts) -> None:
        model, tokenizer = tiny
        model.train()
        model.model.layers[1].eval()
        before = copy.deepcopy(model.state_dict())
        state = torch.random.get_rng_state()
        locate_layers(model, tokenizer, facts[:4], samples=1)
        assert torch.equal(state, torch.random.get_rng_state())
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])
        for module in model.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks
            assert "forward" not in module.__dict__
        assert model.training and model.model.layers[0].training and not model.model.layers[1].training
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())

    def test_an_error_leaves_no_hook(self, tiny, facts) -> None:
        model, tokenizer = tiny

        def fail(*_args):
            raise RuntimeError("out of order")

        handle = model.model.layers[3].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of order"):
            locate_layers(model, tokenizer, facts[:4], samples=1)
        handle.remove()
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    def test_same_seed_same_report(self, tiny, facts) -> None:
        model, tokenizer = tiny
        one, other = (locate_layers(model, tokenizer, facts[:4], samples=2, seed=3).to_dict() for _ in range(2))
        assert one.pop("seconds").keys() == other.pop("seconds").keys() == {"trial", "tracing"}
        assert one == other
        assert one != locate_layers(model, tokenizer, facts[:4], samples=2, seed=4).to_dict()

    def test_bands_are_means_of_their_layers(self, tiny, facts) -> None:
        model, tokenizer = tiny
        report = locate_layers(model, tokenizer, facts[:6], tracing=False)
        score = [trial.score for trial in report.layers]
        assert [trial.score for trial in report.layers] == [
            max(0.0, trial.gain) * max(0.0, trial.selectivity) for trial in report.layers
        ]
        found = {tuple(layers): value for layers, value in report.bands(3)}
        assert set(found) == {(0, 1, 2), (1, 2, 3), (2, 3, 4)}
        assert found[1, 2, 3] == pytest.approx(sum(score[1:4]) / 3)
        assert report.best_layers(5) == [0, 1, 2, 3, 4]
        assert [report.best_layers(count) for count in (1, 2)] == [
            list(max(report.bands(count), key=lambda band: band[1])[0]) for count in (1, 2)
        ]
        assert (band_width(5), band_width(32), band_width(48), band_width(80)) == (1, 5, 5, 5)

    def test_it_prints_and_becomes_json(self, tiny, facts) -> None:
        model, tokenizer = tiny
        report = locate_layers(model, tokenizer, facts[:6], samples=1)
        lines = str(report).splitlines()
        assert lines[0].startswith("Best band of 1: [0]; by 6 facts")
        assert [line.split()[0] for line in lines[-5:]] == list("01234")
        assert float(lines[-5].split()[1]) == pytest.approx(report.layers[0].score, abs=0.006)
        read = json.loads(report.to_json())
        assert read["best_layers"] == [0] and len(read["tracing"]["effects"]["mlp"]) == len(POSITIONS)
        short = locate_layers(model, tokenizer, Fact("Sven Wollter", "{}", "Norway"), samples=1)
        assert json.loads(short.to_json())["tracing"]["effects"]["mlp"][5] == [None] * 5
        assert "-" in str(locate_layers(model, tokenizer, facts[:3], tracing=False)).splitlines()[-1]

    def test_a_peft_model_is_taken_as_it_stands(self, tiny, facts, tiny_statistics) -> None:
        model, tokenizer = tiny
        plain = [trial.gain for trial in locate_layers(model, tokenizer, facts[:4], tracing=False).layers]
        wrapped = get_peft_model(model, EditConfig(task_type="CAUSAL_LM")).eval()
        unedited = [trial.gain for trial in locate_layers(wrapped, tokenizer, facts[:4], tracing=False).layers]
        assert unedited == pytest.approx(plain, abs=1e-5)
        assert down_projections(wrapped)[0] is wrapped.base_model.model.model.layers[0].mlp.down_proj
        wrapped.edit_facts(facts[:4], tokenizer, statistics=tiny_statistics, progress=False)
        edited = [trial.gain for trial in locate_layers(wrapped, tokenizer, facts[:4], tracing=False).layers]
        assert edited[0] < 0.5 * plain[0]  # the targets are most probable already

    def test_bad_arguments_are_named(self, tiny, facts) -> None:
        model, tokenizer = tiny
        for wrong, message in (
            ({"samples": 0}, "samples must be at least 1"),
            ({"noise": 0.0}, "noise must be above 0"),
            ({"window": 0}, "window must be at least 1"),
            ({"step": 0.0}, "step and batch_size must be above 0"),
            ({"most_facts": 0}, "most_facts must be at least 1"),
        ):
            with pytest.raises(ValueError, match=message):
                locate_layers(model, tokenizer, facts[:2], **wrong)
        with pytest.raises(ValueError, match="none was given"):
            locate_layers(model, tokenizer, [])
        with pytest.raises(ValueError, match="nothing to trace"):
            trace(model, [])
        report = locate_layers(model, tokenizer, facts[:2], tracing=False)
        with pytest.raises(ValueError, match="by must be one of score, gain"):
            report.ranking("norm")
        with pytest.raises(ValueError, match="no tracing to rank by"):
            report.best_layers(by="traced")
        with pytest.raises(ValueError, match="A band of 6 layers does not fit into a model of 5"):
            report.best_layers(6)

    def test_at_most_so_many_facts_are_used(self, tiny, facts) -> None:
        model, tokenizer = tiny
        report = locate_layers(model, tokenizer, facts[:50], most_facts=3, tracing=False)
        spaced = locate_layers(model, tokenizer, [facts[0], facts[16], facts[33]], tracing=False)
        assert report.facts == 3 and report.layers == spaced.layers


class TestContributions:
    def test_parts_are_those_of_the_blocks(self, tiny, facts) -> None:
        model, tokenizer = tiny
        found = residual_contributions(model, tokenizer, facts[:3], batch_size=2)
        values = torch.zeros(3, 5)
        for fact in facts[:3]:
            seen = {}
            handles = []
            for layer, block in enumerate(model.model.layers):
                for name, module in (("attention", block.self_attn), ("mlp", block.mlp), ("block", block)):

                    def hook(_module, _args, output, key=(name, layer), seen=seen):
                        seen[key] = (output[0] if isinstance(output, tuple) else output)[0]

                    handles.append(module.register_forward_hook(hook))
            prompt = PromptEncoder(tokenizer, 2400).encode(fact, fact.prompt, "", None)
            with torch.no_grad():
                model(input_ids=torch.tensor([prompt.ids]))
            for handle in handles:
                handle.remove()
            for layer in range(5):
                size = seen["block", layer][prompt.subject_index].norm()
                for row, name in enumerate(("attention", "mlp")):
                    values[row, layer] += seen[name, layer][prompt.subject_index].norm() / size / 3
                values[2, layer] += size / 3
        torch.testing.assert_close(torch.tensor(found.attention), values[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.tensor(found.mlp), values[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.tensor(found.norm), values[2], rtol=1e-4, atol=1e-5)
        assert found.edit == [0.0] * 5 and found.positions == 3

    def test_the_edits_part_is_delta_times_key(self, tiny, facts) -> None:
        model, tokenizer = tiny
        wrapped = get_peft_model(model, EditConfig(task_type="CAUSAL_LM", layers_to_transform=[1])).eval()
        layer = wrapped.base_model.model.model.layers[1].mlp.down_proj
        before = residual_contributions(wrapped, tokenizer, facts[:1])
        delta = torch.randn(160, 1024, generator=torch.Generator().manual_seed(0)) * 0.05
        layer.set_delta("default", delta)
        found = residual_contributions(wrapped, tokenizer, facts[:1])
        prompt = PromptEncoder(tokenizer, 2400).encode(facts[0], facts[0].prompt, "", None)
        seen = {}
        handles = [
            layer.register_forward_pre_hook(lambda _m, args: seen.update(key=args[0][0, prompt.subject_index])),
            wrapped.base_model.model.model.layers[1].register_forward_hook(
                lambda _m, _a, out: seen.update(h=(out[0] if isinstance(out, tuple) else out)[0, prompt.subject_index])
            ),
        ]
        with torch.no_grad():
            wrapped(input_ids=torch.tensor([prompt.ids]))
        for handle in handles:
            handle.remove()
        expected = float((delta @ seen["key"]).norm() / seen["h"].norm())
        assert found.edit[1] == pytest.approx(expected, rel=1e-4) and expected > 0.01
        assert found.edit[0] == found.edit[2] == 0.0
        with wrapped.disable_adapter():
            assert residual_contributions(wrapped, tokenizer, facts[:1]) == before

    @pytest.mark.parametrize("family", ["gemma2", "granite", "gptj", "gpt2", "opt"])
    def test_other_families_add_up_too(self, family: str) -> None:
        """Norms behind the MLP, factors, parallel blocks: attention's part is what attention writes."""
        model = build_model(family)
        found = residual_contributions(model, TOKENIZER, one_word_facts())
        assert all(0 < share < 2 for share in [*found.attention, *found.mlp])
        with torch.no_grad():
            for module in down_projections(model):
                for parameter in module.parameters():
                    parameter.zero_()
        silent = residual_contributions(model, TOKENIZER, one_word_facts())
        assert max(silent.mlp) < 1e-6 < min(silent.attention)

    def test_texts_are_averaged_over_all_tokens_but_the_first(self, tiny, facts) -> None:
        model, tokenizer = tiny
        texts = [facts[0].filled_prompt, facts[1].filled_prompt]
        found = residual_contributions(model, tokenizer, texts)
        assert found.positions == sum(len(tokenizer(text)["input_ids"]) - 1 for text in texts)
        apart = [residual_contributions(model, tokenizer, [text]) for text in texts]
        mean = sum(part.mlp[2] * part.positions for part in apart) / found.positions
        assert found.mlp[2] == pytest.approx(mean, rel=1e-4)
        assert len(str(found).splitlines()) == 6 and found.to_dict()["positions"] == found.positions
        with pytest.raises(ValueError, match="no token to measure on"):
            residual_contributions(model, tokenizer, [])


def test_an_adapter_goes_where_the_measurement_says(tmp_path, facts):
    base, tokenizer = load_tiny_model()
    model = get_peft_model(base, EditConfig(task_type="CAUSAL_LM", layers_to_transform="auto")).eval()
    with pytest.raises(ValueError, match="locate_layers"):
        model.collect_statistics(["Some text."], tokenizer)
    with pytest.raises(ValueError, match="locate_layers"):
        model.edit_facts(iter(facts[:2]), tokenizer, progress=False)
    report = model.locate_layers(facts[:20], tokenizer, count=2, tracing=False)
    assert model.peft_config["default"].layers_to_transform == report.best_layers(2)
    assert [block_index(name) for name in model.edit_layers("default")] == report.best_layers(2)
    model.collect_statistics([f"{fact.filled_prompt} {fact.target_true}." for fact in facts[:200]], tokenizer)
    model.edit_facts(facts[:2], tokenizer, progress=False)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load_tiny_model()[0], tmp_path)
    assert list(again.edit_layers("default")) == list(model.edit_layers("default"))
    with pytest.raises(ValueError, match="present layers"):
        model.locate_layers(facts[:20], tokenizer)


def test_the_first_facts_place_an_adapter_that_nobody_has_placed(facts):
    base, tokenizer = load_tiny_model()
    model = get_peft_model(base, EditConfig(task_type="CAUSAL_LM", layers_to_transform="auto")).eval()
    with pytest.warns(UserWarning, match="No key statistics"):
        report = model.edit_facts(facts[:3], tokenizer, progress=False)
    assert not model.peft_config["default"].unlocated and sum(fact.recalled for fact in report.facts) >= 2


def test_only_auto_is_a_word_for_layers():
    with pytest.raises(ValueError, match="'auto' or None"):
        EditConfig(layers_to_transform="early")
