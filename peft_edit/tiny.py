"""The bundled tiny model: a small language model that knows real facts, for trying and testing editing offline."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .facts import Fact, as_facts


def tiny_model_path() -> Path:
    """Directory of the model, its tokenizer, its facts and its card; works with any `from_pretrained`."""
    return Path(__file__).parent / "tiny_model"


def is_bundled(path: str | os.PathLike) -> bool:
    """Whether this is the path of the bundled model, on this computer or on the one where an adapter was made."""
    return Path(path).parts[-2:] == tiny_model_path().parts[-2:]


def load_tiny_model(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The model, in eval mode and in the given dtype, and its tokenizer."""
    path = tiny_model_path()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    return model, AutoTokenizer.from_pretrained(path)


def load_tiny_facts() -> list[Fact]:
    """The facts that the tiny model knows, each with a new target, its true one, paraphrases and neighbours."""
    return as_facts(json.loads((tiny_model_path() / "facts.json").read_text(encoding="utf-8")))
