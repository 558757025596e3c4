"""Adapters on the Hub, through the real client: a cache in the Hub's layout, and an endpoint that takes commits."""

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants, hf_api
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save

from peft_edit import EditConfig, as_facts
from peft_edit.hub import fetch_edits, push_edits
from peft_edit.memory import MEMORY_FILES

from .hub_endpoint import TOKEN, HubEndpoint, hub_endpoint
from .models import build_model
from .world import texts, town_facts, word_tokenizer


REPO = "user/edits"
WEIGHTS = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def model():
    """A model with four facts."""
    config = EditConfig(task_type="CAUSAL_LM", layers_to_transform=[0, 1], num_contexts=1, search_steps=3)
    model = get_peft_model(build_model("llama"), config).eval()
    model.collect_statistics(texts(), word_tokenizer())
    model.edit_facts(town_facts(4), word_tokenizer(), batch_size=2, progress=False)
    return model


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return folder


def use_endpoint(monkeypatch, url, cache):
    """What HF_ENDPOINT, HF_HUB_CACHE and the others set when the client is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hf_api.api, "endpoint", url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hub_endpoint() as endpoint:
        use_endpoint(monkeypatch, endpoint.url, tmp_path / "cache")
        yield endpoint


@pytest.fixture
def no_hub(tmp_path, monkeypatch):
    """An address at which nobody answers."""
    with socket.socket() as held:  # bound and not listening: refused, and nobody else gets the port meanwhile
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        use_endpoint(monkeypatch, url, tmp_path / "cache")
        yield url


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


def load(source=REPO, seed=0, **options):
    return PeftModel.from_pretrained(build_model("llama", seed=seed), source, **options).eval()


def check_same(loaded, model):
    """The same deltas bit for bit, and the same facts."""
    for name, layer in model.base_model.edit_layers().items():
        other = loaded.base_model.edit_layers()[name]
        assert torch.equal(other.get_delta("default"), layer.get_delta("default"))
    assert loaded.edited_facts() == model.edited_facts()


# --- from the cache ----------------------------------------------------------------------------------------------


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


# --- pushing and fetching ----------------------------------------------------------------------------------------


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


# --- what goes wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["hf_wrong", None])
def test_a_wrong_token_or_none(model, hub, token):
    with pytest.raises(PermissionError, match=r"refuses access to 'user/edits' \(401\): log in with `hf auth login`"):
        model.push_to_hub(REPO, token=token)
    assert not hub.repositories


def test_a_wrong_token_for_reading(model, hub):
    model.push_to_hub(REPO, token=TOKEN)
    with pytest.raises(PermissionError, match=r"refuses access to 'user/edits' \(401\)"):
        fetch_edits(REPO, token="hf_wrong")


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_that_is_private_or_not_there(model, hub, private):
    if private:
        model.push_to_hub(REPO, token=TOKEN, private=True)
    with pytest.raises(FileNotFoundError, match="There is no repository 'user/edits' at http.*, or it is private"):
        fetch_edits(REPO)


def test_a_revision_that_is_not_there(model, hub):
    model.push_to_hub(REPO, token=TOKEN)
    with pytest.raises(FileNotFoundError, match="'user/edits' has no revision 'v7'"):
        fetch_edits(REPO, revision="v7")


@pytest.mark.parametrize("act", [push_edits, lambda model, repo_id: fetch_edits(repo_id)])
def test_an_unreachable_hub(model, no_hub, act):
    with pytest.raises(ConnectionError, match=f"The Hub at {no_hub} cannot be reached .*: check the connection"):
        act(model, REPO)
    assert len(model.edited_facts()) == 4 and model.peft_config["default"].save_memory


def test_a_push_offline(model, no_hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="not asked while HF_HUB_OFFLINE is set"):
        model.push_to_hub(REPO, token=TOKEN)


def test_a_refused_commit_leaves_the_repository(model, hub):
    model.push_to_hub(REPO, token=TOKEN)
    before = dict(hub.repositories[REPO].files())
    hub.refuse_commits = True
    with pytest.raises(ValueError, match="answers 400 for 'user/edits': the disk of the Hub is full"):
        model.push_to_hub(REPO, token=TOKEN, include_facts=False)
    assert hub.repositories[REPO].files() == before and model.peft_config["default"].save_memory


@pytest.mark.parametrize("act", [push_edits, lambda model, repo_id: fetch_edits(repo_id)])
def test_a_name_that_is_none(model, hub, act):
    with pytest.raises(ValueError, match="'no such/name' is neither a directory nor a repository's name"):
        act(model, "no such/name")


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="permissions as POSIX has them")
def test_a_cache_that_cannot_be_written_to(model, hub):
    model.push_to_hub(REPO, token=TOKEN)
    with tempfile.TemporaryDirectory() as cache:
        os.chmod(cache, 0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(PermissionError, match="cannot be written or read .*: choose a directory"):
                fetch_edits(REPO, cache_dir=cache)
        finally:
            if root:
                os.seteuid(0)


def test_an_unknown_option_is_named(model, hub):
    with pytest.raises(TypeError, match="with_facts"):
        model.push_to_hub(REPO, token=TOKEN, with_facts=False)


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
