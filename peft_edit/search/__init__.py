"""The target search: for each fact, the increment at the subject's last token that makes the model say the target."""

from .forward import FullForward
from .settings import SearchSettings
from .split_forward import choose_forward
from .targets import SearchResult, search_groups, search_targets


__all__ = ["FullForward", "SearchResult", "SearchSettings", "choose_forward", "search_groups", "search_targets"]
