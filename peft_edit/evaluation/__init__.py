"""Scores of an edited model."""

from .scores import EditScores, recall, score_edits


__all__ = ["EditScores", "recall", "score_edits"]
