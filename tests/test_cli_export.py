"""What leaves an adapter: merged models, LoRAs, and pushes to the Hub; and the demo."""

import socket

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from peft_edit import EditMemory
from peft_edit.tiny import load_tiny_facts, load_tiny_model

from .cli_run import FACTS, contents, document
from .hub_endpoint import TOKEN, hub_endpoint, use_endpoint


pytest_plugins = "tests.cli_run"


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
