"""Quality of the default settings against plain MEMIT on a long stream of edits into the tiny model.

    python benchmarks/defaults.py --facts 717 --batch-size 10 --output defaults.json

717 facts are 0.7 of the edited module's input width. Every setting sees the same facts, statistics and seed. Prints a
table and writes JSON.
"""

from __future__ import annotations

import sys
from pathlib import Path


sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder's statistics.py would hide Python's own

import argparse
import json
import time

import torch
from peft import get_peft_model

from peft_edit import EditConfig
from peft_edit.evaluation import recall, score_edits
from peft_edit.tiny import load_tiny_facts, load_tiny_model


PLAIN = {"early_stopping": "none", "norm_penalty": 0.0, "search_optimizer": "adam"}
SETTINGS = {
    "default": {},
    "default, no refinement": {"refinements": 0},
    "default, every fact as fully as it goes": {"sufficient_probability": 1.0},
    "default, sufficient_probability 0.6": {"sufficient_probability": 0.6},
    "default, sufficient_probability 0.8": {"sufficient_probability": 0.8},
    "plain MEMIT, λp auto": PLAIN,
    "plain MEMIT, λp 41": {**PLAIN, "preservation_weight": 41.0},
}


def loss(model, tokenizer, texts: list[str]) -> float:
    """Mean negative log-likelihood per token, in nats."""
    total, count = 0.0, 0
    for start in range(0, len(texts), 50):
        encoded = tokenizer(texts[start : start + 50], return_tensors="pt", padding=True)
        labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)[:, 1:]
        with torch.no_grad():
            logits = model(**encoded).logits[:, :-1]
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        count += int((labels >= 0).sum())
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=int, default=717)
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("defaults.json"))
    parser.add_argument("--only", nargs="*", choices=list(SETTINGS), help="settings to run; all by default")
    args = parser.parse_args()

    known = load_tiny_facts()
    facts, kept = known[: args.facts], known[args.facts :]
    texts = [f"{fact.filled_prompt} {fact.target_true}." for fact in kept]
    asked = [(fact.filled_prompt, fact.target_true) for fact in kept[:400]]
    rows = []
    for name in args.only or SETTINGS:
        base, tokenizer = load_tiny_model()
        model = get_peft_model(base, EditConfig(task_type="CAUSAL_LM", **SETTINGS[name])).eval()
        model.collect_statistics(texts, tokenizer)
        start = time.perf_counter()
        report = model.edit_facts(facts, tokenizer, batch_size=args.batch_size, progress=False)
        seconds = time.perf_counter() - start
        scores = score_edits(model, tokenizer, facts)
        row = {
            "setting": name,
            **scores.to_dict(),
            "unedited_recall": recall(model, tokenizer, asked),
            "unedited_loss": loss(model, tokenizer, texts[:400]),
            "norm_share": max(module.share for module in report.modules),
            "mean_steps": sum(fact.steps for fact in report.facts) / len(report.facts),
            "seconds": seconds,
        }
        rows.append(row)
        print(
            f"{name:24s} {scores}  unedited {row['unedited_recall']:.1f} %, loss {row['unedited_loss']:.2f}  "
            f"||Δ|| {100 * row['norm_share']:.0f} %  {row['mean_steps']:.1f} steps  {seconds:.0f} s",
            flush=True,
        )
    args.output.write_text(json.dumps(rows, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
