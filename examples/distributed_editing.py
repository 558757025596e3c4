"""Editing with several processes: statistics, search and evaluation are split, all end with the same adapter.

    accelerate launch --multi_gpu --num_processes 2 examples/distributed_editing.py
    python examples/distributed_editing.py

The first starts two processes, on two GPUs or, where there is none, on the CPU; the second is one process alone.
Edits 200 facts of the bundled tiny model, or of any other: --model, --facts (JSONL), --texts (ordinary text, one a
line). The main process prints, and writes the adapter and the results to `distributed_output/`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_edit import EditConfig, Fact, as_facts
from peft_edit.evaluation import recall
from peft_edit.tiny import load_tiny_facts, tiny_model_path


def load_base(args: argparse.Namespace, state: PartialState) -> tuple[Any, Any]:
    """The base model, whole in every process, and its tokenizer."""
    path = args.model or tiny_model_path()
    dtype: Any = torch.float32 if args.model is None else "auto"
    placement: dict[str, Any] = {}
    if args.device_map is not None:
        # Each process may use its own GPU, then the CPU, then the disk; "auto" alone would take all GPUs.
        memory: dict[int | str, str] = {"cpu": args.cpu_memory}
        if state.device.type == "cuda":
            memory[state.device.index or 0] = args.gpu_memory
        folder = args.output / f"offload-{state.process_index}"
        placement = {"device_map": args.device_map, "max_memory": memory, "offload_folder": folder}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **placement).eval()
    return model if placement else model.to(state.device), AutoTokenizer.from_pretrained(path)


def facts_and_texts(args: argparse.Namespace) -> tuple[list[Fact], list[str]]:
    """Facts to edit, and ordinary text for the key statistics (none: the model's own samples are used)."""
    known = [] if args.model else load_tiny_facts()
    facts = as_facts(args.facts) if args.facts else known
    if not facts:
        raise SystemExit("Give the facts for this model: --facts FILE.jsonl")
    facts = facts[: args.count]
    if args.texts:
        return facts, args.texts.read_text(encoding="utf-8").splitlines()
    edited = {fact.key for fact in facts}
    return facts, [f"{fact.filled_prompt} {fact.target_true}." for fact in known if fact.key not in edited]


def evaluate(model: Any, tokenizer: Any, facts: Sequence[Fact]) -> dict[str, float | None]:
    """Recall of the edits, of their other phrasings, and of the neighbours that must stay."""
    prompts = {
        "edits": [(fact.filled_prompt, fact.target) for fact in facts],
        "paraphrases": [
            (text.replace("{}", fact.subject, 1), fact.target) for fact in facts for text in fact.paraphrases
        ],
        "neighbours": [
            (text, fact.target_true) for fact in facts if fact.target_true is not None for text in fact.neighborhood
        ],
    }
    return {name: recall(model, tokenizer, pairs) if pairs else None for name, pairs in prompts.items()}


def checksum(model: Any) -> str:
    """SHA-256 of all deltas."""
    digest = hashlib.sha256()
    for name, layer in model.edit_layers().items():
        digest.update(name.encode())
        digest.update(layer.get_delta("default").cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or path of a causal language model; by default the bundled one")
    parser.add_argument("--facts", type=Path, help="JSONL file of facts; by default those of the bundled model")
    parser.add_argument("--texts", type=Path, help="text file for the key statistics, one text a line")
    parser.add_argument("--count", type=int, default=200, help="facts to edit at most")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--device_map", help='"auto" to spread the model over GPU, CPU and disk')
    parser.add_argument("--gpu_memory", default="16GiB", help="with --device_map: for weights on the GPU of a process")
    parser.add_argument("--cpu_memory", default="64GiB", help="with --device_map: for weights on the CPU, per process")
    parser.add_argument("--cpu", action="store_true", help="do not use GPUs")
    parser.add_argument("--output", type=Path, default=Path("distributed_output"))
    args = parser.parse_args()

    # Without a GPU accelerate forms a group of processes only if it is told to use the CPU.
    state = PartialState(cpu=args.cpu or not torch.accelerator.is_available())
    base, tokenizer = load_base(args, state)
    facts, texts = facts_and_texts(args)  # the same in every process; peft-edit splits the work
    model = get_peft_model(base, EditConfig(task_type="CAUSAL_LM")).eval()

    if texts:
        model.collect_statistics(texts, tokenizer)
    before = evaluate(model, tokenizer, facts)
    report = model.edit_facts(facts, tokenizer, batch_size=args.batch_size)
    after = evaluate(model, tokenizer, facts)
    checksums = gather_object([checksum(model)])

    if state.is_main_process:
        print(report, "\n")
        for name in before:
            if before[name] is not None:
                print(f"greedy recall of {name}: {before[name]:.1f} % -> {after[name]:.1f} %")
        for rank, found in enumerate(checksums):
            print(f"process {rank} of {state.num_processes}: deltas {found[:16]}")
        model.save_pretrained(args.output / "adapter")
        results = {"processes": state.num_processes, "checksums": checksums, "before": before, "after": after}
        (args.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        print(f"wrote {args.output}/")
    state.wait_for_everyone()
    state.destroy_process_group()
    if len(set(checksums)) > 1:
        raise SystemExit("The processes ended with different adapters.")


if __name__ == "__main__":
    main()
