"""The `paraphrase` module of the `evaluate` library."""

from .paraphrase import Paraphrase


__all__ = ["Paraphrase"]
