"""Editing methods over the same stream of facts, side by side: a table, figures and a report as one HTML page.

    python examples/lifelong_comparison.py --edits 200                    # a look
    python examples/lifelong_comparison.py --workers 2                    # 1,000 edits × 6 methods
    python examples/lifelong_comparison.py --methods memit memit+mpes+norm alphaedit+lti encore+norm_budget=1.0

Runs offline on a CPU with the bundled tiny model. Stop it at any time; the same command goes on where it was. Writes
to `comparison_output/`; open `report.html` there. With `--model` it edits another causal language model.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_edit import Fact, as_facts
from peft_edit.evaluation.comparison import compare_methods, summary
from peft_edit.facts import PLACEHOLDER, fill
from peft_edit.tiny import load_tiny_facts, load_tiny_model


METHODS = ("memit", "memit+mpes", "memit+norm", "encore", "alphaedit", "emmet")


def load_model(name: str, device: str) -> tuple[Any, Any]:
    """A model in eval mode, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").to(device).eval()
    return model, AutoTokenizer.from_pretrained(name)


def true_sentences(facts: Sequence[Fact]) -> Iterator[str]:
    """What the unedited model says about facts and their neighbours: ordinary text of the tiny model's world."""
    for fact in facts:
        phrasings = (fill(text, fact.subject) if PLACEHOLDER in text else text for text in fact.paraphrases)
        for prompt in (fact.filled_prompt, *phrasings, *fact.neighborhood):
            yield f"{prompt} {fact.target_true}."


def read_facts(path: Path | None) -> list[Fact]:
    """The bundled facts, then those of a file that are about something else."""
    facts = load_tiny_facts()
    if path is not None:
        known = {fact.key for fact in facts}
        facts += [fact for fact in as_facts(path) if fact.key not in known]
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD[+REGULARISER…]")
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--score-every", type=int, help="edits between two scoring points; by default a fifth of all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--unedited", type=int, default=100, help="facts that are held back, to see what is kept")
    parser.add_argument(
        "--facts", type=Path, help="more facts with true answers: JSON or JSONL, such as CounterFact's"
    )
    parser.add_argument("--model", help="a name on the Hub or a folder, instead of the bundled model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="for --model")
    parser.add_argument("--text", type=Path, help="ordinary text, for the perplexity; by default held-back facts")
    parser.add_argument(
        "--statistics-text", type=Path, help="ordinary text for key statistics; by default other facts"
    )
    parser.add_argument("--downstream", type=Path, help="a folder with sst2.jsonl, mrpc.jsonl, …")
    parser.add_argument("--downstream-limit", type=int, default=50, help="examples per task")
    parser.add_argument("--shots", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1, help="methods that run at the same time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--output", type=Path, default=Path("comparison_output"))
    args = parser.parse_args()

    facts = read_facts(args.facts)
    known = len(load_tiny_facts())
    # Held back are facts that the tiny model knows, as only those can be forgotten.
    unedited = facts[known - args.unedited : known]
    editable = facts[: known - args.unedited] + facts[known:]
    if args.edits > len(editable):
        parser.error(f"{len(editable)} facts can be edited, fewer than {args.edits}: give more with --facts.")
    spare = editable[args.edits :] or unedited
    if args.statistics_text is None:
        statistics = list(true_sentences(spare))
    else:
        statistics = args.statistics_text.read_text(encoding="utf-8").splitlines()
    text = list(true_sentences(unedited)) if args.text is None else args.text.read_text(encoding="utf-8")
    batches = -(-args.edits // args.batch_size)
    comparison = compare_methods(
        partial(load_model, args.model, args.device) if args.model else load_tiny_model,
        editable,
        args.methods,
        output_dir=args.output,
        unedited=unedited,
        edits=args.edits,
        batch_size=args.batch_size,
        seeds=args.seeds,
        text=text,
        statistics=statistics,
        downstream=args.downstream,
        downstream_shots=args.shots,
        downstream_limit=args.downstream_limit,
        score_every=args.score_every or args.batch_size * -(-batches // 5),
        workers=args.workers,
        threads=args.threads,
    )
    print(f"\n{summary(comparison)}\n")
    best = comparison.best
    for label, difference in comparison.differences().items():
        print(f"{best} minus {label}: S {difference['score']}, recall {difference['recall']}")
    print(f"wrote {args.output}/report.html")


if __name__ == "__main__":
    main()
