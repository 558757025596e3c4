"""Adapters pushed to the Hub and fetched again, through the real client and an endpoint that takes commits."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model

from peft_edit import EditConfig, as_facts
from peft_edit.hub import fetch_edits
from peft_edit.memory import MEMORY_FILES

from .hub_endpoint import REPO, TOKEN, WEIGHTS, HubEndpoint, check_same, load
from .models import build_model
from .world import town_facts, word_tokenizer


pytest_plugins = "tests.hub_endpoint"


def test_a_push_comes_back(model, hub: HubEndpoint, tmp_path):
    commit = model.push_to_hub(REPO, token=TOKEN, private=True, commit_message="Four towns", tags=["towns"])
    repository = hub.repositories[REPO]
    assert commit.oid == repository.branches["main"] and repository.messages[-1] == "Four towns"
    assert repository.private and set(WEIGHTS) | set(MEMORY_FILES) < set(repository.files())
    assert {path for command, path in hub.requests if command == "PUT"}  # tensors went as large files
    check_same(load(token=TOKEN), model)
    check_same(load(fetch_edits(REPO, token=TOKEN, cache_dir=tmp_path / "second")), model)
    card = ModelCard(repository.files()["README.md"].decode())
    assert "towns" in card.data.tags and "knowledge-editing" in card.data.tags
    assert f'PeftModel.from_pretrained(base, "{REPO}")' in card.text
    assert "[More Information Needed]" not in card.text and repository.files()["edit_norms.png"].startswith(b"\x89PNG")


def test_an_edit_of_the_fetched_adapter_is_pushed_to_a_branch(model, hub, tmp_path):
    first = model.push_to_hub(REPO, token=TOKEN)
    loaded = load()
    removed = loaded.remove_facts(loaded.edited_facts()[0])
    loaded.push_to_hub(REPO, token=TOKEN, revision="fewer")
    assert len(load(revision="fewer").edited_facts()) == 3
    assert len(load(revision="main").edited_facts()) == len(load(revision=first.oid).edited_facts()) == 4
    assert removed[0].subject not in hub.repositories[REPO].files("fewer")["README.md"].decode()


def test_a_pull_request(model, hub):
    model.push_to_hub(REPO, token=TOKEN)
    before = hub.repositories[REPO].branches["main"]
    commit = model.push_to_hub(REPO, token=TOKEN, create_pr=True, license="mit")
    assert commit.pr_url and hub.repositories[REPO].branches["main"] == before
    assert b"license: mit" in hub.repositories[REPO].files("refs/pr/1")["README.md"]


def test_withheld_facts_do_not_leave_the_house(model, hub):
    model.push_to_hub(REPO, token=TOKEN)
    model.push_to_hub(REPO, token=TOKEN, include_facts=False)
    files = hub.repositories[REPO].files()
    assert set(files) == {".gitattributes", "README.md", "edit_norms.png", *WEIGHTS}
    for record in model.edited_facts():
        for word in (record.subject, record.id):
            assert not any(word.encode() in text for text in files.values())
    assert b"not published" in files["README.md"]
    loaded = load()
    tokens = torch.arange(8)[None] + 3
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.peft_config["default"].memory is None
    with pytest.raises(ValueError, match="another base model"):
        load(seed=9)
    with pytest.raises(RuntimeError, match="no edit memory"):
        loaded.edit_facts(town_facts(5)[4:], word_tokenizer(), progress=False)
    assert model.peft_config["default"].save_memory and len(model.edited_facts()) == 4  # the pusher keeps all


def test_facts_can_be_read_as_a_data_set(model, hub):
    datasets = pytest.importorskip("datasets")
    model.push_to_hub(REPO, token=TOKEN)
    path = fetch_edits(REPO) / "edit_facts.jsonl"
    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(path.parent / "arrow"))
    expected = [(fact.subject, fact.prompt, fact.target) for fact in town_facts(4)]
    assert [(row["subject"], row["prompt"], row["target"]) for row in rows] == expected
    assert [(fact.subject, fact.prompt, fact.target) for fact in as_facts(rows)] == expected


def test_an_authors_card_and_files_stay(model, hub):
    model.push_to_hub(REPO, token=TOKEN)
    repository = hub.repositories[REPO]
    card = repository.files()["README.md"].decode().replace("---\n", "---\nlicense: mit\n", 1) + "\nBy me.\n"
    files = {**repository.files(), "README.md": card.encode(), "notes.txt": b"keep"}
    repository.commit("main", files, "by hand")
    model.push_to_hub(REPO, token=TOKEN, scores={"efficacy": 91.5})
    files = repository.files()
    card = files["README.md"].decode()
    assert files["notes.txt"] == b"keep" and card.rstrip().endswith("By me.")
    assert "license: mit" in card and "| efficacy | 91.5 |" in card and card.count("## Facts") == 1


def test_adapters_beside_the_default_one(model, hub):
    both = get_peft_model(build_model("llama"), EditConfig(task_type="CAUSAL_LM", layers_to_transform=[0]))
    both.add_adapter("second", EditConfig(task_type="CAUSAL_LM", layers_to_transform=[1, 2], init_weights=False))
    both.push_to_hub(REPO, token=TOKEN)
    assert {f"second/{name}" for name in WEIGHTS} < set(hub.repositories[REPO].files())
    folder = fetch_edits(REPO, subfolder="second")
    expected = both.base_model.edit_layers("second")
    for loaded in (load(folder), load(subfolder="second")):
        for name, layer in loaded.base_model.edit_layers("default").items():
            assert torch.equal(layer.get_delta("default"), expected[name].get_delta("second"))


def test_other_adapters_are_pushed_as_peft_does(hub):
    lora = get_peft_model(build_model("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    lora.push_to_hub("user/lora", token=TOKEN)
    assert "knowledge-editing" not in hub.repositories["user/lora"].files()["README.md"].decode()
    with pytest.raises(FileNotFoundError, match="'user/edits'"):
        fetch_edits(REPO)


def test_a_directory_needs_no_hub(saved, no_hub):
    assert fetch_edits(saved) == saved


# --- as a user meets it ------------------------------------------------------------------------------------------

SCRIPT = """
import sys
import peft_edit
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(base, sys.argv[2])
model.remove_facts(model.edited_facts()[0])
model.push_to_hub("user/fewer")
print(len(PeftModel.from_pretrained(model.unload(), "user/fewer").edited_facts()))
"""


def test_with_the_environment_alone(model, hub, saved, tmp_path):
    """The endpoint and the token as the client reads them from HF_ENDPOINT and HF_TOKEN."""
    build_model("llama").save_pretrained(tmp_path / "base")
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "base"), str(saved)],
        env={**os.environ, **settings, "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["3"], done.stderr
    assert "knowledge-editing" in hub.repositories["user/fewer"].files()["README.md"].decode()


def test_the_page_on_the_hub(hub, tmp_path, monkeypatch):
    """Every Python block of docs/hub.md, in order."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "arrow")
    page = (Path(__file__).parents[1] / "docs" / "hub.md").read_text(encoding="utf-8")
    names: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.S | re.M):
        exec(block, names)
    assert len(names["same"]) == len(names["model"].edited_facts()) == 4
    assert "five-facts" in hub.repositories[REPO].branches
    assert "edit_facts.jsonl" not in hub.repositories[REPO].files("main")
    assert "| efficacy |" in (tmp_path / "edits" / "README.md").read_text()
