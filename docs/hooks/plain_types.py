"""A griffe extension for the API pages: types in docstrings, written as `int`, *optional*, without their markup."""

from __future__ import annotations

import re
from typing import Any

import griffe


_ARGUMENT = re.compile(r"^(?P<name> +\w+ )\((?P<type>`[^\n]*?)\):", re.MULTILINE)
_RETURNED = re.compile(r"^(?P<head> *Returns:\n +)`(?P<type>[^`\n]+)`(?=:|\n|\Z)", re.MULTILINE)


class PlainTypes(griffe.Extension):
    """Takes backticks and asterisks out of types, so that they are parsed, shown and linked as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = _ARGUMENT.sub(lambda found: f"{found['name']}({plain(found['type'])}):", obj.docstring.value)
            obj.docstring.value = _RETURNED.sub(r"\g<head>\g<type>", text)


def plain(text: str) -> str:
    """The type without its markup."""
    return text.replace("`", "").replace("*", "")
