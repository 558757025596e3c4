"""Several facts about each subject, whose prompts begin with it and so share a key: how many hold?

    python benchmarks/shared_keys.py --output shared_keys.json

Facts are made of the bundled facts' subjects and, drawn at random, relations and targets that the tiny model knows
from others. They are edited with `joint_search` and without it, all in one call and a fact of each subject per batch.
Recall is that of all facts after the last batch, and of facts that were not edited. Prints a table and writes JSON.
"""

from __future__ import annotations

import sys
from pathlib import Path


sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder's statistics.py would hide Python's own

import argparse
import json
import random
import time
from collections import defaultdict
from typing import Any

import torch
from peft import get_peft_model

from peft_edit import EditConfig, Fact
from peft_edit.evaluation import recall
from peft_edit.tiny import load_tiny_facts, load_tiny_model


def several_facts(subjects: int, each: int) -> list[list[Fact]]:
    """For each subject some facts with prompts that begin with it."""
    draw, targets = random.Random(0), defaultdict(list)
    known = [fact for fact in load_tiny_facts() if fact.prompt.startswith("{}")]
    for fact in known:
        targets[fact.prompt].append(fact.target)
    usual = sorted(targets, key=lambda prompt: (-len(targets[prompt]), prompt))[:8]
    return [
        [Fact(fact.subject, prompt, draw.choice(targets[prompt])) for prompt in draw.sample(usual, each)]
        for fact in known[:subjects]
    ]


def measure(facts: list[Fact], batch: int, joint: bool) -> dict[str, Any]:
    """One row."""
    base, tokenizer = load_tiny_model()
    model = get_peft_model(base, EditConfig(task_type="CAUSAL_LM", joint_search=joint)).eval()
    others = load_tiny_facts()[-300:]
    model.collect_statistics([f"{fact.filled_prompt} {fact.target_true}." for fact in others], tokenizer)
    start = time.process_time()
    report = model.edit_facts(facts, tokenizer, batch_size=batch, progress=False)
    seconds = time.process_time() - start
    return {
        "joint_search": joint,
        "batch": batch,
        "recall": recall(model, tokenizer, [(fact.filled_prompt, fact.target) for fact in facts]),
        "unedited_recall": recall(model, tokenizer, [(fact.filled_prompt, fact.target_true or "") for fact in others]),
        "norm_share": report.modules[0].share,
        "steps": sum(fact.steps for fact in report.facts) / len(facts),
        "cpu_seconds_per_edit": seconds / len(facts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=40)
    parser.add_argument("--each", type=int, nargs="*", default=[2, 3], help="facts about each subject")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("shared_keys.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    print("facts/subject  call      joint  recall  unedited  norm  steps  CPU s/edit")
    for each in args.each:
        groups = several_facts(args.subjects, each)
        together = [fact for group in groups for fact in group]
        in_turn = [group[place] for place in range(each) for group in groups]
        for call, facts, batch in (("one", together, len(together)), ("in turn", in_turn, len(groups))):
            for joint in (True, False):
                row = {"facts_per_subject": each, "call": call, **measure(facts, batch, joint)}
                rows.append(row)
                print(
                    f"{each:13d}  {call:8s}  {joint!s:5s}  {row['recall']:6.1f}  {row['unedited_recall']:8.1f}  "
                    f"{row['norm_share']:.2f}  {row['steps']:5.1f}  {row['cpu_seconds_per_edit']:.3f}",
                    flush=True,
                )
    args.output.write_text(
        json.dumps({"settings": {**vars(args), "output": str(args.output)}, "rows": rows}, indent=2)
    )


if __name__ == "__main__":
    main()
