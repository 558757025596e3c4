"""The edit memory's files, and adapters that are damaged or of another model."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_edit import EditConfig, EditMemory
from peft_edit.memory import MEMORY_FILES

from .models import build_model
from .world import texts, town_facts, word_tokenizer


@pytest.fixture
def saved(tmp_path):
    """A directory with an adapter of four facts on a small Llama, and the wrapped model."""
    tokenizer = word_tokenizer()
    config = EditConfig(task_type="CAUSAL_LM", layers_to_transform=[0, 1], num_contexts=1, search_steps=3)
    model = get_peft_model(build_model("llama"), config).eval()
    model.collect_statistics(texts(), tokenizer)
    model.edit_facts(town_facts(4), tokenizer, batch_size=2, progress=False)
    model.save_pretrained(tmp_path)
    return tmp_path, model


def load(path, **model):
    return PeftModel.from_pretrained(build_model(**{"family": "llama", **model}), path)


def test_comes_back_as_it_was(saved):
    path, model = saved
    memory, loaded = model.peft_config["default"].memory, EditMemory.load(path)
    assert loaded.records == memory.records and loaded.contexts == memory.contexts and loaded.batches == 2
    for name in memory.keys:
        assert torch.equal(loaded.keys[name], memory.keys[name])
        assert torch.equal(loaded.values[name], memory.values[name])
    lines = [json.loads(line) for line in (path / "edit_facts.jsonl").read_text().splitlines()]
    assert [line["subject"] for line in lines] == [fact.subject for fact in town_facts(4)]
    assert all((path / name).is_file() for name in MEMORY_FILES)


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u0085"])
def test_line_separators_of_unicode_separate_no_facts(saved, tmp_path, character):
    path, model = saved
    memory = model.peft_config["default"].memory
    odd = replace(memory.records[0], subject=f"Ren{character}X")
    replace(memory, records=(odd, *memory.records[1:])).save(tmp_path / "odd")
    assert EditMemory.load(tmp_path / "odd").records[0] == odd


def test_memories_that_use_an_id_twice_are_not_joined(saved):
    _, model = saved
    memory = model.peft_config["default"].memory
    one, other = memory.without({r.id for r in memory.records[2:]}), memory.without({r.id for r in memory.records[:2]})
    assert len(one.union(other)) == 4
    renamed = replace(other, records=(replace(other.records[0], id=one.records[0].id), *other.records[1:]))
    with pytest.raises(ValueError, match=f"fact under the id '{one.records[0].id}', and not the same one: edit one"):
        one.union(renamed)


def test_a_saved_solution_is_not_resumed_under_other_statistics(tmp_path):
    """Its λ met the budget under the old ones."""
    tokenizer = word_tokenizer()
    fixed = dict(preservation_weight=1.0, norm_penalty=1e-6, norm_budget=0.05)
    config = EditConfig(task_type="CAUSAL_LM", layers_to_transform=[1], num_contexts=1, search_steps=3, **fixed)
    model = get_peft_model(build_model("llama"), config).eval()
    statistics = model.collect_statistics(texts(), tokenizer)
    model.edit_facts(town_facts(4), tokenizer, progress=False)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    smaller = {name: moment / 100 for name, moment in statistics.second_moments.items()}
    loaded.set_statistics(replace(statistics, second_moments=smaller))
    for layer in loaded.edit_layers().values():
        assert float(layer.get_delta("default").double().norm()) == pytest.approx(0.05 * layer.base_norm(), rel=1e-6)


def test_saving_without_memory_removes_an_older_one(saved):
    path, model = saved
    model.peft_config["default"].save_memory = False
    model.save_pretrained(path)
    assert not any((path / name).exists() for name in MEMORY_FILES)


@pytest.mark.parametrize(
    "name", ["edit_memory.safetensors", "key_statistics.safetensors", "adapter_model.safetensors"]
)
def test_truncated_files_are_refused(saved, name):
    path, _ = saved
    whole = (path / name).read_bytes()
    (path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{name}' cannot be"):
        load(path)


def changed(path, name, change):
    tensors = load_file(path / name)
    change(tensors)
    save_file(tensors, path / name, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.update({"keys.more": torch.zeros(4, 2)}), "'keys.more' is not expected"),
        (lambda tensors: tensors.pop(sorted(tensors)[0]), "is missing"),
        (
            lambda tensors: tensors.update({key: value[:2].clone() for key, value in tensors.items()}),
            "expected \\(4, ",
        ),
        (lambda tensors: tensors[sorted(tensors)[0]].fill_(float("nan")), "not finite"),
    ],
)
def test_memory_tensors_are_checked(saved, change, said):
    path, _ = saved
    changed(path, "edit_memory.safetensors", change)
    with pytest.raises(ValueError, match=said):
        load(path)


def test_the_list_of_facts_is_checked(saved):
    path, _ = saved
    facts = path / "edit_facts.jsonl"
    lines = facts.read_text().splitlines(keepends=True)
    facts.write_text("".join(lines[:3]))
    with pytest.raises(ValueError, match="3 facts where edit_memory.json counts 4"):
        load(path)
    facts.write_text("".join(lines[:3]) + "{broken\n")
    with pytest.raises(ValueError, match="edit_facts.jsonl"):
        load(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors[sorted(tensors)[0]].fill_(float("inf")), "not finite"),
        (lambda tensors: tensors.update({key: value[:, :5].clone() for key, value in tensors.items()}), "has shape"),
        (lambda tensors: tensors.pop(sorted(tensors)[0]), "lacks the tensor"),
        (
            lambda tensors: tensors.update(
                {"base_model.model.model.layers.3.mlp.down_proj.edit_delta.weight": torch.zeros(32, 64)}
            ),
            "no place for",
        ),
    ],
)
def test_adapter_tensors_are_checked(saved, change, said):
    path, _ = saved
    changed(path, "adapter_model.safetensors", change)
    with pytest.raises(ValueError, match=said):
        load(path)


def test_an_adapter_of_another_base_is_refused_and_another_dtype_is_not(saved):
    path, _ = saved
    with pytest.raises(ValueError, match="edits of this adapter belong to another base model"):
        load(path, seed=9)
    assert len(load(path, dtype=torch.bfloat16).edited_facts()) == 4
