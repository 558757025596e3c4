"""EditConfig: what it refuses, what it writes, and the edit memory that travels with it."""

import copy
import functools
import json
import pickle

import pytest
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from peft_edit import EDIT, EditConfig, EditMemory, EditModel, KeyStatistics, register
from peft_edit.memory import MEMORY_FILES


def small_memory() -> EditMemory:
    """A memory without facts, of one module."""
    statistics = KeyStatistics({"layers.0.lin": torch.eye(3)}, tokens=7, source="nothing", fingerprint={"samples": {}})
    return EditMemory(statistics, contexts=("", "Therefore"))


def test_peft_knows_the_type_and_registering_again_changes_nothing():
    mappings = PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
    assert [mapping[EDIT] for mapping in mappings] == [EditConfig, EditModel, "edit_"]
    sizes = [len(mapping) for mapping in mappings]
    register(EditConfig, EditModel, EditModel.prefix)
    assert [len(mapping) for mapping in mappings] == sizes
    assert PEFT_TYPE_TO_CONFIG_MAPPING["EDIT"] is EditConfig  # as read from adapter_config.json
    assert EDIT.value == "EDIT" and EDIT != PeftType.LORA  # transformers reads `.value`


@pytest.mark.parametrize(
    "values",
    [
        {"preservation_weight": "sometimes"},
        {"preservation_weight": -1.0},
        {"preservation_weight": float("nan")},
        {"norm_penalty": True},
        {"norm_penalty": float("inf")},
        {"norm_budget": 0},
        {"norm_budget": "auto"},
        {"early_stopping": "soon"},
        {"search_steps": 0},
        {"search_steps": 2.5},
        {"mpes_extra_steps": -1},
        {"num_contexts": -1},
        {"search_lr": 0},
        {"search_max_norm": 0.0},
        {"search_weight_decay": -0.1},
        {"search_kl_weight": "none"},
        {"target_modules": r".*\.down_proj", "layers_to_transform": [1]},
        {"target_modules": ["down_proj"], "layers_pattern": "layers"},
    ],
)
def test_a_bad_value_is_refused_and_named(values):
    with pytest.raises(ValueError, match=list(values)[-1]):
        EditConfig(**values)


def test_the_edges_of_the_ranges_are_accepted():
    config = EditConfig(
        preservation_weight=0, norm_penalty=0, norm_budget=1e-6, mpes_extra_steps=0, num_contexts=0, search_steps=1
    )
    config.check_values()
    assert EditConfig().trainable is False and EditConfig().save_memory is True


def test_names_become_sets_and_patterns_stay():
    config = EditConfig(target_modules=["a", "b"], exclude_modules=["c"])
    assert config.target_modules == {"a", "b"} and config.exclude_modules == {"c"}
    assert EditConfig(target_modules=".*b").target_modules == ".*b"


def test_every_field_says_what_it_is_for():
    own = set(EditConfig.__dataclass_fields__) - set(PeftConfig.__dataclass_fields__)
    assert own
    assert not [name for name in own if not EditConfig.__dataclass_fields__[name].metadata.get("help")]


def test_the_file_holds_json_of_every_field_and_no_memory(tmp_path):
    config = EditConfig(task_type="CAUSAL_LM", target_modules=["mlp.c_proj"], norm_budget=0.05, seed=3)
    config.memory = small_memory()
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "memory" not in written and "memory" not in config.to_dict()
    assert written["peft_type"] == "EDIT" and written["norm_budget"] == 0.05
    for read in (EditConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert isinstance(read, EditConfig)
        assert read.to_dict() == config.to_dict()


def test_memory_is_written_read_and_removed_when_stale(tmp_path):
    config = EditConfig()
    config.memory = small_memory()
    config.save_pretrained(tmp_path)
    assert all((tmp_path / name).is_file() for name in MEMORY_FILES)
    read = EditConfig.from_pretrained(tmp_path)
    assert read.memory.contexts == ("", "Therefore")
    assert torch.equal(read.memory.statistics.second_moments["layers.0.lin"], torch.eye(3))

    config.save_memory = False
    config.save_pretrained(tmp_path)
    assert not any((tmp_path / name).exists() for name in MEMORY_FILES)
    assert EditConfig.from_pretrained(tmp_path).memory is None

    config.save_memory = True
    config.save_pretrained(tmp_path)
    EditConfig().save_pretrained(tmp_path)  # another adapter, without memory, in the same place
    assert not any((tmp_path / name).exists() for name in MEMORY_FILES)


def test_memory_in_a_subfolder(tmp_path):
    config = EditConfig()
    config.memory = small_memory()
    config.save_pretrained(tmp_path / "second")
    assert EditConfig.from_pretrained(tmp_path, subfolder="second").memory is not None


def test_damaged_memory_is_an_error_that_names_the_file(tmp_path):
    config = EditConfig()
    config.memory = small_memory()
    config.save_pretrained(tmp_path)
    (tmp_path / MEMORY_FILES[0]).write_text("{")
    with pytest.raises(ValueError, match=MEMORY_FILES[0]):
        EditConfig.from_pretrained(tmp_path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub whose repository "user/edits" is a local directory: the directory, and the calls that fetch from it."""
    calls = []

    @functools.wraps(hf_hub_download)  # PEFT passes on what is in its signature
    def download(repo_id, filename, subfolder=None, **kwargs):
        calls.append((filename, kwargs))
        path = tmp_path / (subfolder or "") / filename
        if repo_id != "user/edits" or not path.is_file():
            raise EntryNotFoundError(f"404: {filename}")
        return str(path)

    monkeypatch.setattr("peft_edit.config.hf_hub_download", download)
    monkeypatch.setattr("peft.config.hf_hub_download", download)
    return tmp_path, calls


def test_memory_from_the_hub_is_fetched_as_the_config_is(hub):
    folder, calls = hub
    config = EditConfig()
    config.memory = small_memory()
    config.save_pretrained(folder)
    read = EditConfig.from_pretrained("user/edits", revision="v2", token="secret", cache_dir="there")
    assert read.memory is not None
    fetched = dict(calls)
    assert set(fetched) == {"adapter_config.json", *MEMORY_FILES}
    for name in MEMORY_FILES:
        assert fetched[name].items() >= {"revision": "v2", "token": "secret", "cache_dir": "there"}.items()


def test_no_memory_on_the_hub_is_no_memory(hub):
    folder, _ = hub
    EditConfig().save_pretrained(folder)
    assert EditConfig.from_pretrained("user/edits").memory is None


def test_offline_mode_asks_the_cache_only(hub, monkeypatch):
    folder, calls = hub
    EditConfig().save_pretrained(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    EditConfig.from_pretrained("user/edits")
    assert [kwargs["local_files_only"] for name, kwargs in calls if name in MEMORY_FILES] == [True]


def test_copies_share_the_memory_and_pickles_carry_it():
    config = EditConfig(target_modules=["a"])
    config.memory = small_memory()
    assert copy.deepcopy(config).memory is config.memory  # memories never change in place
    again = pickle.loads(pickle.dumps(config))
    assert again == config and again.memory.contexts == config.memory.contexts
