"""What each process of a distributed test does: `python -m tests.distributed_run SCENARIO OUTPUT`."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import get_peft_model

from peft_edit import EditConfig, editing
from peft_edit.sharded import is_sharded
from peft_edit.tiny import load_tiny_facts, load_tiny_model


LAYERS = {"layers_to_transform": [0, 1], "target_modules": ["mlp.down_proj"]}


def wrapped(**settings):
    base, tokenizer = load_tiny_model()
    config = EditConfig(task_type="CAUSAL_LM", num_contexts=2, search_steps=8, **settings)
    model = get_peft_model(base, config).eval()
    texts = [f"{fact.filled_prompt} {fact.target_true}." for fact in load_tiny_facts()[:300]]
    return model, tokenizer, texts


def result(model, reports):
    memory = model.peft_config["default"].memory
    return {
        "deltas": {name: layer.get_delta("default").clone() for name, layer in model.edit_layers().items()},
        "facts": [record.key for record in memory.records] if memory is not None else [],
        "moments": dict(memory.statistics.second_moments) if memory is not None else {},
        "reports": [[(fact.id, fact.steps, fact.recalled) for fact in report.facts] for report in reports],
    }


def run_edit(**settings):
    model, tokenizer, texts = wrapped(**settings)
    model.collect_statistics(texts, tokenizer)
    facts = load_tiny_facts()[:9]
    reports = [model.edit_facts(facts, tokenizer, batch_size=4, search_slots=1, progress=False)]
    model.remove_facts(facts[2:4])
    reports.append(model.edit_facts(facts[2:3], tokenizer, progress=False))
    return result(model, reports)


def run_many():
    """Batches in which facts stop at different times and leave their places to others."""
    model, tokenizer, texts = wrapped()
    model.collect_statistics(texts, tokenizer)
    return result(model, [model.edit_facts(load_tiny_facts()[:60], tokenizer, 20, search_slots=3, progress=False)])


def run_idle():
    """More processes than groups of facts."""
    model, tokenizer, texts = wrapped()
    model.collect_statistics(texts, tokenizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.edit_facts(load_tiny_facts()[:5], tokenizer, progress=False)
    return {"warnings": [str(warning.message) for warning in caught if "nothing to search" in str(warning.message)]}


def run_failing():
    """One process fails in the second batch."""
    model, tokenizer, texts = wrapped()
    model.collect_statistics(texts, tokenizer)
    facts = load_tiny_facts()[:8]
    model.edit_facts(facts[:4], tokenizer, batch_size=4, search_slots=1, progress=False)
    before = result(model, [])
    search = editing.search_targets

    def failing(*args, **kwargs):
        if int(os.environ.get("RANK", "0")) == 1:
            raise ArithmeticError("process 1 has had enough")
        return search(*args, **kwargs)

    editing.search_targets = failing
    try:
        model.edit_facts(facts[4:], tokenizer, search_slots=1, progress=False)
    except ArithmeticError as error:
        message = str(error)
    after = result(model, [])
    same = all(torch.equal(before["deltas"][name], delta) for name, delta in after["deltas"].items())
    return {"message": message, "unchanged": same and before["facts"] == after["facts"]}


def run_different_facts():
    model, tokenizer, texts = wrapped()
    model.collect_statistics(texts, tokenizer)
    facts = load_tiny_facts()[int(os.environ.get("RANK", "0")) :][:3]
    try:
        model.edit_facts(facts, tokenizer, progress=False)
    except ValueError as error:
        return {"message": str(error)}
    return {}


def run_different_streams():
    """The first batch is the same everywhere, the second is not."""
    model, tokenizer, texts = wrapped()
    model.collect_statistics(texts, tokenizer)
    facts = load_tiny_facts()[:4]
    other = facts[:2] + load_tiny_facts()[5:7]
    own = other if int(os.environ.get("RANK", "0")) else facts
    try:
        model.edit_facts(iter(own), tokenizer, batch_size=2, progress=False)
    except ValueError as error:
        return {"message": str(error), "held": len(model.edited_facts())}
    return {}


def run_different_directories():
    model, tokenizer, texts = wrapped()
    model.collect_statistics(texts, tokenizer)
    try:
        model.edit_facts(load_tiny_facts()[:2], tokenizer, output_dir=tempfile.mkdtemp(), progress=False)
    except ValueError as error:
        return {"message": str(error)}
    return {}


class Rows(list):
    def log(self, values, step):
        self.append((step, values))


def run_probes():
    """Only the main process logs; the probes are asked in all of them."""
    model, tokenizer, texts = wrapped()
    model.collect_statistics(texts, tokenizer)
    rows = Rows()
    tracker = None if int(os.environ.get("RANK", "0")) else rows
    model.edit_facts(load_tiny_facts()[:4], tokenizer, batch_size=2, tracker=tracker, probes=3, progress=False)
    return {"rows": list(rows)}


def run_whole():
    model, tokenizer, texts = wrapped(**LAYERS)
    return edit_and_remove(model, tokenizer, texts)


def edit_and_remove(model, tokenizer, texts):
    model.collect_statistics(texts, tokenizer)
    facts = load_tiny_facts()[:5]
    reports = [model.edit_facts(facts, tokenizer, batch_size=3, progress=False)]
    model.remove_facts(facts[1])
    return result(model, reports)


def run_sharded():
    """FSDP2: every process holds a part of each weight."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = plugin  # on a CPU accelerate would take DDP, so what it calls for FSDP2 is called
    model, tokenizer, texts = wrapped(**LAYERS)
    model = fsdp2_prepare_model(accelerator, model)
    try:
        model.collect_statistics(texts, tokenizer)
    except RuntimeError as error:
        refusal = str(error)
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4]]))
    weight = model.base_model.model.model.layers[0].mlp.up_proj.weight
    held = weight.to_local().numel() / weight.numel()
    found = edit_and_remove(model, tokenizer, texts)
    return {**found, "refusal": refusal, "share_of_a_weight": held, "sharded": is_sharded(model)}


SCENARIOS = {
    "edit": run_edit,
    "edit_two_layers": lambda: run_edit(**LAYERS),
    "many": run_many,
    "idle": run_idle,
    "failing": run_failing,
    "different_facts": run_different_facts,
    "different_streams": run_different_streams,
    "different_directories": run_different_directories,
    "probes": run_probes,
    "whole": run_whole,
    "sharded": run_sharded,
}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    scenario, output = sys.argv[1:]
    state = PartialState(cpu=True)
    torch.save(SCENARIOS[scenario](), Path(output) / f"{os.environ.get('RANK', '0')}.pt")
    state.wait_for_everyone()  # a process that leaves first may take the others' connections with it
    state.destroy_process_group()
