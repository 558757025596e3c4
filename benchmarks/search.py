"""Edits per second, all in: peft-edit against the procedure of the published research scripts.

    python benchmarks/search.py --shape gpt2-small --facts 32 --output search.json

Same model (random weights, or the bundled tiny one), facts, contexts, objective, threads and dtype on both sides; key
statistics are given. `adam` is the published optimiser and does the same steps; `normalized` is the default. A random
model hardly ever converges: with Adam it takes all steps there, also under MPES. `--early-stopping none` runs a fixed
number of steps. `--published mpes none` runs the published procedure with its early stopping and without (that is
MEMIT) and gives the ratio to both. Prints a table and writes JSON.
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

from benchmarks.published import memit, search_one, write_batch
from benchmarks.shapes import SHAPES, build, facts_and_tokenizer
from peft_edit import EditConfig
from peft_edit.architectures import find_blocks
from peft_edit.fingerprint import model_fingerprint
from peft_edit.prompts import PromptEncoder
from peft_edit.search import SearchSettings
from peft_edit.statistics import KeyStatistics
from peft_edit.tiny import load_tiny_facts, load_tiny_model


def plain_statistics(model, layers) -> KeyStatistics:
    """Second moments of about the right size: this benchmark asks for time, not for locality."""
    moments = {name: 0.1 * torch.eye(layer.in_features) for name, layer in layers.items()}
    return KeyStatistics(moments, 1, "identity", model_fingerprint(model, list(layers)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "tiny"], default="gpt2-small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--facts", type=int, default=100, help="facts edited by peft-edit, in one batch")
    parser.add_argument("--published-facts", type=int, default=6, help="facts edited the published way")
    parser.add_argument("--early-stopping", choices=["mpes", "none"], default="mpes")
    parser.add_argument("--published", choices=["mpes", "none"], nargs="+", help="its stopping; as --early-stopping")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--optimizers", nargs="*", choices=["adam", "normalized"], default=["adam", "normalized"])
    parser.add_argument("--slots", type=int, nargs="*", default=[0], help="facts searched at once; 0: by memory")
    parser.add_argument("--layers", type=int, nargs="*", default=None, help="edited layers; by default the usual band")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("search.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    if args.shape == "tiny":
        base, tokenizer = load_tiny_model()
        base, facts = base.to(args.device, getattr(torch, args.dtype)), load_tiny_facts()[: args.facts]
    else:
        facts, tokenizer = facts_and_tokenizer(args.facts)
        base = build(args.shape, getattr(torch, args.dtype), args.device)
    places = {} if args.layers is None else {"layers_to_transform": args.layers}
    config = EditConfig(task_type="CAUSAL_LM", early_stopping=args.early_stopping, search_steps=args.steps, **places)
    if args.layers is not None:
        config.target_modules = {"mlp.c_proj" if args.shape.startswith("gpt2") else "mlp.down_proj"}
    model = get_peft_model(base, config).eval()
    layers = model.edit_layers()
    statistics = plain_statistics(model.base_model.model, layers)
    model.edit_facts(facts[:2], tokenizer, statistics=statistics, progress=False)  # warm-up; makes the contexts
    contexts = model.peft_config["default"].memory.contexts
    model.remove_facts(facts[:2])

    rows = []
    blocks = list(find_blocks(base)[1])
    place = [int(part) for part in list(layers)[-1].split(".") if part.isdigit()][0]
    encoder = PromptEncoder(tokenizer, base.get_input_embeddings().num_embeddings)
    prompts = [encoder.encode_fact(fact, contexts) for fact in facts]
    few = prompts[: args.published_facts]
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    modules = {name: layer.get_base_layer() for name, layer in layers.items()}
    before = {name: module.weight.detach().clone() for name, module in modules.items()}
    for stopping in args.published or [args.early_stopping]:
        settings = SearchSettings(early_stopping=stopping, steps=args.steps, optimizer="adam", patience=0)
        start = time.perf_counter()
        found = [search_one(base, blocks[place], modules[list(modules)[-1]], fact, settings) for fact in few]
        searched = time.perf_counter() - start
        targets = torch.stack([target for _, target, _ in found])
        read = time.perf_counter()
        write_batch(base, blocks[place], modules, few, targets, memit(statistics.second_moments, 1000.0))
        written = time.perf_counter() - read
        for name, module in modules.items():
            module.weight.data.copy_(before[name])
        rows.append(
            {
                "way": f"published, {stopping}",
                "slots": 1,
                "facts": len(few),
                "steps": sum(steps for *_, steps in found) / len(few),
                "seconds_per_edit": (searched + written) / len(few),
                "stages": {"search": searched, "keys and solve": written},
            }
        )
    published = list(rows)
    for optimizer in args.optimizers:
        for slots in args.slots:
            model.peft_config["default"].search_optimizer = optimizer
            start = time.perf_counter()
            report = model.edit_facts(facts, tokenizer, batch_size=len(facts), search_slots=slots, progress=False)
            seconds = time.perf_counter() - start
            model.remove_facts(facts)
            rows.append(
                {
                    "way": optimizer,
                    "slots": slots,
                    "facts": len(facts),
                    "steps": sum(fact.steps for fact in report.facts) / len(facts),
                    "steps_of_the_same_facts": sum(fact.steps for fact in report.facts[: len(few)]) / len(few),
                    "seconds_per_edit": seconds / len(facts),
                    "stages": report.seconds,
                }
            )
    for row in rows:
        row["ratios"] = {each["way"]: each["seconds_per_edit"] / row["seconds_per_edit"] for each in published}
        ratios = "  ".join(f"{ratio:5.1f}x" for ratio in row["ratios"].values())
        stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in row["stages"].items())
        print(
            f"{row['way']:15s} slots {row['slots']:3d}  {row['steps']:4.1f} steps  "
            f"{row['seconds_per_edit']:.4f} s/edit  {ratios}  ({stages})",
            flush=True,
        )
    about = {**vars(args), "output": str(args.output), "edited": list(layers)}
    args.output.write_text(json.dumps({"settings": about, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
