"""What an edit would do, before it is done: modules, memory, time, conflicts, bad facts."""

from __future__ import annotations

import argparse
import math
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..adapter import base_model
from ..collecting import SAMPLED_PER_INPUT, TOKENS_PER_INPUT, collect_statistics, sample_texts
from ..facts import Fact, FactError
from ..fingerprint import model_fingerprint
from ..prompts import PromptEncoder, context_window
from ..statistics import KeyStatistics
from .editable import load_statistics
from .output import Output, Result, Table, duration, shorten, size
from .sources import ReadFacts


TRIAL_FACTS = 16
SAMPLED_TOKENS = 4096  # of text or of samples, to measure how fast they come


@dataclass(frozen=True)
class ModuleSize:
    """An edited module: its name, d_in and d_out."""

    name: str
    d_in: int
    d_out: int


def make_plan(
    model: Any, tokenizer: Any, read: ReadFacts, args: argparse.Namespace, held: Path | None, out: Output
) -> Result:
    """The plan. The model may be edited in memory for it, nothing is written to disk.

    Args:
        model: With the adapter that would be edited.
        tokenizer: Its tokenizer.
        read (`ReadFacts`): The facts, good and bad.
        args: Those of `peft-edit edit`.
        held (`Path`, *optional*): The adapter that would be gone on with.
        out (`Output`): For notes.

    Returns:
        `Result`: with exit code 1 if the edit would be refused.
    """
    config = model.peft_config[model.active_adapter]
    layers = model.base_model.edit_layers()
    modules = [ModuleSize(name, layer.in_features, layer.out_features) for name, layer in layers.items()]
    facts = read.facts
    problems = read.problems + _unreadable(model, tokenizer, read)
    new, changed, same = _against_memory(facts, config.memory, read)
    problems += _id_clashes(facts, config.memory, read)
    batch_size = args.batch_size or config.update_rule().batch_size
    memory = _memory(model, modules, len(facts), config.memory)
    seconds: dict[str, float] | None = None
    if facts and not problems:
        out.note(f"Trying {min(TRIAL_FACTS, len(facts))} facts in memory to see how long they take.")
        seconds = _seconds(model, tokenizer, facts, batch_size, args, modules)
    settings = {"method": config.method, **_settings(config)}
    document = {
        "model": args.model,
        "adapter": None if held is None else str(held),
        "modules": [{"name": module.name, "d_in": module.d_in, "d_out": module.d_out} for module in modules],
        "settings": settings,
        "facts": {
            "given": len(facts),
            "new": len(new),
            "conflicts": changed,
            "held_already": same,
            "bad": problems,
        },
        "batches": math.ceil(len(facts) / batch_size),
        "batch_size": batch_size,
        "bytes": memory,
        "seconds": seconds,
        "changed": False,
    }
    return Result(document, _blocks(document, held), exit_code=1 if problems or not facts else 0)


def _blocks(document: dict[str, Any], held: Path | None) -> list[str | Table]:
    facts, bytes_, seconds = document["facts"], document["bytes"], document["seconds"]
    into = f"the adapter '{held}'" if held is not None else "a new adapter"
    blocks: list[str | Table] = [
        f"Plan: {facts['given']} facts into {into}, in {document['batches']} batch(es) of up to "
        f"{document['batch_size']}, by {document['settings']['method']}. Nothing was changed.",
        Table(
            ("module", "d_in", "d_out"),
            [(module["name"], str(module["d_in"]), str(module["d_out"])) for module in document["modules"]],
        ),
        Table(
            ("facts", "number"),
            [
                ("new", str(facts["new"])),
                ("replacing another target", str(len(facts["conflicts"]))),
                ("held already", str(len(facts["held_already"]))),
                ("bad", str(len(facts["bad"]))),
            ],
        ),
        Table(("memory", "size"), [(name.replace("_", " "), size(value)) for name, value in bytes_.items()]),
    ]
    if facts["conflicts"]:
        rows = [
            (entry["id"], shorten(entry["question"], 56), entry["held"], entry["given"])
            for entry in facts["conflicts"][:20]
        ]
        blocks.append(Table(("conflict", "prompt", "held", "given"), rows))
    if facts["bad"]:
        blocks.append("These must be mended first:\n" + "\n".join(f"  {problem}" for problem in facts["bad"][:20]))
    if seconds is not None:
        parts = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items() if name != "total")
        blocks.append(f"Time, roughly: {duration(seconds['total'])} ({parts}).")
    return blocks


# --- facts -------------------------------------------------------------------------------------------------------


def _unreadable(model: Any, tokenizer: Any, read: ReadFacts) -> list[str]:
    """Facts that the tokenizer or the context window does not take."""
    embeddings = model.get_input_embeddings().num_embeddings
    encoder = PromptEncoder(tokenizer, embeddings, context_window(model.config))
    problems = []
    for place, fact in zip(read.places, read.facts):
        try:
            encoder.encode_fact(fact, ())
        except FactError as error:
            problems.append(f"{place}: {error}")
    return problems


def _against_memory(
    facts: list[Fact], memory: Any, read: ReadFacts
) -> tuple[list[Fact], list[dict[str, str]], list[str]]:
    """New facts; those that would replace another target; ids of those that the adapter holds as they are."""
    held = {record.key: record for record in memory.records} if memory is not None else {}
    new, changed, same = [], [], []
    for place, fact in zip(read.places, facts):
        record = held.get(fact.key)
        if record is None:
            new.append(fact)
        elif record.target.strip() == fact.target.strip():
            same.append(record.id)
        else:
            changed.append(
                {
                    "id": record.id,
                    "place": place,
                    "question": fact.filled_prompt,
                    "held": record.target.strip(),
                    "given": fact.target.strip(),
                }
            )
    return new, changed, same


def _id_clashes(facts: list[Fact], memory: Any, read: ReadFacts) -> list[str]:
    held = {record.id: record for record in memory.records} if memory is not None else {}
    return [
        f"{place}: the adapter holds another fact under the id {fact.fact_id!r} "
        f"({held[fact.fact_id].filled_prompt!r}); choose another id."
        for place, fact in zip(read.places, facts)
        if fact.fact_id in held and held[fact.fact_id].key != fact.key
    ]


def _settings(config: Any) -> dict[str, Any]:
    names = ("preservation_weight", "norm_penalty", "norm_budget", "update", "early_stopping", "search_steps")
    return {name: getattr(config, name) for name in names}


# --- memory ------------------------------------------------------------------------------------------------------


def _memory(model: Any, modules: list[ModuleSize], facts: int, memory: Any) -> dict[str, int]:
    """Bytes of what will be held and written; the search's activations come on top."""
    held = len(memory) if memory is not None else 0
    parameters = [
        parameter for name, parameter in model.named_parameters() if ".edit_delta." not in name and parameter.numel()
    ]
    base = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    half = model.dtype in (torch.float16, torch.bfloat16)
    deltas = sum(4 * module.d_in * module.d_out for module in modules)
    pairs = sum((2 if half else 4) * (module.d_in + module.d_out) for module in modules) * (held + facts)
    statistics = sum(4 * module.d_in**2 for module in modules)
    # As `solver_devices` counts: six float64 matrices of d_in × d_in and as many of d_out × d_in.
    solver = max((8 * 6 * module.d_in * (module.d_in + module.d_out) for module in modules), default=0)
    return {
        "base_model": base,
        "deltas": deltas,
        "keys_and_values": pairs,
        "key_statistics": statistics,
        "solver": solver,
        "adapter_on_disk": deltas + pairs + statistics // 2,
    }


# --- time --------------------------------------------------------------------------------------------------------


def _seconds(
    model: Any,
    tokenizer: Any,
    facts: list[Fact],
    batch_size: int,
    args: argparse.Namespace,
    modules: list[ModuleSize],
) -> dict[str, float]:
    """Seconds per stage, from a trial of a few facts in memory. The model is not to be saved after it.

    Facts of full batches are searched side by side and go faster than those of the trial.
    """
    config = model.peft_config[model.active_adapter]
    seconds: dict[str, float] = {}
    statistics = None
    if args.statistics is not None:
        statistics = load_statistics(args.statistics)
    elif config.memory is None:
        seconds["statistics"] = _statistics_seconds(model, tokenizer, facts, modules, args.statistics_text is not None)
        statistics = _identity(model, modules)
    some = facts[:TRIAL_FACTS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = model.edit_facts(some, tokenizer, len(some), statistics=statistics, progress=False)
    for stage, value in report.seconds.items():
        if stage == "preparation":
            seconds[stage] = value
        elif stage == "solve":
            seconds[stage] = value * math.ceil(len(facts) / batch_size)
        else:
            seconds[stage] = value * len(facts) / len(some)
    seconds["total"] = sum(seconds.values())
    return seconds


def _statistics_seconds(
    model: Any, tokenizer: Any, facts: list[Fact], modules: list[ModuleSize], from_text: bool
) -> float:
    """How long the key statistics take: a few thousand tokens of them, scaled up."""
    wanted = (TOKENS_PER_INPUT if from_text else SAMPLED_PER_INPUT) * max(module.d_in for module in modules)
    some = min(wanted, SAMPLED_TOKENS)
    names = [module.name for module in modules]
    with base_model(model.base_model) as base, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        texts: Any = [fact.filled_prompt for fact in facts] * math.ceil(some / len(facts))
        if not from_text:
            texts = sample_texts(base, tokenizer, some, seed=0)
        tokens = collect_statistics(base, tokenizer, texts, names, max_tokens=some).tokens
        return (time.perf_counter() - start) * wanted / tokens


def _identity(model: Any, modules: list[ModuleSize]) -> KeyStatistics:
    """Statistics that cost nothing, for a trial that is not about quality."""
    moments = {module.name: torch.eye(module.d_in) for module in modules}
    names = [module.name for module in modules]
    return KeyStatistics(moments, 1, "trial", model_fingerprint(model.base_model.model, names))
