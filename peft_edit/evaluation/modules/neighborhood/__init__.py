"""The `neighborhood` module of the `evaluate` library."""

from .neighborhood import Neighborhood


__all__ = ["Neighborhood"]
