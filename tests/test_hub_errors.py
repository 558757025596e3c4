"""Errors of pushing and fetching: each says in one sentence what is wrong and what to do, and nothing is changed."""

import os
import tempfile

import pytest
from huggingface_hub import constants

from peft_edit import KeyStatistics
from peft_edit.hub import fetch_edits, push_edits

from .hub_endpoint import REPO, TOKEN


pytest_plugins = "tests.hub_endpoint"


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


def test_statistics_say_it_as_clearly(model, hub):
    statistics = model.peft_config["default"].memory.statistics
    with pytest.raises(PermissionError, match=r"refuses access to 'user/edits' \(401\)"):
        statistics.push_to_hub(REPO, token="hf_wrong")
    with pytest.raises(ValueError, match="'no such/name' is neither a directory nor a repository's name"):
        statistics.push_to_hub("no such/name", token=TOKEN)
    with pytest.raises(FileNotFoundError, match="There is no repository 'user/edits'"):
        KeyStatistics.from_pretrained(REPO)
    model.push_to_hub(REPO, token=TOKEN, include_facts=False)
    with pytest.raises(FileNotFoundError, match="'user/edits' does not hold 'key_statistics.json': name the repo"):
        KeyStatistics.from_pretrained(REPO)


def test_statistics_and_an_unreachable_hub(model, no_hub):
    with pytest.raises(ConnectionError, match=f"The Hub at {no_hub} cannot be reached"):
        KeyStatistics.from_pretrained(REPO)
    with pytest.raises(ConnectionError, match=f"The Hub at {no_hub} cannot be reached"):
        model.peft_config["default"].memory.statistics.push_to_hub(REPO)
