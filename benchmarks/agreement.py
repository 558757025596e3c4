"""Do the methods, as settings of peft-edit, do what their published procedures do? Both edit the same stream.

    python benchmarks/agreement.py --output agreement.json

`--facts` CounterFact facts in batches into the bundled tiny model, twice for each method: with `edit_facts`, and as in
`published.py`: one fact at a time, the paper's equation solved anew, weights changed in place. Facts, order, contexts,
key statistics and penalties are the same. Prints scores after the last batch, and their differences with paired 95 %
intervals; writes JSON after each method.
"""

from __future__ import annotations

import sys
from pathlib import Path


sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder's statistics.py would hide Python's own

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import torch
from peft import get_peft_model

from benchmarks import published
from peft_edit import EditConfig, Fact
from peft_edit.architectures import find_blocks
from peft_edit.evaluation import EditScores, recall, score_edits
from peft_edit.preparation import search_settings
from peft_edit.prompts import PromptEncoder
from peft_edit.tiny import load_tiny_facts, load_tiny_model


FITTED = 41.0  # λp that fits this model, d_in / 25
KINDS = ("efficacy", "paraphrase", "neighborhood", "score")
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "memit": ("memit-forgetful", {"preservation_weight": FITTED}),
    "memit, past keys": ("memit", {"preservation_weight": FITTED}),
    "alphaedit": ("alphaedit", {}),
    "emmet": ("emmet", {}),
    "encore": (
        "encore",
        {"preservation_weight": FITTED, "search_optimizer": "adam", "search_patience": 0, "refinements": 0},
    ),
}


def published_rule(name: str, config: EditConfig, penalties: dict[str, float]) -> published.Rule:
    """The method's equation with the numbers that the adapter has worked with."""
    moments = config.memory.statistics.second_moments
    if name == "alphaedit":
        return published.alphaedit(moments, config.update_rule().threshold, penalties["norm"])
    if name == "emmet":
        return published.emmet(moments)
    if name == "encore":
        return published.norm_constrained(moments, penalties["preservation"], penalties["norm"])
    return published.memit(moments, penalties["preservation"], past=name == "memit, past keys")


def with_adapter(
    method: str, settings: dict[str, Any], facts: Sequence[Fact], texts: Sequence[str], batch: int
) -> tuple[Any, Any]:
    """The model with the facts, and the report of its last batch."""
    base, tokenizer = load_tiny_model()
    model = get_peft_model(base, EditConfig.from_method(method, task_type="CAUSAL_LM", **settings)).eval()
    model.collect_statistics(texts, tokenizer)
    return model, model.edit_facts(facts, tokenizer, batch_size=batch, progress=False)


def in_place(
    rule: published.Rule, config: EditConfig, names: Sequence[str], facts: Sequence[Fact], batch: int
) -> tuple[Any, float]:
    """The model edited the published way, and ||Δ||_F / ||W0||_F of the module that has changed most."""
    base, tokenizer = load_tiny_model()
    modules = {name: base.get_submodule(name) for name in names}
    before = {name: module.weight.detach().clone() for name, module in modules.items()}
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    blocks = list(find_blocks(base)[1])
    place = max(int(part) for name in names for part in name.split(".") if part.isdigit())
    encoder = PromptEncoder(tokenizer, base.get_input_embeddings().num_embeddings)
    prompts = [encoder.encode_fact(fact, config.memory.contexts) for fact in facts]
    settings = search_settings(config, place, len(blocks), 0)
    last = list(modules.values())[-1]
    for start in range(0, len(prompts), batch):
        chosen = prompts[start : start + batch]
        targets = [published.search_one(base, blocks[place], last, fact, settings)[1] for fact in chosen]
        published.write_batch(base, blocks[place], modules, chosen, torch.stack(targets), rule)
    return base, max(
        float((module.weight - before[name]).norm() / before[name].norm()) for name, module in modules.items()
    )


def row_of(way: str, scores: EditScores, share: float, kept: float, seconds: float) -> dict[str, Any]:
    """What is compared."""
    values = {kind: float(getattr(scores, kind)) for kind in KINDS}
    return {"way": way, **values, "unedited_recall": kept, "norm_share": share, "seconds": seconds}


def measure(name: str, facts: list[Fact], kept: Sequence[Fact], batch: int) -> list[dict[str, Any]]:
    """Two rows."""
    method, settings = METHODS[name]
    texts = [f"{fact.filled_prompt} {fact.target_true}." for fact in kept]
    asked = [(fact.filled_prompt, fact.target_true or "") for fact in kept[-200:]]
    _, tokenizer = load_tiny_model()
    start = time.perf_counter()
    model, report = with_adapter(method, settings, facts, texts, batch)
    seconds = time.perf_counter() - start
    config = model.peft_config["default"]
    penalties = {"preservation": report.modules[0].preservation_weight, "norm": report.modules[0].norm_penalty}
    ours = score_edits(model, tokenizer, facts)
    share = max(module.share for module in report.modules)
    rows = [row_of("peft-edit", ours, share, recall(model, tokenizer, asked), seconds)]
    start = time.perf_counter()
    other, share = in_place(published_rule(name, config, penalties), config, list(model.edit_layers()), facts, batch)
    seconds = time.perf_counter() - start
    theirs = score_edits(other, tokenizer, facts)
    rows.append(row_of("published", theirs, share, recall(other, tokenizer, asked), seconds))
    differences = {kind: list(estimate) for kind, estimate in ours.minus(theirs).items() if kind in KINDS}
    return [{"method": name, **row, "peft-edit minus published": differences} for row in rows]


def line(row: dict[str, Any]) -> str:
    """The row as text."""
    scores = "  ".join(f"{row[kind]:5.1f}" for kind in KINDS)
    return (
        f"{row['method']:17s} {row['way']:10s} {scores}  recall {row['unedited_recall']:5.1f}  "
        f"norm {row['norm_share']:.3f}  {row['seconds']:6.1f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--facts", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("agreement.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    known = load_tiny_facts()
    rows: list[dict[str, Any]] = []
    print(f"{'':28s}    ES     PS     NS      S")
    for name in args.methods:
        for row in measure(name, known[: args.facts], known[args.facts :], args.batch_size):
            rows.append(row)
            print(line(row), flush=True)
        differences = rows[-1]["peft-edit minus published"]
        cells = (f"{value:+.1f} [{low:.1f}, {high:.1f}]" for value, low, high in differences.values())
        print(f"{'':17s} difference {'  '.join(cells)}", flush=True)
        args.output.write_text(json.dumps({"settings": {**vars(args), "output": str(args.output)}, "rows": rows}))


if __name__ == "__main__":
    main()
