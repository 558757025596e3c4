"""The part of the Hub's HTTP interface that pushing and fetching a model need, on localhost and in memory.

Test modules of the Hub name this one in `pytest_plugins` for the fixtures at its end. They import its functions too,
before pytest could rewrite its asserts: PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from huggingface_hub import constants, hf_api
from peft import PeftModel, get_peft_model

from peft_edit import EditConfig

from .models import build_model
from .world import texts, town_facts, word_tokenizer


Files = dict[str, bytes]

TOKEN = "hf_right"
REPO = "user/edits"
WEIGHTS = ("adapter_config.json", "adapter_model.safetensors")
LFS = ".safetensors"


@dataclass
class Repository:
    """Commits by hash, branches by name."""

    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: Files, message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)}{message}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def find(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)

    def files(self, branch: str = "main") -> Files:
        return self.commits[self.branches[branch]]


class HubEndpoint(ThreadingHTTPServer):
    """A Hub with one user, whose token is `TOKEN`; `refuse_commits` makes it fail at the last moment."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.refuse_commits = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def hub_endpoint() -> Iterator[HubEndpoint]:
    """The endpoint, while it is served from a thread."""
    with HubEndpoint() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: HubEndpoint

    def log_message(self, *_: Any) -> None:
        pass

    # --- routes ------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        routes = {
            ("POST", r"/api/repos/create"): self._create,
            ("POST", r"/api/validate-yaml"): self._validate,
            ("POST", r"/api/models/([^/]+/[^/]+)/branch/(.+)"): self._branch,
            ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)"): self._preupload,
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch"): self._lfs_batch,
            ("PUT", r"/lfs/(\w+)"): self._lfs_put,
            ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)"): self._commit,
            ("GET", r"/api/models/([^/]+/[^/]+)/revision/(.+)"): self._info,
            ("GET", r"/api/models/([^/]+/[^/]+)"): self._info,
            ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)"): self._tree,
            ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)"): self._resolve,
            ("HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)"): self._resolve,
        }
        for (command, pattern), handle in routes.items():
            match = re.fullmatch(pattern, path)
            if match and command == self.command:
                handle(body, *match.groups())
                return
        self._fail(404, "NoRoute", f"{self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _create(self, body: bytes) -> None:
        if not self._may_write():
            return
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        if name in self.server.repositories:
            self._answer(409, {"url": f"{self.server.url}/{name}"})
            return
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.server.repositories[name] = Repository(private)
        self.server.repositories[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial")
        self._answer(200, {"url": f"{self.server.url}/{name}", "id": name})

    def _validate(self, body: bytes) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def _branch(self, body: bytes, name: str, branch: str) -> None:
        repository = self._repository(name) if self._may_write() else None
        if repository is None:
            return
        if branch in repository.branches:
            self._answer(409, {"error": "exists"})
            return
        repository.branches[branch] = repository.branches["main"]
        self._answer(200, {})

    def _preupload(self, body: bytes, name: str, revision: str) -> None:
        if self._may_write() and self._repository(name) is not None:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "lfs" if path.endswith(LFS) else "regular"} for path in paths]
            self._answer(200, {"files": [{**mode, "shouldIgnore": False, "oid": None} for mode in modes]})

    def _lfs_batch(self, body: bytes, name: str) -> None:
        if not self._may_write() or self._repository(name) is None:
            return
        objects = json.loads(body)["objects"]
        for asked in objects:
            if asked["oid"] not in self.server.blobs:
                asked["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}"}}
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._fail(400, "BadObject", "the content is not what its name says")
            return
        self.server.blobs[oid] = body
        self._answer(200, {})

    def _commit(self, body: bytes, name: str, revision: str) -> None:
        repository = self._repository(name) if self._may_write() else None
        if repository is None:
            return
        if self.server.refuse_commits:
            self._fail(400, "", "the disk of the Hub is full")
            return
        pull_request = "create_pr=1" in urlsplit(self.path).query
        branch = f"refs/pr/{len(repository.branches)}" if pull_request else revision
        files, message = dict(repository.files(revision)), ""
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                assert value["encoding"] == "base64" and not value["path"].endswith(LFS)
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        oid = repository.commit(branch, files, message)
        url = f"{self.server.url}/{name}"
        self._answer(
            200,
            {
                "success": True,
                "commitOid": oid,
                "commitUrl": f"{url}/commit/{oid}",
                "pullRequestUrl": f"{url}/discussions/{branch.rpartition('/')[2]}" if pull_request else None,
            },
        )

    def _info(self, body: bytes, name: str, revision: str = "main") -> None:
        found = self._revision(name, revision)
        if found is not None:
            repository, oid = found
            siblings = [{"rfilename": path} for path in repository.commits[oid]]
            self._answer(200, {"id": name, "sha": oid, "private": repository.private, "siblings": siblings})

    def _tree(self, body: bytes, name: str, revision: str) -> None:
        found = self._revision(name, revision)
        if found is not None:
            files = found[0].commits[found[1]]
            self._answer(200, [{"type": "file", "path": path, **_described(files[path])} for path in files])

    def _resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        found = self._revision(name, revision)
        if found is None:
            return
        repository, oid = found
        content = repository.commits[oid].get(path)
        if content is None:
            self._fail(404, "EntryNotFound", path, {"X-Repo-Commit": oid})
            return
        self._send(200, content, {"X-Repo-Commit": oid, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'})

    # --- answers -----------------------------------------------------------------------------------------------

    def _token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def _may_write(self) -> bool:
        if self._token() == TOKEN:
            return True
        self._fail(401, "", "Invalid credentials in Authorization header")
        return False

    def _repository(self, name: str) -> Repository | None:
        """As the Hub does, a wrong token is told from none, and a private repository not from a missing one."""
        if self._token() not in (None, TOKEN):
            self._fail(401, "", "Invalid credentials in Authorization header")
            return None
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and self._token() != TOKEN):
            self._fail(401 if self._token() is None else 404, "RepoNotFound", "Repository not found")
            return None
        return repository

    def _revision(self, name: str, revision: str) -> tuple[Repository, str] | None:
        repository = self._repository(name)
        if repository is None:
            return None
        oid = repository.find(revision)
        if oid is None:
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository, oid

    def _fail(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        named = {"X-Error-Code": code} if code else {}
        self._answer(status, {"error": message}, {**named, "X-Error-Message": message, **(headers or {})})

    def _answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _described(content: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"size": len(content), "oid": blob}


# --- what tests of the Hub share ---------------------------------------------------------------------------------


def use_endpoint(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """What HF_ENDPOINT, HF_HUB_CACHE and the others set when the client is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hf_api.api, "endpoint", url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def load(source: Any = REPO, seed: int = 0, **options: Any) -> Any:
    """The adapter of `source` on a fresh base model."""
    return PeftModel.from_pretrained(build_model("llama", seed=seed), source, **options).eval()


def check_same(loaded: Any, model: Any) -> None:
    """The same deltas bit for bit, and the same facts."""
    for name, layer in model.base_model.edit_layers().items():
        other = loaded.base_model.edit_layers()[name]
        assert torch.equal(other.get_delta("default"), layer.get_delta("default"))
    assert loaded.edited_facts() == model.edited_facts()


@pytest.fixture(scope="session")
def model() -> Any:
    """A model with four facts. Not to be changed."""
    config = EditConfig(task_type="CAUSAL_LM", layers_to_transform=[0, 1], num_contexts=1, search_steps=3)
    model: Any = get_peft_model(build_model("llama"), config).eval()
    model.collect_statistics(texts(), word_tokenizer())
    model.edit_facts(town_facts(4), word_tokenizer(), batch_size=2, progress=False)
    return model


@pytest.fixture(scope="session")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its directory. Not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubEndpoint]:
    """The endpoint, in use."""
    with hub_endpoint() as endpoint:
        use_endpoint(monkeypatch, endpoint.url, tmp_path / "cache")
        yield endpoint


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An address at which nobody answers, in use."""
    with socket.socket() as held:  # bound and not listening: refused, and nobody else gets the port meanwhile
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        use_endpoint(monkeypatch, url, tmp_path / "cache")
        yield url
