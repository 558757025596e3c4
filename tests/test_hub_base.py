"""What is pushed calls the base model by its name on the Hub, never by a path of the computer that it is on."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard
from peft import get_peft_model

from peft_edit import EditConfig, KeyStatistics
from peft_edit.tiny import is_bundled, tiny_model_path

from .hub_endpoint import REPO, TOKEN, check_same, load
from .models import build_model


pytest_plugins = "tests.hub_endpoint"


@pytest.fixture
def local(model, tmp_path):
    """Two adapters and the key statistics of `model`, on a base as if loaded from a directory; and that path."""
    path = str(tmp_path / "home" / "my-llama")
    base = build_model("llama")
    base.name_or_path = base.config._name_or_path = path
    local = get_peft_model(base, EditConfig(task_type="CAUSAL_LM", layers_to_transform=[0, 1])).eval()
    statistics = model.peft_config["default"].memory.statistics
    local.set_statistics(replace(statistics, fingerprint={**statistics.fingerprint, "name_or_path": path}))
    local.add_adapter("second", EditConfig(task_type="CAUSAL_LM", layers_to_transform=[0, 1]))
    return local, path


def named_bases(files: dict[str, bytes]) -> list[str]:
    """What the files of two adapters call the base model."""
    configs = [json.loads(files[name]) for name in ("adapter_config.json", "second/adapter_config.json")]
    fingerprint = json.loads(files["key_statistics.json"])["fingerprint"]
    return [*(config["base_model_name_or_path"] for config in configs), fingerprint["name_or_path"]]


def test_a_path_of_the_base_does_not_leave_the_house(local, hub, tmp_path):
    model, path = local
    with pytest.warns(UserWarning) as warned:
        model.push_to_hub(REPO, token=TOKEN)
    (said,) = [text for each in warned if "base model of these edits" in (text := str(each.message))]
    assert f"of this computer, '{path}': 'user/edits' names it './my-llama'" in said
    assert "others cannot load the edits without being given that model. If it is on the Hub, load it by its" in said
    assert "model.peft_config['default'].base_model_name_or_path" in said
    files = hub.repositories[REPO].files()
    assert named_bases(files) == ["./my-llama"] * 3
    assert not any(str(tmp_path).encode() in content for content in files.values())
    check_same(load(), model)
    saved = tmp_path / "saved"
    model.save_pretrained(saved)  # what stays here keeps the path, which works here
    written = {file.relative_to(saved).as_posix(): file.read_bytes() for file in saved.rglob("*.json")}
    assert named_bases(written) == [path] * 3


@pytest.mark.parametrize("place", ["config", "model"])
def test_a_base_that_is_on_the_hub_is_named_so(local, hub, place):
    model, path = local
    if place == "config":
        model.peft_config["default"].base_model_name_or_path = "someone/llama-1b"
    else:
        model.base_model.model.config._name_or_path = "someone/llama-1b"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The base model of these edits")
        model.push_to_hub(REPO, token=TOKEN)
    files = hub.repositories[REPO].files()
    assert named_bases(files) == ["someone/llama-1b"] * 3
    assert ModelCard(files["README.md"].decode()).data.base_model == "someone/llama-1b"


def test_the_bundled_base_is_known_on_other_computers(local, hub):
    model, _ = local
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(tiny_model_path())
    statistics = model.peft_config["default"].memory.statistics
    statistics.fingerprint["name_or_path"] = str(tiny_model_path())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The base model of these")
        model.push_to_hub(REPO, token=TOKEN)
        statistics.push_to_hub("user/statistics", token=TOKEN)
    names = named_bases(hub.repositories[REPO].files())
    assert names == ["./peft_edit/tiny_model"] * 3 and is_bundled(names[0])
    assert KeyStatistics.from_pretrained("user/statistics").fingerprint["name_or_path"] == names[0]


def test_statistics_do_not_tell_the_path_either(local, hub, tmp_path):
    model, path = local
    statistics = model.peft_config["default"].memory.statistics
    with pytest.warns(UserWarning) as warned:
        statistics.push_to_hub(REPO, token=TOKEN)
    (said,) = [text for each in warned if "base model of these key statistics" in (text := str(each.message))]
    assert f"of this computer, '{path}': 'user/edits' names it './my-llama'" in said
    assert "set fingerprint['name_or_path'] of the statistics to its name there" in said
    files = hub.repositories[REPO].files()
    assert not any(str(tmp_path).encode() in content for content in files.values())
    fetched = KeyStatistics.from_pretrained(REPO)
    assert statistics.fingerprint["name_or_path"] == path  # here it works
    assert fetched.fingerprint == {**statistics.fingerprint, "name_or_path": "./my-llama"}
    modules = list(statistics.second_moments)
    fetched.check(model.base_model.model, modules)
    assert all(torch.equal(fetched.second_moments[name], statistics.second_moments[name]) for name in modules)


@pytest.mark.parametrize("name", ["someone/llama-1b", "./my-llama", ""])
def test_statistics_of_a_base_with_a_public_name_keep_it(local, hub, name):
    model, _ = local
    statistics = model.peft_config["default"].memory.statistics
    statistics.fingerprint["name_or_path"] = name
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The base model of these key statistics")
        statistics.push_to_hub(REPO, token=TOKEN)
    assert KeyStatistics.from_pretrained(REPO).fingerprint["name_or_path"] == name
