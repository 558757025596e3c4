"""Try it: edits ten facts into the bundled model, shows before and after, undoes one."""

from __future__ import annotations

import argparse
import time
from typing import Any

from peft import get_peft_model

from ...config import EditConfig
from ...evaluation import recall
from ...tiny import load_tiny_facts, load_tiny_model
from ..answers import complete
from ..arguments import directory
from ..errors import CliError
from ..output import Output, Result, Table, shorten
from ..saving import check_writable
from ..write import save_adapter


FACTS, KEPT, TEXTS = 10, 100, 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `peft-edit demo`."""
    parser.add_argument("-o", "--output", type=directory, help="keep the adapter in this directory")


def run(args: argparse.Namespace, out: Output) -> Result:
    """Edits, compares, undoes."""
    if args.output is not None:
        if (args.output / "adapter_config.json").exists():
            raise CliError(f"'{args.output}' holds an adapter: choose another --output.")
        check_writable(args.output)
    start = time.perf_counter()
    base, tokenizer = load_tiny_model()
    known = load_tiny_facts()
    facts, kept = known[:FACTS], known[FACTS:]
    others = [(fact.filled_prompt, str(fact.target_true)) for fact in kept[:KEPT]]
    model: Any = get_peft_model(base, EditConfig(task_type="CAUSAL_LM")).eval()

    def answers() -> list[str]:
        return [complete(model, tokenizer, fact.filled_prompt, tokens=4) for fact in facts]

    before, recalled = answers(), recall(model, tokenizer, others)
    out.note(f"Collecting key statistics, then editing {FACTS} facts of the bundled model.")
    model.collect_statistics((f"{fact.filled_prompt} {fact.target_true}." for fact in kept[:TEXTS]), tokenizer)
    report = model.edit_facts(facts, tokenizer, progress=out.progress)
    after, recalled_after = answers(), recall(model, tokenizer, others)
    (removed,) = model.remove_facts(facts[0])
    undone = complete(model, tokenizer, facts[0].filled_prompt, tokens=4)
    if args.output is not None:
        save_adapter(model, args.output)
    rows = [
        {"id": fact.fact_id, "prompt": fact.filled_prompt, "target": fact.target, "before": old, "after": new}
        for fact, old, new in zip(facts, before, after)
    ]
    document = {
        "facts": rows,
        "recalled": report.recalled,
        "unedited_recall_before": recalled,
        "unedited_recall_after": recalled_after,
        "removed": {"id": removed.id, "prompt": removed.filled_prompt, "after": undone},
        "facts_held": len(model.edited_facts()),
        "adapter": None if args.output is None else str(args.output),
        "seconds": time.perf_counter() - start,
    }
    return Result(document, _blocks(document))


def _blocks(document: dict[str, Any]) -> list[str | Table]:
    removed = document["removed"]
    table = Table(
        ("prompt", "before", "wanted", "after"),
        [
            (shorten(row["prompt"], 56), shorten(row["before"], 20), row["target"], shorten(row["after"], 20))
            for row in document["facts"]
        ],
    )
    closing = [
        f"{document['recalled']} of {len(document['facts'])} edits are recalled. Of {KEPT} facts that were not "
        f"edited, {document['unedited_recall_before']:.0f} % were known before and "
        f"{document['unedited_recall_after']:.0f} % are now.",
        f"Undone: {removed['prompt']} … {removed['after']}. The adapter holds {document['facts_held']} facts.",
        f"{document['seconds']:.0f} s"
        + (f"; wrote '{document['adapter']}'." if document["adapter"] else "; nothing was written to disk."),
    ]
    return [table, "\n".join(closing)]
