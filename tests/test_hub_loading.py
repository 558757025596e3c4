"""Adapters loaded from the Hub: out of the client's cache with and without a connection; what comes is checked."""

import hashlib
import json
import os
import tempfile
import warnings
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save

from peft_edit import EditConfig
from peft_edit.hub import fetch_edits
from peft_edit.memory import MEMORY_FILES

from .hub_endpoint import REPO, TOKEN, WEIGHTS, check_same, load


pytest_plugins = "tests.hub_endpoint"


# --- from the cache ----------------------------------------------------------------------------------------------


def fill_cache(cache: Path, files: dict[str, bytes], absent=(), repo_id=REPO, branch="main") -> str:
    """A repository in the layout of the Hub's cache; `absent` ones are remembered as not there. Gives the commit."""
    folder = cache / f"models--{repo_id.replace('/', '--')}"
    commit = hashlib.sha1(json.dumps(sorted(files)).encode()).hexdigest()
    for name, content in files.items():
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        link = folder / "snapshots" / commit / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(os.path.relpath(blob, link.parent))
    for name in absent:
        path = folder / ".no_exist" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / branch).write_text(commit)
    return commit


def content(folder: Path, names=(*WEIGHTS, *MEMORY_FILES)) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


def test_offline_from_the_cache(model, saved, no_hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fill_cache(tmp_path / "cache", content(saved))
    loaded = load()
    check_same(loaded, model)
    loaded.remove_facts(model.edited_facts()[0])
    assert len(loaded.edited_facts()) == 3


def test_a_pinned_revision_from_the_cache(model, saved, no_hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = fill_cache(tmp_path / "elsewhere", content(saved), branch="v1")
    for revision in ("v1", commit):
        check_same(load(revision=revision, cache_dir=str(tmp_path / "elsewhere")), model)
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json' at 'user/edits'"):
        load(cache_dir=str(tmp_path / "elsewhere"))  # PEFT's words: there is no "main"


def test_local_files_only_without_any_connection(model, saved, no_hub, tmp_path):
    commit = fill_cache(tmp_path / "cache", content(saved))
    for revision in (None, "main", commit):
        check_same(load(fetch_edits(REPO, revision=revision, local_files_only=True)), model)
    check_same(load(fetch_edits(REPO)), model)  # who cannot reach the Hub gets what the cache has


def test_local_files_only_as_an_option_of_from_pretrained(model, hub):
    commit = model.push_to_hub(REPO, token=TOKEN)
    load(revision=commit.oid)
    hub.repositories[REPO].commit("main", {}, "emptied")
    hub.requests.clear()
    check_same(load(local_files_only=True, revision=commit.oid), model)
    assert not any(command == "GET" and "/resolve/" in path for command, path in hub.requests)


def test_a_cache_without_the_memory_warns_and_infers(saved, no_hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fill_cache(tmp_path / "cache", content(saved, WEIGHTS))
    with pytest.warns(UserWarning, match="cache holds no edit memory of 'user/edits'.*inference only"):
        assert load().peft_config["default"].memory is None


def test_a_repository_known_to_have_no_memory_does_not_warn(saved, no_hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fill_cache(tmp_path / "cache", content(saved, WEIGHTS), absent=MEMORY_FILES[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert load().peft_config["default"].memory is None


def test_a_part_of_the_memory_in_the_cache_is_an_error(saved, no_hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fill_cache(tmp_path / "cache", content(saved, (*WEIGHTS, *MEMORY_FILES[:2])))
    with pytest.raises(ValueError, match="edit memory of 'user/edits' lacks 'edit_facts.jsonl': fetch it online"):
        load()


def test_a_memory_is_not_lost_when_the_connection_is(saved, no_hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between the client's retries
    fill_cache(tmp_path / "cache", content(saved, WEIGHTS))
    with pytest.raises(
        ConnectionError, match="The edit memory of 'user/edits' is not in the cache and the Hub cannot"
    ):
        EditConfig.from_pretrained(REPO)


def test_nothing_in_the_cache(no_hub):
    with pytest.raises(FileNotFoundError, match="'user/edits' is not in the cache, and the Hub is not asked"):
        fetch_edits(REPO, local_files_only=True)


# --- what comes is checked ---------------------------------------------------------------------------------------


def push_changed(hub, model, **changes):
    """Pushes the adapter, then changes some of its tensor files."""
    model.push_to_hub(REPO, token=TOKEN)
    repository = hub.repositories[REPO]
    files = repository.files()
    for name, change in changes.items():
        name = f"{name}.safetensors"
        with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
            Path(file.name).write_bytes(files[name])
            tensors = load_file(file.name)
        files = {**files, name: save({key: change(tensor) for key, tensor in tensors.items()}, {"format": "pt"})}
    repository.commit("main", files, "changed")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensor: tensor[:, :5].clone(), "has shape"),
        (lambda tensor: tensor.long(), "not finite numbers"),
        (lambda tensor: tensor.fill_(float("nan")), "not finite numbers"),
    ],
)
def test_weights_from_the_hub_are_checked(model, hub, change, said):
    push_changed(hub, model, adapter_model=change)
    with pytest.raises(ValueError, match=said):
        load()


def test_memory_from_the_hub_is_checked(model, hub):
    push_changed(hub, model, edit_memory=lambda tensor: tensor[:2].clone())
    with pytest.raises(ValueError, match="edit_memory.safetensors' cannot be used .*expected \\(4, "):
        load()


def test_another_base_model_is_refused(model, hub):
    model.push_to_hub(REPO, token=TOKEN)
    with pytest.raises(ValueError, match="belong to another base model: the weights of .* differ"):
        load(seed=9)


def test_a_repository_without_adapter(hub, model):
    model.push_to_hub(REPO, token=TOKEN)
    repository = hub.repositories[REPO]
    pickled = {"adapter_config.json": repository.files()["adapter_config.json"], "adapter_model.bin": b"\x80"}
    repository.commit("main", pickled, "pickled")
    with pytest.raises(
        FileNotFoundError, match="'user/edits' holds no adapter .there is no adapter_model.safetensors"
    ):
        fetch_edits(REPO)
    with pytest.raises(FileNotFoundError, match="holds no adapter in 'second' .there is no adapter_config.json"):
        fetch_edits(REPO, subfolder="second")
