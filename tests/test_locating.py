"""Locating layers: trial steps against plain ones, the report and its bands, adapters placed by it."""

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_edit import EditConfig, Fact
from peft_edit.analysis import POSITIONS, locate_layers
from peft_edit.analysis.locating import band_width, key_selectivity, try_layers
from peft_edit.analysis.passes import down_projections
from peft_edit.analysis.tracing import trace
from peft_edit.architectures import block_index
from peft_edit.tiny import load_tiny_model

from .models import build_model
from .planted_answers import LAYERS, TOKENIZER, encoder_of, one_word_facts, planted, two_word_facts


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
