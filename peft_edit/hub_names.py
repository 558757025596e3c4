"""Names of models: which of them the Hub could have, and what may be published of those that it could not."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .tiny import is_bundled


def hub_id(name: str | None) -> str | None:
    """The name, if it can be one of the Hub's and is none of a local directory."""
    if not name or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def public_name(name: str) -> str:
    """What may be published of a base model's name: all of a name on the Hub; of a path `./` and the last directory.

    The latter is no name that the Hub could have. The bundled model keeps the two directories by which the command
    line knows it on any computer.
    """
    if hub_id(name):
        return name
    path = Path(name).absolute()
    return "/".join([".", *path.parts[-2 if is_bundled(path) else -1 :]])
