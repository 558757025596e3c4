"""Makes PEFT know the type "EDIT"."""

from __future__ import annotations

import enum
from typing import Any

import peft.mapping
from peft.utils.peft_types import PeftType


class _EditPeftType(str, enum.Enum):
    """PEFT's own enum is closed; this one behaves like a member of it (a string with a `.value`)."""

    EDIT = "EDIT"


EDIT: Any = getattr(PeftType, "EDIT", _EditPeftType.EDIT)


def register(config: type, model: type, prefix: str) -> None:
    """Writes config class, tuner class and parameter prefix into PEFT's mappings; calling it again changes nothing."""
    peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[EDIT] = config
    peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[EDIT] = model
    peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[EDIT] = prefix
