"""Scores of an edited model: of the edits, what must stay, what follows from them, and what it can do besides."""

from .cases import KINDS, STAYING_KINDS, Case, CaseError, Probe, case_to_dict, reversal_probe
from .comparison import Comparison, Entrant, compare_methods, parse_entrant
from .datasets import (
    DATASETS,
    load_cases,
    load_counterfact,
    load_jsonl,
    load_knowedit,
    load_mquake,
    load_multi_counterfact,
    load_ripple_edits,
    load_zsre,
)
from .downstream import DownstreamScores, TaskScores, downstream_scores
from .downstream_tasks import DownstreamTask, Example, load_task
from .fluency import FluencyScores, TfIdf, fluency_scores, ngram_entropy, write_texts
from .generation import (
    QA_TEMPLATE,
    Answer,
    GenerationScores,
    contains_answer,
    generate_answers,
    generate_until_stop,
    generation_scores,
    normalise_answer,
)
from .harness import run_harness
from .modules import load_module
from .probing import (
    OverfitScore,
    OverfitScores,
    ProbeScore,
    ProbeScores,
    distraction_prompts,
    negation_probe,
    score_overfitting,
    score_probes,
)
from .retention import Retention, perplexity, retention
from .scores import ComparedScores, EditScores, compare_with_base, recall, score_edits, unedited_base
from .token_scores import TokenScores, score_tokens, token_accuracy, token_agreement


__all__ = [
    "DATASETS",
    "KINDS",
    "QA_TEMPLATE",
    "STAYING_KINDS",
    "Answer",
    "Case",
    "CaseError",
    "ComparedScores",
    "Comparison",
    "DownstreamScores",
    "DownstreamTask",
    "EditScores",
    "Entrant",
    "Example",
    "FluencyScores",
    "GenerationScores",
    "OverfitScore",
    "OverfitScores",
    "Probe",
    "ProbeScore",
    "ProbeScores",
    "Retention",
    "TaskScores",
    "TfIdf",
    "TokenScores",
    "case_to_dict",
    "compare_methods",
    "compare_with_base",
    "contains_answer",
    "distraction_prompts",
    "downstream_scores",
    "fluency_scores",
    "generate_answers",
    "generate_until_stop",
    "generation_scores",
    "load_cases",
    "load_counterfact",
    "load_jsonl",
    "load_knowedit",
    "load_module",
    "load_mquake",
    "load_multi_counterfact",
    "load_ripple_edits",
    "load_task",
    "load_zsre",
    "negation_probe",
    "ngram_entropy",
    "normalise_answer",
    "parse_entrant",
    "perplexity",
    "recall",
    "retention",
    "reversal_probe",
    "run_harness",
    "score_edits",
    "score_overfitting",
    "score_probes",
    "score_tokens",
    "token_accuracy",
    "token_agreement",
    "unedited_base",
    "write_texts",
]
