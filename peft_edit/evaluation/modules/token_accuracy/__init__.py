"""The `token_accuracy` module of the `evaluate` library."""

from .token_accuracy import TokenAccuracy


__all__ = ["TokenAccuracy"]
