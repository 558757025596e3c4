"""The command line's `edit`: what it writes, the settings it takes, and its plan."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_edit import EditConfig, EditMemory, KeyStatistics
from peft_edit.cli.arguments import parse_settings
from peft_edit.cli.errors import UsageError
from peft_edit.cli.write import ADAPTER_FILES
from peft_edit.facts import fact_to_dict
from peft_edit.scoring import score_targets
from peft_edit.tiny import load_tiny_facts, load_tiny_model

from .cli_run import FACTS, QUICK, contents, document, write_facts


pytest_plugins = "tests.cli_run"


def test_edit_writes_an_adapter_that_peft_loads(edited):
    assert set(ADAPTER_FILES) <= {path.name for path in edited.iterdir()}
    assert not list(edited.glob("checkpoint-*")) and not list(edited.glob(".*"))
    base, tokenizer = load_tiny_model()
    model = PeftModel.from_pretrained(base, edited)
    facts = load_tiny_facts()[:FACTS]
    assert [record.key for record in model.edited_facts()] == [fact.key for fact in facts]
    assert [record.batch for record in model.edited_facts()] == [1, 1, 2, 2]
    pairs = [
        (tokenizer(fact.filled_prompt)["input_ids"], tokenizer(f" {fact.target}")["input_ids"][-1:]) for fact in facts
    ]
    assert score_targets(model, pairs).greedy.all()


def test_edit_does_what_edit_facts_does(edited, tiny, tiny_statistics):
    base, tokenizer = tiny
    model = get_peft_model(base, EditConfig(task_type="CAUSAL_LM", num_contexts=1)).eval()
    model.edit_facts(load_tiny_facts()[:FACTS], tokenizer, 2, statistics=tiny_statistics, progress=False)
    saved = load_file(edited / "adapter_model.safetensors")
    (layer,) = model.base_model.edit_layers().values()
    assert torch.equal(next(iter(saved.values())), layer.get_delta("default"))


def test_edit_reports_in_json(run, statistics, facts_file, tmp_path):
    found = document(
        run, "edit", "tiny", facts_file, "--limit", 1, "-o", tmp_path / "a", "--statistics", statistics, *QUICK
    )
    (fact,) = found["facts"]
    assert fact["recalled"] and fact["written"] and found["facts_held"] == 1
    assert found["adapter"] == str(tmp_path / "a") and len(found["modules"]) == 1


def test_edit_takes_method_and_settings(run, statistics, facts_file, tmp_path):
    output = tmp_path / "a"
    arguments = ["-o", output, "--limit", 1, "--statistics", statistics, "--method", "memit", *QUICK]
    assert run("edit", "tiny", facts_file, *arguments, "--set", "search_steps=3", "--set", "norm_budget=0.02")[0] == 0
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["method"], config["search_steps"], config["norm_budget"]) == ("memit", 3, 0.02)
    (layer,) = PeftModel.from_pretrained(load_tiny_model()[0], output).base_model.edit_layers().values()
    assert float(layer.get_delta("default").norm()) <= 0.02 * layer.base_norm() * (1 + 1e-5)


def test_edit_goes_on_with_an_adapter(run, adapter, tmp_path):
    facts = load_tiny_facts()[FACTS : FACTS + 1]
    (adapter / "notes.txt").write_text("mine")
    code, out, _ = run("edit", "tiny", write_facts(tmp_path / "more.jsonl", facts), "--adapter", adapter)
    assert code == 0 and f"the adapter holds {FACTS + 1}" in out
    assert [record.key for record in EditMemory.load(adapter).records][-1] == facts[0].key
    assert (adapter / "notes.txt").read_text() == "mine"


def test_edit_without_statistics_says_what_it_does_instead(run, facts_file, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{fact.filled_prompt} {fact.target_true}." for fact in load_tiny_facts()[900:1000]))
    arguments = ["--limit", 1, "-o", tmp_path / "a", "--statistics-text", text, *QUICK]
    code, _, err = run("edit", "tiny", facts_file, *arguments)
    assert code == 0 and f"Collecting key statistics from '{text}'" in err
    assert KeyStatistics.load(tmp_path / "a").source == str(text)


def test_edit_does_not_write_over_an_adapter(fails, run, facts_file, adapter, statistics):
    before = contents(adapter)
    fails("holds an adapter: go on editing it (--adapter", "edit", "tiny", facts_file, "-o", adapter)
    assert contents(adapter) == before
    arguments = ["--limit", 1, "-o", adapter, "--overwrite", "--statistics", statistics, *QUICK]
    assert run("edit", "tiny", facts_file, *arguments)[0] == 0
    assert len(EditMemory.load(adapter)) == 1


def test_an_adapter_without_memory_leaves_none_behind(run, facts_file, adapter, statistics):
    arguments = ["--limit", 1, "-o", adapter, "--overwrite", "--statistics", statistics, "--set", "save_memory=false"]
    assert run("edit", "tiny", facts_file, *arguments, *QUICK)[0] == 0
    assert not list(adapter.glob("edit_*")) and (adapter / "adapter_model.safetensors").is_file()
    assert document(run, "show", adapter)["facts_held"] is None


def test_settings_that_an_adapter_keeps(fails, facts_file, adapter):
    before = contents(adapter)
    arguments = ["edit", "tiny", facts_file, "--adapter", adapter]
    fails("an adapter keeps what it was made with", *arguments, "--set", "layers_to_transform=2", code=2)
    fails("goes on with the method that it began with", *arguments, "--method", "memit", code=2)
    for path in adapter.glob("edit_*"):
        path.unlink()
    fails("has no edit memory, so it cannot be edited on", *arguments)
    assert {name: data for name, data in before.items() if name in contents(adapter)} == contents(adapter)


def test_settings_as_they_are_written():
    found = parse_settings(
        [
            "norm_budget=0.05",
            "layers_to_transform=1,2",
            'target_modules=["a"]',
            "norm_budget=none",
            "update=ridge",
            "save_memory=False",
            'update_settings={"x": 1}',
        ]
    )
    assert found == {
        "norm_budget": None,
        "layers_to_transform": [1, 2],
        "target_modules": ["a"],
        "update": "ridge",
        "save_memory": False,
        "update_settings": {"x": 1},
    }
    for wrong in ("norm_budget", "norm_budget=", "=3"):
        with pytest.raises(UsageError, match="--set"):
            parse_settings([wrong])
    with pytest.raises(UsageError, match="did you mean 'norm_budget'"):
        parse_settings(["norm_bugdet=1"])


# --- the plan ----------------------------------------------------------------------------------------------------


def test_a_plan_changes_nothing(run, adapter, tmp_path):
    before = contents(tmp_path)
    known = load_tiny_facts()
    changed = {**fact_to_dict(known[0]), "target": "Paris"}
    facts = [changed, fact_to_dict(known[1]), fact_to_dict(known[FACTS])]
    path = tmp_path / "plan.jsonl"
    path.write_text("\n".join(map(json.dumps, facts)))
    found = document(run, "edit", "tiny", path, "--adapter", adapter, "--batch-size", 2, "--plan-only")
    path.unlink()
    assert contents(tmp_path) == before
    assert (found["changed"], found["batches"]) == (False, 2)
    (conflict,) = found["facts"]["conflicts"]
    assert (conflict["held"], conflict["given"], conflict["place"]) == (known[0].target, "Paris", "line 1")
    assert found["facts"]["new"] == 1 and found["facts"]["held_already"] == [known[1].fact_id]
    assert found["modules"] == [{"name": "model.layers.0.mlp.down_proj", "d_in": 1024, "d_out": 160}]
    bytes_ = found["bytes"]
    assert bytes_["deltas"] == 1024 * 160 * 4
    assert bytes_["keys_and_values"] == (FACTS + 3) * (1024 + 160) * 4
    assert bytes_["key_statistics"] == 1024 * 1024 * 4
    base, _ = load_tiny_model()
    assert bytes_["base_model"] == 4 * base.num_parameters()
    stages = {name: value for name, value in found["seconds"].items() if name != "total"}
    assert stages["search"] > 0 and found["seconds"]["total"] == pytest.approx(sum(stages.values()))


def test_a_plan_of_a_run_to_resume_counts_what_is_left(run, adapter, facts_file, tmp_path):
    output = tmp_path / "run"
    adapter.rename(output.parent / "checkpoint-4")
    output.mkdir()
    (output.parent / "checkpoint-4").rename(output / "checkpoint-4")  # as an interrupted run leaves it
    more = write_facts(tmp_path / "more.jsonl", load_tiny_facts()[: FACTS + 1])
    found = document(run, "edit", "tiny", more, "-o", output, "--plan-only", "--resume")
    assert found["adapter"] == str(output / "checkpoint-4")
    assert found["facts"]["new"] == 1 and len(found["facts"]["held_already"]) == FACTS
    fresh = document(run, "edit", "tiny", more, "-o", output, "--plan-only", *QUICK)
    assert fresh["adapter"] is None and fresh["facts"]["new"] == FACTS + 1


def test_a_plan_lists_every_bad_fact(run, tmp_path):
    good = fact_to_dict(load_tiny_facts()[0])
    lines = [
        json.dumps(good),
        "{broken",
        json.dumps({"subject": "A", "prompt": "A is", "target": "B"}),
        json.dumps({**good, "prompt": "{} " + "very " * 400 + "long"}),
    ]
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(lines))
    found = document(run, "edit", "tiny", path, "--plan-only", code=1)
    bad = found["facts"]["bad"]
    assert [problem.split(":")[0] for problem in bad] == ["line 2", "line 3", "line 4"]
    assert "not valid JSON" in bad[0] and "holds the placeholder {} 0 times" in bad[1]
    assert found["seconds"] is None and list(tmp_path.iterdir()) == [path]
    code, out, _ = run("edit", "tiny", path, "--plan-only")
    assert code == 1 and "These must be mended first:\n  line 2: is not valid JSON" in out


def test_a_plan_of_a_new_adapter_times_the_statistics_too(run, facts_file, tmp_path):
    (tmp_path / "text.txt").write_text("Some text.")
    arguments = ["--limit", 1, "--plan-only", "--statistics-text", tmp_path / "text.txt", *QUICK]
    found = document(run, "edit", "tiny", facts_file, *arguments)
    assert found["seconds"]["statistics"] > 0 and found["adapter"] is None
