"""Edit adapters on the Hugging Face Hub: pushed with a card, with their facts or without, and fetched to be loaded."""

from __future__ import annotations

import functools
import glob
import json
import os
import tempfile
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from .card import CARD, NORM_PLOT, CardContents, base_id, write_card
from .config import EditConfig
from .hub_errors import hub_errors
from .hub_names import hub_id, public_name
from .memory import MEMORY_FILES
from .model import EditModel
from .statistics import STATISTICS_JSON
from .tiny import is_bundled


def push_edits(
    model: PeftModel,
    repo_id: str,
    *,
    include_facts: bool = True,
    scores: Any = None,
    license: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
    max_shard_size: int | str | None = None,
) -> CommitInfo:
    """Pushes the edit adapters of a model and their card in one commit: what `model.push_to_hub` does.

    What an author has written into the repository's card stays; so do files that are none of the adapter's. A base
    model that was loaded from a directory is named `./` and that directory's name in what is pushed, with a warning:
    the whole path would open for nobody else, and tell of the computer that it is on.

    Args:
        model (`PeftModel`): The model with the edit adapter or adapters.
        repo_id (`str`): The repository, made if it is not there.
        include_facts (`bool`): With False neither facts nor subjects, keys and values are uploaded, and those of an
            earlier commit are deleted (the repository's history keeps them). Such an adapter only infers.
        scores (*optional*): Measured scores for the card; see `CardContents`.
        license (`str`, *optional*): The adapter's licence, by its identifier on the Hub.
        commit_message, commit_description (`str`, *optional*): Of the commit.
        private (`bool`, *optional*): Whether a new repository is private.
        token (`str`, *optional*): By default that of `hf auth login`.
        revision (`str`, *optional*): The branch, made if it is not there.
        create_pr (`bool`): Open a pull request instead of committing to the branch.
        tags (`list[str]`, *optional*): Further tags.
        max_shard_size: Taken and not used, as PEFT does: adapters are one file.

    Returns:
        `CommitInfo`: As `huggingface_hub` gives it.

    Raises:
        ValueError: if the name is none of a repository, or the Hub refuses the content.
        PermissionError: if the Hub refuses the token.
        ConnectionError: if the Hub cannot be reached.
        OSError: if the Hub or the disk fails otherwise. In every case the repository's files are as before.
    """
    _warn_of_local_base(model, repo_id)
    api = HfApi(token=token)
    with hub_errors(repo_id, api.endpoint), tempfile.TemporaryDirectory() as folder:
        with _memory_withheld(_edit_configs(model) if not include_facts else ()):
            model.save_pretrained(folder)
        _take_out_local_paths(model, Path(folder))
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        _fetch_card(api, repo_id, revision, Path(folder))
        contents = CardContents(
            name=repo_id,
            include_facts=include_facts,
            scores=scores,
            license=license,
            tags=tuple(tags or ()),
            plot=True,
        )
        write_card(model, folder, contents)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload edits",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            delete_patterns=_outdated(model, Path(folder)) or None,
        )


def fetch_edits(
    repo_id: str | os.PathLike,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: bool | str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Fetches an adapter's files, safetensors and JSON alone, for `PeftModel.from_pretrained(base, ...)`.

    `from_pretrained` takes a repository's name too; this says more clearly what is wrong, and reads the cache without
    any connection.

    Args:
        repo_id (`str`): The repository; a local directory is returned as it is.
        revision (`str`, *optional*): Branch, tag or commit.
        subfolder (`str`, *optional*): Where the adapter is in the repository.
        token (`str`, *optional*): By default that of `hf auth login`.
        cache_dir (`str`, *optional*): By default the Hub's cache.
        local_files_only (`bool`): Use the cache alone.

    Returns:
        `Path`: The directory in the cache.

    Raises:
        FileNotFoundError: if repository, revision or files are not there.
        PermissionError: if the Hub refuses the token.
        ConnectionError: if the Hub cannot be reached and the cache does not have the adapter.
        ValueError: if the name is none of a repository.
    """
    folder = Path(repo_id)
    if not folder.is_dir():
        prefix = f"{glob.escape(subfolder)}/" if subfolder else ""
        files = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, *MEMORY_FILES)
        with hub_errors(str(repo_id), HfApi().endpoint, revision):
            fetched = snapshot_download(
                str(repo_id),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=[prefix + name for name in files],
            )
        folder = Path(fetched)
    folder = folder / (subfolder or "")
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"'{repo_id}' holds no adapter{f' in {subfolder!r}' if subfolder else ''} (there is no {name}): "
                "name the repository and subfolder that an edit adapter was pushed to."
            )
    return folder


def extend_peft_model() -> None:
    """Has `PeftModel` write the card of edits when it saves or pushes edit adapters; other models are not touched.

    PEFT has no hook for either: its `push_to_hub` puts an empty template over the card that saving has written.
    Calling this again changes nothing.
    """
    plain_push, plain_card = PeftModel.push_to_hub, PeftModel.create_or_update_model_card
    if hasattr(plain_card, "of_edits"):
        return

    @functools.wraps(plain_push)
    def push_to_hub(self: PeftModel, repo_id: str, **options: Any) -> Any:
        if isinstance(self.base_model, EditModel):
            return push_edits(self, repo_id, **options)
        return plain_push(self, repo_id, **options)

    @functools.wraps(plain_card)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
        if isinstance(self.base_model, EditModel):
            write_card(self, output_dir)
        else:
            plain_card(self, output_dir)

    create_or_update_model_card.of_edits = True  # type: ignore[attr-defined]
    patched: Any = PeftModel
    patched.push_to_hub = push_to_hub
    patched.create_or_update_model_card = create_or_update_model_card


def _edit_configs(model: PeftModel) -> list[EditConfig]:
    return [config for config in model.peft_config.values() if isinstance(config, EditConfig)]


@contextmanager
def _memory_withheld(configs: Collection[EditConfig]) -> Iterator[None]:
    """For the time being the adapters are saved without memory."""
    before = [config.save_memory for config in configs]
    for config in configs:
        config.save_memory = False
    try:
        yield
    finally:
        for config, save_memory in zip(configs, before):
            config.save_memory = save_memory


def _warn_of_local_base(model: PeftModel, repo_id: str) -> None:
    tuner: Any = model.base_model
    paths = [config.base_model_name_or_path for config in _edit_configs(model) if config.base_model_name_or_path]
    if not paths or base_id(tuner) or is_bundled(paths[0]):
        return
    adapter = next(iter(model.peft_config))
    warnings.warn(
        f"The base model of these edits was loaded from a directory of this computer, '{paths[0]}': '{repo_id}' "
        f"names it '{public_name(paths[0])}', and others cannot load the edits without being given that model. If it "
        f"is on the Hub, load it by its name there, or set model.peft_config['{adapter}'].base_model_name_or_path to "
        "that name, and push again.",
        stacklevel=3,
    )


def _take_out_local_paths(model: PeftModel, folder: Path) -> None:
    """In saved files, puts the base model's name on the Hub, or what may be public of a path, in place of the path."""
    tuner: Any = model.base_model
    for path in [*folder.rglob(CONFIG_NAME), *folder.rglob(STATISTICS_JSON)]:
        document = json.loads(path.read_text(encoding="utf-8"))
        if path.name == CONFIG_NAME:
            part, field = document, "base_model_name_or_path"
        else:
            part, field = document["fingerprint"], "name_or_path"
        name = part.get(field)
        if name and not hub_id(name):
            part[field] = base_id(tuner) or public_name(name)
            path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _fetch_card(api: HfApi, repo_id: str, revision: str | None, folder: Path) -> None:
    """Puts the repository's card into the folder, in place of the one that saving has made."""
    (folder / CARD).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as cache:
        try:
            path = api.hf_hub_download(repo_id, CARD, revision=revision, cache_dir=cache)
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):
                raise
            return
        (folder / CARD).write_bytes(Path(path).read_bytes())


def _outdated(model: PeftModel, folder: Path) -> list[str]:
    """Patterns of files that an earlier push may have left, and that the adapters do not have any more."""
    places = ["" if name == "default" else f"{name}/" for name in model.peft_config]
    names = [place + name for place in places for name in (*MEMORY_FILES, NORM_PLOT)]
    return [glob.escape(name) for name in names if not (folder / name).exists()]
