"""The scores as modules of the `evaluate` library: `evaluate.load(module_path("efficacy"))`, or `load_module`.

They take log-probabilities or tokens, run no model, and need no network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


MODULES = ("edit_score", "efficacy", "neighborhood", "paraphrase", "token_accuracy")


def module_path(name: str) -> str:
    """Folder of a module, for `evaluate.load`.

    Args:
        name (`str`): One of `MODULES`.

    Raises:
        ValueError: if there is no such module.
    """
    if name not in MODULES:
        raise ValueError(f"There is no evaluation module {name!r}; there are {', '.join(MODULES)}.")
    return str(Path(__file__).parent / name)


def load_module(name: str, **settings: Any) -> Any:
    """A module of the `evaluate` library, from this package.

    Args:
        name (`str`): One of `MODULES`.
        settings: Passed on to `evaluate.load`, such as `cache_dir` or `keep_in_memory`.

    Returns:
        `evaluate.Metric`: with `add_batch` and `compute`.

    Raises:
        ImportError: if `evaluate` is not installed.
        ValueError: if there is no such module.
    """
    path = module_path(name)
    try:
        import evaluate
    except ImportError as error:
        raise ImportError("load_module needs the evaluate library: pip install 'peft-edit[eval]'.") from error
    return evaluate.load(path, **settings)
