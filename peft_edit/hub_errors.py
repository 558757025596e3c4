"""What goes wrong with the Hugging Face Hub, in one sentence each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


@contextmanager
def hub_errors(repo_id: str, endpoint: str, revision: str | None = None) -> Iterator[None]:
    """Raises what the Hub's client raises as an error of one sentence, of the kind that Python has for it."""
    try:
        yield
    except Exception as error:
        clear = explained(error, repo_id, endpoint, revision)
        if clear is None:
            raise
        raise clear from error


def explained(error: BaseException, repo_id: str, endpoint: str, revision: str | None = None) -> Exception | None:
    """The error in one sentence; None for those that are not the Hub's, the connection's or the disk's."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # an upload's thread
        return explained(error.__cause__, repo_id, endpoint, revision)
    if isinstance(error, HFValidationError):
        return ValueError(f"{repo_id!r} is neither a directory nor a repository's name, such as 'user/edits'.")
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, (HTTPError, HfHubHTTPError)):
        return explained(error.__cause__, repo_id, endpoint, revision)
    if isinstance(error, LocalEntryNotFoundError):
        return FileNotFoundError(
            f"'{repo_id}'{f' at revision {revision!r}' if revision else ''} is not in the cache, and the Hub is not "
            "asked (local_files_only, or HF_HUB_OFFLINE is set): fetch it online once."
        )
    if isinstance(error, OfflineModeIsEnabled):
        return ConnectionError(f"The Hub at {endpoint} is not asked while HF_HUB_OFFLINE is set: unset it.")
    if isinstance(error, HfHubHTTPError):
        return _explained_answer(error, repo_id, endpoint, revision)
    if isinstance(error, HTTPError):
        reason = " ".join(str(error).split()) or type(error).__name__
        return ConnectionError(f"The Hub at {endpoint} cannot be reached ({reason}): check the connection.")
    if isinstance(error, OSError) and error.strerror and error.filename:
        return type(error)(
            f"'{error.filename}' cannot be written or read ({error.strerror}): choose a directory that you can write "
            "to (cache_dir, or TMPDIR for a push), with room on its disk."
        )
    return None


def _explained_answer(error: HfHubHTTPError, repo_id: str, endpoint: str, revision: str | None) -> Exception:
    status = error.response.status_code
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(f"'{repo_id}' has no revision {revision!r}: name a branch, tag or commit of it.")
    if isinstance(error, GatedRepoError):
        return PermissionError(f"'{repo_id}' is gated: ask for access on {endpoint}/{repo_id}, and give your token.")
    if isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError(
            f"There is no repository '{repo_id}' at {endpoint}, or it is private and the token does not open it."
        )
    if isinstance(error, EntryNotFoundError):
        file = error.response.url.path.rpartition("/")[2]
        return FileNotFoundError(f"'{repo_id}' does not hold '{file}': name the repository that it was pushed to.")
    if status in (401, 403):
        return PermissionError(
            f"{endpoint} refuses access to '{repo_id}' ({status}): log in with `hf auth login`, or pass a token that "
            "may do this."
        )
    said = f": {' '.join(error.server_message.split())}" if error.server_message else ""
    kind = ValueError if isinstance(error, BadRequestError) else OSError
    return kind(f"{endpoint} answers {status} for '{repo_id}'{said}; nothing was committed.")
