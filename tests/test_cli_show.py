"""The commands that look into adapters and models, and `remove`, which changes what they show."""

import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from peft_edit import EditConfig, EditMemory, KeyStatistics
from peft_edit.facts import fact_to_dict
from peft_edit.tiny import load_tiny_facts, load_tiny_model

from .cli_run import FACTS, contents, document


pytest_plugins = "tests.cli_run"


def test_eval_beside_the_base(run, edited, facts_file):
    found = document(run, "eval", edited, facts_file)
    assert found["edited"]["efficacy"] == 100 and found["base"]["efficacy"] == 0
    assert found["difference"]["efficacy"][0] == 100 and found["facts"] == FACTS
    code, out, _ = run("eval", edited, facts_file)
    assert code == 0 and out.splitlines()[0].split() == ["4", "facts", "edited", "base", "difference"]


def test_eval_of_the_facts_it_holds(run, edited, tmp_path):
    found = document(run, "eval", edited, "--limit", 3)
    assert found["facts"] == 3 and found["true_targets_from_base"] == 0
    # No paraphrases in the ledger: not a number, which JSON does not have.
    assert found["edited"]["paraphrase"] is None and found["edited"]["efficacy"] == 100


def test_eval_without_true_targets_takes_the_base_models_answer(run, edited, tmp_path):
    facts = [{**fact_to_dict(fact), "target_true": None} for fact in load_tiny_facts()[:2]]
    # What the base model answers anyway: the comparison is with another answer.
    facts.append({"subject": "Sven Wollter", "prompt": "{}, a citizen of", "target": "Sweden"})
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(map(json.dumps, facts)))
    found = document(run, "eval", edited, path, "--per-fact")
    assert found["true_targets_from_base"] == 3
    assert found["base"]["per_fact"]["efficacy"] == [0, 0, 100]
    assert found["edited"]["per_fact"]["efficacy"][:2] == [100, 100]


def test_stats_are_those_of_the_library(run, fails, tmp_path, tiny):
    texts = [f"{fact.filled_prompt} {fact.target_true}." for fact in load_tiny_facts()[:200]]
    (tmp_path / "text.txt").write_text("\n\n".join(texts))
    found = document(
        run, "stats", "tiny", tmp_path / "text.txt", "-o", tmp_path / "s", "--set", "layers_to_transform=1"
    )
    saved = KeyStatistics.load(tmp_path / "s")
    base, tokenizer = tiny
    model = get_peft_model(base, EditConfig(layers_to_transform=1, task_type="CAUSAL_LM"))
    expected = model.collect_statistics(texts, tokenizer)
    assert found["modules"] == {"model.layers.1.mlp.down_proj": 1024} and found["tokens"] == expected.tokens
    (name,) = found["modules"]
    torch.testing.assert_close(saved.second_moments[name], expected.second_moments[name])
    fails(
        "holds key statistics: replace them (--overwrite)",
        "stats",
        "tiny",
        tmp_path / "text.txt",
        "-o",
        tmp_path / "s",
    )


def test_locate(run, facts_file, tmp_path):
    from peft_edit.analysis import locate_layers

    found = document(run, "locate", "tiny", facts_file, "--no-tracing", "--layers", 2)
    report = locate_layers(*load_tiny_model(), load_tiny_facts()[:FACTS], tracing=False)
    assert found["best_layers"] == report.best_layers(2)
    assert [layer["gain"] for layer in found["layers"]] == pytest.approx([layer.gain for layer in report.layers])
    code, out, _ = run("locate", "tiny", facts_file, "--no-tracing", "--layers", 2)
    first, second = report.best_layers(2)
    assert code == 0 and f"--set layers_to_transform=[{first},{second}]" in out


def test_locate_draws(run, fails, facts_file, tmp_path):
    pytest.importorskip("matplotlib")
    code, _, _ = run("locate", "tiny", facts_file, "--limit", 2, "--plot", tmp_path / "map.png")
    assert code == 0 and (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
    fails(
        "--plot shows the tracing", "locate", "tiny", facts_file, "--no-tracing", "--plot", tmp_path / "no.png", code=2
    )


def test_show_without_the_model(run, edited, monkeypatch):
    monkeypatch.setattr("peft_edit.cli.commands.show.load_base", lambda _: pytest.fail("the model is being loaded"))
    found = document(run, "show", edited, "--check")
    facts = load_tiny_facts()[:FACTS]
    assert [(fact["subject"], fact["target"], fact["target_true"]) for fact in found["facts"]] == [
        (fact.subject, fact.target, fact.target_true) for fact in facts
    ]
    delta = next(iter(load_file(edited / "adapter_model.safetensors").values()))
    (module,) = found["modules"]
    assert module["norm"] == pytest.approx(float(delta.double().norm())) and module["share"] is None
    assert found["statistics"]["source"] == "true sentences" and found["batches"] == 2
    code, out, _ = run("show", edited, "--last", 1)
    assert facts[-1].filled_prompt[:50] in out and facts[0].filled_prompt not in out
    assert "… and 3 older facts" in out
    assert len(document(run, "show", edited, "--subject", facts[1].subject)["facts"]) == 1


def test_show_with_the_model(run, edited):
    (module,) = document(run, "show", edited, "--model", "tiny")["modules"]
    weight = load_tiny_model()[0].get_submodule(module["name"]).weight
    assert module["share"] == pytest.approx(module["norm"] / float(weight.detach().double().norm()), rel=1e-5)


def test_show_checks_every_file(fails, adapter):
    path = adapter / "edit_memory.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    fails("edit_memory.safetensors' cannot be used", "show", adapter, "--check")


def test_remove_and_diff(run, edited, adapter):
    subject, other = load_tiny_facts()[1].subject, load_tiny_facts()[2]
    planned = document(run, "remove", adapter, other.fact_id, "--subject", subject, "--plan-only")
    assert contents(adapter) == contents(edited) and not planned["changed"]
    removed = document(run, "remove", adapter, other.fact_id, "--subject", subject)
    assert [entry["id"] for entry in removed["removed"]] == [entry["id"] for entry in planned["removed"]]
    assert removed["facts_held"] == FACTS - 2 == len(EditMemory.load(adapter))
    found = document(run, "diff", edited, adapter)
    assert [record["subject"] for record in found["only_in_first"]] == [subject, other.subject]
    assert not found["only_in_second"] and not found["same_facts"] and not found["same_deltas"]
    one, two = (next(iter(load_file(f / "adapter_model.safetensors").values())).double() for f in (edited, adapter))
    assert found["modules"][0]["distance"] == pytest.approx(float((one - two).norm()))
    same = document(run, "diff", edited, edited)
    assert same["same_facts"] and same["same_deltas"]


def test_diff_of_targets(run, edited, adapter):
    path = adapter / "edit_facts.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({**json.loads(lines[0]), "target": "Paris"}), *lines[1:]]))
    (pair,) = document(run, "diff", edited, adapter)["other_targets"]
    assert (pair["first"]["target"], pair["second"]["target"]) == (load_tiny_facts()[0].target, "Paris")
    assert f"{load_tiny_facts()[0].target} -> Paris" in run("diff", edited, adapter)[1]


def test_remove_what_is_not_there(fails, adapter):
    before = contents(adapter)
    fails("did you mean 'Sven Wollter'?", "remove", adapter, "--subject", "Sven Wolter")
    fails("no fact of the id 'zzz'; `peft-edit show` lists the 4 it holds", "remove", adapter, "zzz")
    assert contents(adapter) == before


def test_remove_elsewhere_keeps_the_old(run, adapter, tmp_path):
    before = contents(adapter)
    assert run("remove", adapter, load_tiny_facts()[0].fact_id, "-o", tmp_path / "new")[0] == 0
    assert contents(adapter) == before and len(EditMemory.load(tmp_path / "new")) == FACTS - 1
