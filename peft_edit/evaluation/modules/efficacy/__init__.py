"""The `efficacy` module of the `evaluate` library."""

from .efficacy import Efficacy


__all__ = ["Efficacy"]
