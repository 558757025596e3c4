"""The command line, run in process on the bundled model; Ctrl-C, full and read-only disks, the Hub, the shells."""

import errno
import json
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_edit import EditConfig, EditMemory, KeyStatistics, checkpoints
from peft_edit.cli import main
from peft_edit.cli import saving as cli_saving
from peft_edit.cli.arguments import parse_settings
from peft_edit.cli.errors import UsageError, sentence
from peft_edit.cli.output import Output, Result, Table, duration, size, to_json
from peft_edit.cli.parser import build_parser
from peft_edit.cli.saving import READY, STAGED, finish_save, write_directory
from peft_edit.cli.shells import SHELLS, commands
from peft_edit.cli.sources import read_facts, read_texts
from peft_edit.cli.write import ADAPTER_FILES
from peft_edit.facts import fact_to_dict
from peft_edit.scoring import score_targets
from peft_edit.tiny import load_tiny_facts, load_tiny_model

from .hub_endpoint import TOKEN, hub_endpoint
from .test_hub import use_endpoint


FACTS = 4
QUICK = ["--set", "num_contexts=1"]


def write_facts(path, facts):
    path.write_text("".join(json.dumps(fact_to_dict(fact)) + "\n" for fact in facts))
    return str(path)


def contents(folder):
    """Every file below a directory and what it holds."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def statistics(tiny_statistics, tmp_path_factory):
    folder = tmp_path_factory.mktemp("statistics")
    tiny_statistics.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def facts_file(tmp_path_factory):
    return write_facts(tmp_path_factory.mktemp("facts") / "facts.jsonl", load_tiny_facts()[:FACTS])


@pytest.fixture(scope="module")
def edited(facts_file, statistics, tmp_path_factory):
    """An adapter that the command line has made, in batches of two. Not to be changed."""
    output = tmp_path_factory.mktemp("edited") / "edits"
    arguments = [facts_file, "-o", str(output), "--statistics", statistics, "--batch-size", "2", *QUICK, "--quiet"]
    assert main(["edit", "tiny", *arguments]) == 0
    return output


@pytest.fixture
def adapter(edited, tmp_path):
    """The same adapter, to be changed."""
    return Path(shutil.copytree(edited, tmp_path / "adapter"))


@pytest.fixture
def run(capsys):
    """Runs a command; gives exit code, stdout and stderr."""

    def call(*argv):
        capsys.readouterr()
        code = main([str(argument) for argument in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def fails(run):
    """Runs a command that is to fail: with this exit code, one sentence on stderr that holds the text, no output."""

    def call(text, *argv, code=1):
        found, out, err = run(*argv, "--quiet")
        assert found == code, err
        assert out == "" and "Traceback" not in err
        assert err.startswith("peft-edit: ") and err.count("\n") == 1
        assert text in err
        return err

    return call


def document(run, *argv, code=0):
    """The JSON document of a command."""
    found, out, err = run(*argv, "--json")
    assert found == code, err
    return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


# --- edit --------------------------------------------------------------------------------------------------------


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


# --- interrupted -------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(run, statistics, facts_file, tmp_path, monkeypatch):
    """A run of four facts, one a batch, that Ctrl-C ended after two checkpoints; its arguments and directory."""
    output = tmp_path / "run"
    arguments = ["edit", "tiny", facts_file, "-o", output, "--statistics", statistics, "--batch-size", 1, *QUICK]
    save, saved = checkpoints.save_checkpoint, []

    def interrupt_third(*args, **kwargs):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(save(*args, **kwargs))
        return saved[-1]

    with monkeypatch.context() as patch:
        patch.setattr("peft_edit.lifelong.save_checkpoint", interrupt_third)
        code, out, err = run(*arguments, "--quiet")
    assert (code, out) == (130, "")
    assert err == (
        f"peft-edit: Interrupted with 2 of 4 facts in '{output / 'checkpoint-2'}': run the same command with --resume "
        "to go on.\n"
    )
    return arguments, output


def test_ctrl_c_leaves_a_run_that_is_resumed_to_the_last_bit(
    run, fails, interrupted, facts_file, statistics, tmp_path
):
    arguments, output = interrupted
    assert [path.name for path in output.iterdir()] == ["checkpoint-2"]
    fails("holds an interrupted run (checkpoint-2): go on with it (--resume)", *arguments)
    fails("was begun with search_steps=25, not 7", *arguments, "--resume", "--set", "search_steps=7")
    found = document(run, *arguments, "--resume")
    assert len(found["facts"]) == 2 and found["facts_held"] == 4
    assert not list(output.glob("checkpoint-*"))
    whole = tmp_path / "whole"
    assert run(*[whole if argument is output else argument for argument in arguments])[0] == 0
    assert (whole / "adapter_model.safetensors").read_bytes() == (output / "adapter_model.safetensors").read_bytes()
    # A finished run that is resumed has nothing left to do.
    before = contents(output)
    assert document(run, *arguments, "--resume")["finished_before"]
    assert contents(output) == before


def test_a_run_is_dropped_only_when_asked(run, interrupted):
    arguments, output = interrupted
    assert (
        run("show", output)[2]
        .strip()
        .endswith("It holds checkpoints of a run: `peft-edit edit --resume` finishes it.")
    )
    found = document(run, *arguments, "--overwrite")
    assert len(found["facts"]) == 4 and not list(output.glob("checkpoint-*"))


def test_ctrl_c_before_the_first_checkpoint_leaves_nothing(run, statistics, facts_file, tmp_path, monkeypatch):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_edit.editing.search_targets", interrupt)
    code, out, err = run("edit", "tiny", facts_file, "-o", tmp_path / "a" / "b", "--statistics", statistics, *QUICK)
    assert (code, out) == (130, "") and "Interrupted before the first checkpoint: nothing was written." in err
    assert not (tmp_path / "a" / "b").exists()
    (tmp_path / "c").mkdir()
    monkeypatch.chdir(tmp_path / "c")
    assert run("edit", "tiny", facts_file, "-o", ".", "--statistics", statistics, *QUICK)[0] == 130
    assert (tmp_path / "c").is_dir() and not list((tmp_path / "c").iterdir())


def test_ctrl_c_elsewhere(run, adapter, monkeypatch):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_edit.cli.commands.remove.load_adapter", interrupt)
    before = contents(adapter)
    code, _, err = run("remove", adapter, "--subject", "Sven Wollter")
    assert (code, err) == (130, "peft-edit: Interrupted; nothing was written.\n")
    assert contents(adapter) == before


# --- plan --------------------------------------------------------------------------------------------------------


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


# --- what is in the facts ----------------------------------------------------------------------------------------


def test_facts_of_csv(tmp_path):
    path = tmp_path / "facts.csv"
    path.write_text(
        "\ufeffsubject,prompt,target,target_true,paraphrases,notes\n"
        'Ada,"{}, who is from",Rome,Paris,"{} is of | They say {} lives in",x\n'
        "\n"
        "Ben,{} is,Oslo,,,\n",
        encoding="utf-8",
    )
    read = read_facts(str(path))
    assert not read.problems and read.places == ["line 2", "line 4"]
    ada, ben = read.sound()
    assert (ada.prompt, ada.target_true) == ("{}, who is from", "Paris")
    assert ada.paraphrases == ("{} is of", "They say {} lives in")
    assert (ben.target_true, ben.paraphrases, ben.neighborhood) == (None, (), ())
    for suffix, delimiter in ((".csv", ";"), (".tsv", "\t")):
        other = path.with_suffix(suffix)
        other.write_text(f"subject{delimiter}prompt{delimiter}target\nAda{delimiter}{{}} is{delimiter}Rome, Italy\n")
        assert read_facts(str(other)).sound()[0].target == "Rome, Italy"


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("a.csv", "subject,prompt\nAda,{} is\n", "has no column 'target'"),
        ("a.csv", "subject,prompt,target\nAda,{} is\n", "line 2: has 2 cells, the first line names 3"),
        ("a.csv", 'subject,prompt,target\nAda,"{} is,Rome\n', "is not valid CSV"),
        ("a.jsonl", '{"subject": "Ada"}\n', "line 1: field 'prompt' is empty"),
        ("a.jsonl", "[1]\n", "line 1: expected a Fact or a mapping, got list"),
        ("a.jsonl", "", "there are no facts in this source"),
        ("a.json", "[{]", "is not valid JSON (Expecting property name"),
        ("a.xml", "<a/>", "has none of the endings .jsonl, .json, .csv and .tsv"),
        (
            "a.jsonl",
            '{"subject": "A", "prompt": "{} is", "target": "B"}\n{"subject": "A", "prompt": "{} is", "target": "C"}\n',
            "line 2: 'A is' cannot be both 'B' (line 1) and 'C'",
        ),
        (
            "a.jsonl",
            '{"id": 1, "subject": "A", "prompt": "{} is", "target": "B"}\n'
            '{"id": 1, "subject": "D", "prompt": "{} is", "target": "C"}\n',
            "line 2: the id '1' is that of line 1 too",
        ),
    ],
)
def test_facts_that_are_refused(fails, tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    fails(said, "edit", "tiny", tmp_path / name, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_many_bad_facts_in_one_sentence(fails, tmp_path):
    (tmp_path / "a.jsonl").write_text("x\n" * 7)
    said = fails("7 bad fact(s)", "edit", "tiny", tmp_path / "a.jsonl", "-o", tmp_path / "out")
    assert "line 5" in said and "line 6" not in said and "And 2 more." in said


def test_a_file_that_is_no_text(fails, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\x00")
    fails("is not UTF-8 text (byte 0)", "edit", "tiny", tmp_path / "a.jsonl", "-o", tmp_path / "out")


def test_facts_of_a_dataset(tmp_path):
    pytest.importorskip("datasets")
    known = load_tiny_facts()[:3]
    (tmp_path / "data").mkdir()
    write_facts(tmp_path / "data" / "train.jsonl", known)
    facts = read_facts(str(tmp_path / "data"), limit=2).sound()
    assert [fact.key for fact in facts] == [fact.key for fact in known[:2]]
    assert facts[0].paraphrases == known[0].paraphrases


def test_a_dataset_without_the_library(fails, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    fails("pip install 'peft-edit[eval]'", "edit", "tiny", "user/facts", "-o", tmp_path / "out")


def test_texts(tmp_path):
    (tmp_path / "a.txt").write_text("one\nline\n\n \n\ntwo\n")
    assert list(read_texts(str(tmp_path / "a.txt"))) == ["one\nline", "two\n"]
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n{"body": "y"}\n')
    assert list(read_texts(str(tmp_path / "a.jsonl"), column="body")) == ["x", "y"]


# --- what goes wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "the following arguments are required: COMMAND"),
        (["edit"], "the following arguments are required: model, facts"),
        (["edit", "tiny", "tiny"], "--output is needed"),
        (["edit", "tiny", "tiny", "-o", "x", "--method", "none"], "invalid choice: 'none'"),
        (["edit", "tiny", "tiny", "-o", "x", "--set", "nonsense=1"], "EditConfig has no field 'nonsense'"),
        (["edit", "tiny", "tiny", "-o", "x", "--set", "norm_budget=-1"], "norm_budget must be None or a share"),
        (["edit", "tiny", "tiny", "-o", "x", "--batch-size", "0"], "expected a whole number above 0, got '0'"),
        (["edit", "tiny", "tiny", "-o", "x", "--device", "quantum"], "There is no device 'quantum' here"),
        (["remove", "x"], "Say what to remove"),
        (["export-lora", "x", "-o", "y", "--energy", "2"], "expected a number above 0 and at most 1"),
        (["export-lora", "x", "-o", "y", "--energy", "0.5", "--rank", "3"], "not allowed with argument"),
        (["nonsense"], "invalid choice: 'nonsense'"),
    ],
)
def test_wrong_arguments(run, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["edit", "tiny", "no.jsonl", "-o", "x"], "There is no facts file 'no.jsonl'"),
        (["edit", "./no", "tiny", "-o", "x"], "There is no model './no'"),
        (["edit", ".", "tiny", "-o", "x"], "'.' is no model: the directory has no config.json"),
        (["edit", "tiny", "tiny", "-o", "x", "--adapter", "no"], "There is no adapter 'no'"),
        (["edit", "tiny", "tiny", "-o", "x", "--statistics", "no"], "There are no key statistics 'no'"),
        (["edit", "tiny", "tiny", "-o", "x", "--statistics-text", "no.txt"], "There is no text file 'no.txt'"),
        (["edit", "tiny", "tiny", "-o", "x", "--set", "layers_to_transform=9"], "the model has 5 layers, 0 to 4"),
        (["eval", "no"], "There is no adapter 'no'"),
        (["show", "."], "'.' is not an adapter: it has no adapter_config.json"),
        (["diff", "no", "no"], "There is no adapter 'no'"),
        (["stats", "tiny", "no.txt", "-o", "x"], "There is no text file 'no.txt'"),
        (["push", "no", "noslash"], "is no repository's name"),
    ],
)
def test_things_that_are_not_there(fails, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(said, *arguments)
    assert not list(tmp_path.iterdir())


def test_errors_in_json(run, tmp_path):
    found = document(run, "show", tmp_path / "no", code=1)
    assert found["exit_code"] == 1 and found["error"].startswith("There is no adapter")
    assert document(run, "edit", "tiny", code=2)["exit_code"] == 2


def test_debug_shows_the_traceback(run, tmp_path):
    _, _, err = run("show", tmp_path / "no", "--debug")
    assert "Traceback" in err and err.rstrip().split("\n")[-1].startswith("peft-edit: There is no adapter")


def test_other_adapters_and_damaged_ones(fails, adapter, tmp_path):
    lora = tmp_path / "lora"
    get_peft_model(load_tiny_model()[0], LoraConfig(target_modules=["down_proj"])).save_pretrained(lora)
    fails("is not an edit adapter, its peft_type is 'LORA'", "show", lora)
    fails("is an adapter, and its base model is needed here", "edit", adapter, "tiny", "-o", tmp_path / "x")
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    fails("adapter_model.safetensors' cannot be read", "show", adapter)
    fails("adapter_model.safetensors' cannot be read", "merge", adapter, "-o", tmp_path / "x")
    (adapter / "edit_facts.jsonl").write_text("")
    fails("edit_facts.jsonl has 0 facts where edit_memory.json counts 4", "show", adapter)
    (adapter / "adapter_config.json").write_text("{")
    fails("is damaged", "show", adapter)
    assert not (tmp_path / "x").exists()


def test_an_adapter_of_another_model(fails, edited, tmp_path):
    base, tokenizer = load_tiny_model()
    torch.manual_seed(0)
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    base.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    fails("does not go on this base model", "eval", edited, "--model", tmp_path / "other")


def test_a_base_model_that_moved(run, fails, adapter):
    path = adapter / "adapter_config.json"
    bundled = {**json.loads(path.read_text()), "base_model_name_or_path": "/elsewhere/peft_edit/tiny_model"}
    path.write_text(json.dumps(bundled))
    assert document(run, "show", adapter)["base_model"] == "tiny"
    assert document(run, "eval", adapter, "--limit", 1)["edited"]["efficacy"] == 100
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "/no/such/model"}))
    fails("base model '/no/such/model' is not here: say where it is with --model", "eval", adapter)


def refuse(number, text):
    def write(*_args, **_kwargs):
        raise OSError(number, text)

    return write


@pytest.mark.parametrize(
    "number, said", [(errno.EROFS, "is on a read-only disk"), (errno.EACCES, "There is no permission for")]
)
def test_a_disk_that_cannot_be_written_is_found_before_the_work(fails, adapter, tmp_path, monkeypatch, number, said):
    def mkdir(path, *_args, **_kwargs):
        raise OSError(number, "", str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr("peft_edit.cli.models.choose_device", lambda _: pytest.fail("the model is being loaded"))
    for arguments in (["edit", "tiny", "tiny"], ["merge", adapter], ["export-lora", adapter]):
        fails(said, *arguments, "-o", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_output_under_a_file(fails, tmp_path):
    (tmp_path / "file").write_text("x")
    fails("is a file, and a directory is needed", "edit", "tiny", "tiny", "-o", tmp_path / "file")
    fails("leads through a file that is not a directory", "edit", "tiny", "tiny", "-o", tmp_path / "file" / "x")
    assert (tmp_path / "file").read_text() == "x"


def test_a_full_disk_loses_nothing(fails, adapter, facts_file, statistics, tmp_path, monkeypatch):
    before = contents(adapter)
    monkeypatch.setattr("peft_edit.memory.save_file", refuse(errno.ENOSPC, "No space left on device"))
    fails("The disk is full", "remove", adapter, "--subject", "Sven Wollter")
    fails("The disk is full", "edit", "tiny", facts_file, "--adapter", adapter, "--statistics", statistics)
    assert contents(adapter) == before
    fails("The disk is full", "edit", "tiny", facts_file, "-o", tmp_path / "x", "--statistics", statistics, *QUICK)
    monkeypatch.setattr("peft_edit.export.save_file", refuse(errno.ENOSPC, "No space left on device"))
    fails("The disk is full", "export-lora", adapter, "-o", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_sentences_of_errors():
    from safetensors import SafetensorError

    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert sentence(full).startswith("The disk is full")
    assert sentence(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")).startswith(
        "The memory is full"
    )
    assert sentence(KeyError("a \nb")) == "a b"
    assert sentence(ValueError("what\n\nexplained at length")) == "what"
    assert (
        sentence(ZeroDivisionError("x")) == "Unexpected ZeroDivisionError: x. Run it again with --debug to see where."
    )


# --- the other commands ------------------------------------------------------------------------------------------


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


def test_merge_gives_a_model_that_answers_the_same(run, fails, edited, tmp_path):
    found = document(run, "merge", edited, "-o", tmp_path / "m", "--max-shard-size", "4MB")
    assert len(found["files"]) > 1 and found["facts"] == FACTS
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    base, tokenizer = load_tiny_model()
    model = PeftModel.from_pretrained(base, edited).eval()
    ids = tokenizer(load_tiny_facts()[0].filled_prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model(input_ids=ids).logits)
    fails("holds a model: replace it (--overwrite)", "merge", edited, "-o", tmp_path / "m")
    # Shards of the model that is replaced do not stay.
    assert len(document(run, "merge", edited, "-o", tmp_path / "m", "--overwrite")["files"]) == 1
    assert not (tmp_path / "m" / "model.safetensors.index.json").exists()


def test_merge_does_not_hide_an_adapter(fails, edited, adapter):
    before = contents(adapter)
    fails("holds an adapter, which a model beside it would hide", "merge", edited, "-o", adapter, "--overwrite")
    assert contents(adapter) == before


def test_export_lora_loads_with_plain_peft(run, fails, edited, tmp_path):
    found = document(run, "export-lora", edited, "-o", tmp_path / "lora")
    assert found["rank"] == FACTS and found["relative_error"] < 1e-5
    lora = PeftModel.from_pretrained(load_tiny_model()[0], tmp_path / "lora").eval()
    base, tokenizer = load_tiny_model()
    model = PeftModel.from_pretrained(base, edited).eval()
    ids = tokenizer(load_tiny_facts()[0].filled_prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(lora(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-3, rtol=1e-3)
    fails("holds an adapter: replace it (--overwrite)", "export-lora", edited, "-o", tmp_path / "lora")
    assert document(run, "export-lora", edited, "-o", tmp_path / "lora", "--rank", 1, "--overwrite")["rank"] == 1
    fails("holds an edit adapter", "export-lora", edited, "-o", edited, "--overwrite")


def test_demo(run, tmp_path):
    found = document(run, "demo", "-o", tmp_path / "demo")
    facts = load_tiny_facts()[:10]
    assert [row["before"] for row in found["facts"]] == [fact.target_true for fact in facts]
    assert [row["after"] for row in found["facts"]] == [fact.target for fact in facts]
    assert found["recalled"] == 10 and found["facts_held"] == 9 == len(EditMemory.load(tmp_path / "demo"))
    assert found["removed"]["after"] == facts[0].target_true


# --- the Hub -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hub_endpoint() as endpoint:
        use_endpoint(monkeypatch, endpoint.url, tmp_path / "cache")
        yield endpoint


def test_push_and_use_from_the_hub(run, fails, hub, edited, tmp_path):
    found = document(run, "push", edited, "user/edits", "--token", TOKEN)
    assert found["facts_included"] == FACTS
    files = hub.repositories["user/edits"].files()
    assert files["adapter_model.safetensors"] == (edited / "adapter_model.safetensors").read_bytes()
    assert document(run, "show", "user/edits")["facts_held"] == FACTS
    assert document(run, "diff", "user/edits", edited)["same_deltas"]
    fact = load_tiny_facts()[0].fact_id
    fails("an adapter of the Hub is not changed in the cache", "remove", "user/edits", fact, code=2)
    assert run("remove", "user/edits", fact, "-o", tmp_path / "new")[0] == 0


def test_push_with_scores(run, fails, hub, edited, facts_file, tmp_path):
    (tmp_path / "scores.json").write_text(run("eval", edited, facts_file, "--json")[1])
    assert run("push", edited, "user/edits", "--token", TOKEN, "--scores", tmp_path / "scores.json")[0] == 0
    card = hub.repositories["user/edits"].files()["README.md"].decode()
    assert "ES" in card and "100" in card
    (tmp_path / "scores.json").write_text("{}")
    fails("is not what `peft-edit eval --json` writes", "push", edited, "user/x", "--scores", tmp_path / "scores.json")
    fails("There is no file of scores", "push", edited, "user/x", "--scores", tmp_path / "none.json")


def test_push_withholds_facts(run, hub, edited):
    assert document(run, "push", edited, "user/edits", "--token", TOKEN, "--no-facts")["facts_included"] == 0
    assert "edit_facts.jsonl" not in hub.repositories["user/edits"].files()


def test_a_hub_that_refuses(fails, hub, edited, tmp_path):
    fails("refuses access to 'user/edits' (401)", "push", edited, "user/edits", "--token", "hf_wrong")
    fails("There is no repository 'user/none'", "show", "user/none")
    fails("There is no repository 'user/none'", "edit", "user/none", "tiny", "-o", tmp_path / "x")
    assert not hub.repositories and not (tmp_path / "x").exists()


def test_a_hub_that_cannot_be_reached(fails, edited, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None, raising=False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    with socket.socket() as held:  # bound and not listening: refused
        held.bind(("127.0.0.1", 0))
        use_endpoint(monkeypatch, f"http://127.0.0.1:{held.getsockname()[1]}", tmp_path / "cache")
        fails("cannot be reached", "push", edited, "user/edits", "--token", TOKEN)
        fails("cannot be reached", "show", "user/edits")
        fails("cannot be reached", "edit", "user/model", "tiny", "-o", tmp_path / "x")
        fails("cannot be reached", "edit", "tiny", "tiny", "-o", tmp_path / "x", "--statistics", "user/statistics")
    assert not (tmp_path / "x").exists()


# --- writing at once ---------------------------------------------------------------------------------------------


def test_a_directory_is_replaced_at_once_or_not_at_all(tmp_path):
    (tmp_path / "old.bin").write_text("old")
    (tmp_path / "mine.txt").write_text("mine")

    def fail(staged):
        (staged / "new.bin").write_text("half")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        write_directory(tmp_path, fail, stale=("*.bin",))
    assert contents(tmp_path) == {"old.bin": b"old", "mine.txt": b"mine"}
    write_directory(tmp_path, lambda staged: (staged / "new.bin").write_text("new"), stale=("*.bin",))
    assert contents(tmp_path) == {"new.bin": b"new", "mine.txt": b"mine"}


def test_a_save_that_was_cut_short_is_finished(run, edited, adapter, monkeypatch):
    replaced = cli_saving.os.replace

    def kill_after_three(source, target, calls=[]):  # noqa: B006 (counts)
        calls.append(target)
        if len(calls) == 4:
            raise SystemExit  # as if killed: nothing is put in order
        replaced(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(cli_saving.os, "replace", kill_after_three)
        with pytest.raises(SystemExit):
            write_directory(
                adapter,
                lambda staged: [(staged / name).write_text(f"new {name}") for name in ("a", "b", "c", "d")],
                stale=ADAPTER_FILES,
            )
    assert (adapter / READY).is_dir() and not (adapter / STAGED).exists()
    finish_save(adapter)
    assert {name: (adapter / name).read_text() for name in "abcd"} == {name: f"new {name}" for name in "abcd"}
    assert not (adapter / READY).exists() and not (adapter / "adapter_config.json").exists()


# --- output and shells -------------------------------------------------------------------------------------------


def test_json_has_no_nan():
    assert json.loads(to_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"y", "x"}, "d": Path("p")})) == {
        "a": None,
        "b": [None, 1.5],
        "c": ["x", "y"],
        "d": "p",
    }


def test_tables():
    lines = str(Table(("id", "n"), [("7f", "5"), ("8", "12")])).split("\n")
    assert lines == ["id   n", "--  --", "7f   5", "8   12"]
    assert [size(0), size(2048), size(3 * 1024**3)] == ["0 B", "2.0 KiB", "3.0 GiB"]
    assert [duration(1.24), duration(600), duration(7200)] == ["1.2 s", "10 min", "2.0 h"]


def test_rich_tables_on_a_terminal(capsys, monkeypatch):
    pytest.importorskip("rich")
    result = Result({}, [Table(("id", "target"), [("1", "[red]Oslo")])])
    Output().show(result)
    assert capsys.readouterr().out.splitlines()[1].startswith("--")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    Output().show(result)
    rich = capsys.readouterr().out
    assert "[red]Oslo" in rich and "--" not in rich
    monkeypatch.setitem(sys.modules, "rich.console", None)
    Output().show(result)
    assert "--" in capsys.readouterr().out


def test_help_and_version(run):
    code, out, _ = run("--help")
    assert code == 0 and all(command.name in out for command in commands(build_parser()))
    assert run("--version")[1].startswith("peft-edit ")
    for command in commands(build_parser()):
        code, out, _ = run(command.name, "--help")
        assert code == 0 and "--json" in out and command.help.rstrip(".")[:20] in out


def test_completion_in_json(run):
    found = document(run, "completion", "bash")
    assert found["shell"] == "bash" and found["script"] == run("completion", "bash")[1].rstrip("\n")


@pytest.mark.parametrize("shell", sorted(SHELLS))
def test_scripts_are_sound(shell, run, tmp_path):
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    path = tmp_path / "script"
    path.write_text(run("completion", shell)[1])
    assert subprocess.run([program, "-n", path], capture_output=True, text=True).stderr == ""


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes(run, tmp_path):
    (tmp_path / "script").write_text(run("completion", "bash")[1])
    (tmp_path / "my facts.jsonl").write_text("")

    def complete(*words):
        script = (
            'source ./script; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _peft_edit 2>/dev/null; '
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
        command = ["bash", "-c", script, "bash", "peft-edit", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout.splitlines()

    assert complete("e") == ["edit", "eval", "export-lora"]
    assert complete("edit", "tiny", "f", "--method", "me") == ["memit", "memit-forgetful"]
    assert complete("edit", "tiny", "my") == ["my facts.jsonl"]
    assert complete("show", "x", "--dtype", "f") == ["float32", "float16"]
    assert complete("completion", "z") == ["zsh"]
    assert "--statistics-text" in complete("edit", "--sta")


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes(run, tmp_path):
    (tmp_path / "script").write_text(run("completion", "fish")[1])
    script = 'function peft-edit; end; source script; complete -C "peft-edit edit tiny f --method me"'
    found = subprocess.run(["fish", "-N", "-c", script], cwd=tmp_path, capture_output=True, text=True).stdout
    assert [line.split("\t")[0] for line in found.splitlines()] == ["memit", "memit-forgetful"]


def test_python_m(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["peft-edit", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("peft_edit", run_name="__main__")
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("peft-edit ")


# --- the page ----------------------------------------------------------------------------------------------------


PAGE = Path(__file__).parents[1] / "docs" / "cli.md"


def shape(line):
    """A line without its numbers, whose widths, and with that the columns', may differ between machines."""
    return re.sub(r"[-\s]+", " ", re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?", "0", line)).strip()


@pytest.mark.skipif(not PAGE.is_file(), reason="the documentation is not there")
def test_examples_of_the_page(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [f"{fact.filled_prompt} {fact.target_true}." for fact in load_tiny_facts()[300:1200]]
    Path("text.txt").write_text("\n\n".join(texts))
    ran = 0
    for block in re.findall(r"^```console\n\$ (.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        command, _, shown = block.partition("\n")
        program, *arguments = shlex.split(command)
        if program == "cat":
            Path(arguments[0]).write_text(shown)
        elif program == "cp":
            shutil.copytree(*arguments[1:])
        elif program == "peft-edit" and shown and "\n$ " not in block:  # not the interrupted one, nor real pushes
            capsys.readouterr()
            code = main(arguments)
            captured = capsys.readouterr()
            assert code == (1 if "peft-edit: " in shown else 0), command
            said = [shape(line) for line in (captured.err + captured.out).splitlines()]
            for line in shown.splitlines():
                assert shape(line) in said, f"{command}: {line}"
            ran += 1
    assert ran >= 13
