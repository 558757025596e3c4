"""Score an adapter's edits beside the unedited base: ES, PS, NS, S."""

from __future__ import annotations

import argparse
from typing import Any

from ...evaluation import compare_with_base
from ...facts import Fact
from ..adapters import AdapterFiles
from ..answers import with_true_targets
from ..arguments import add_model_options, add_source_options, positive
from ..models import adapter_folder, load_adapter
from ..output import Output, Result, Table
from ..sources import read_facts


NAMES = (("score", "S"), ("efficacy", "ES"), ("paraphrase", "PS"), ("neighborhood", "NS"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `peft-edit eval`."""
    parser.add_argument("adapter", help="the adapter: directory or Hub id")
    parser.add_argument("facts", nargs="?", help="facts to score; by default those that the adapter holds")
    parser.add_argument("--batch-size", type=positive, default=128, metavar="N", help="prompts per forward pass")
    parser.add_argument("--per-fact", action="store_true", help="with --json: the scores of every fact too")
    add_source_options(parser)
    add_model_options(parser)


def run(args: argparse.Namespace, out: Output) -> Result:
    """Scores the facts under the adapter and without it."""
    folder = adapter_folder(args.adapter)
    facts = _facts(args, folder)
    model, tokenizer = load_adapter(folder, args)
    facts, given = with_true_targets(model, tokenizer, facts)
    if given:
        out.note(f"{given} fact(s) have no target_true: the base model's own answer stands in for it.")
    out.note(f"Scoring {len(facts)} facts with the adapter and without.")
    scores = compare_with_base(model, tokenizer, facts, batch_size=args.batch_size)
    document: dict[str, Any] = {
        "adapter": args.adapter,
        "facts": len(facts),
        "true_targets_from_base": given,
        **scores.to_dict(per_fact=args.per_fact),
    }
    return Result(document, [_table(scores), _greedy(scores)])


def _facts(args: argparse.Namespace, folder: Any) -> list[Fact]:
    if args.facts is not None:
        return read_facts(args.facts, args.subset, args.split, args.data_revision, args.limit).sound()
    records = AdapterFiles.read(folder).held()[: args.limit]
    return [Fact(record.subject, record.prompt, record.target, record.target_true) for record in records]


def _table(scores: Any) -> Table:
    differences = scores.differences()
    rows = []
    for name, letters in NAMES:
        cells = (scores.edited.estimate(name), scores.base.estimate(name), differences[name])
        rows.append((letters, *("-" if cell.value != cell.value else str(cell) for cell in cells)))
    return Table((f"{scores.edited.facts} facts", "edited", "base", "difference"), rows)


def _greedy(scores: Any) -> str:
    parts = []
    for name, letters in NAMES[1:]:
        edited, base = getattr(scores.edited, f"{name}_accuracy"), getattr(scores.base, f"{name}_accuracy")
        if edited == edited:
            parts.append(f"{letters} {edited:.1f} (base {base:.1f})")
    return "Greedy answers that are the wanted ones, in percent: " + ", ".join(parts) + "."
