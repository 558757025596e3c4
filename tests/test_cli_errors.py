"""What goes wrong on the command line: wrong arguments, things that are not there, damaged or foreign adapters."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_edit.cli.errors import sentence
from peft_edit.tiny import load_tiny_model

from .cli_run import document


pytest_plugins = "tests.cli_run"


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
