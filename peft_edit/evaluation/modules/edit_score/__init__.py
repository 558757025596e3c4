"""The `edit_score` module of the `evaluate` library."""

from .edit_score import EditScore


__all__ = ["EditScore"]
