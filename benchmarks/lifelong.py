"""Speed of a long run of edits: does it fall as the adapter fills?

    python benchmarks/lifelong.py --facts 10000 --output lifelong.json

One call of `edit_facts` with N distinct facts, into the bundled tiny model or into random weights in the shape of
GPT-2 small (whose facts never converge under MPES; `--search-steps` bounds their search). Past the bundled facts,
subjects are joined from two of them. Time stamps come from the tracker, after every batch; the preparation of all
facts before the first batch is reported by itself. Prints for each thousand the edits per second and the seconds per
stage, then the ratio of the last whole thousand's seconds to the first's (and that of CPU time, which on a busy
machine says more), the size of the edit memory in memory and on disk, and the peak of resident memory. Writes JSON. On
the CPU.
"""

from __future__ import annotations

import sys
from pathlib import Path


sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder's statistics.py would hide Python's own

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from peft import PeftModel, get_peft_model

from benchmarks.search import plain_statistics
from benchmarks.shapes import build, facts_and_tokenizer
from peft_edit import EditConfig, Fact, editing
from peft_edit.memory import EditMemory
from peft_edit.report import EditReport
from peft_edit.tiny import load_tiny_facts, load_tiny_model


MODELS = ("tiny", "gpt2-small")


def model_and_facts(name: str, count: int, **settings: Any) -> tuple[PeftModel, Any, list[Fact]]:
    """The model with an empty adapter that has its key statistics, its tokenizer, and distinct facts."""
    facts, tokenizer = facts_and_tokenizer(count)
    config = EditConfig(task_type="CAUSAL_LM", **settings)
    if name == "tiny":
        base, tokenizer = load_tiny_model()
        model = get_peft_model(base, config).eval()
        texts = [f"{fact.filled_prompt} {fact.target_true}." for fact in load_tiny_facts()]
        model.collect_statistics(texts, tokenizer)
    else:
        model = get_peft_model(build(name), config).eval()
        model.set_statistics(plain_statistics(model.base_model.model, model.edit_layers()))
    return model, tokenizer, facts


class Stages(editing.Stopwatch):
    """The stopwatch of `edit_facts`, open to look at while it runs."""

    current: Stages

    def __init__(self) -> None:
        super().__init__()
        self.prepared: dict[str, float] = {}
        Stages.current = self

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        with super().__call__(stage):
            yield
        if stage == "preparation":
            self.prepared = {"time": time.perf_counter(), "cpu": time.process_time()}


@dataclass
class Stamps:
    """A tracker that keeps, after every batch, the facts edited, the time, and the seconds per stage so far."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def log(self, values: dict[str, Any], step: int) -> None:
        """One batch more."""
        now, stages = time.perf_counter(), dict(Stages.current.seconds)
        self.rows.append({"facts": step, "time": now, "cpu": time.process_time(), "stages": stages, "values": values})

    def groups(self, start: dict[str, Any], size: int) -> list[dict[str, Any]]:
        """Seconds of every `size` facts, in all and per stage, from `start` on; the last group may be smaller."""
        groups: list[dict[str, Any]] = []
        before = start
        for row in self.rows:
            if row["facts"] - before["facts"] >= size or row is self.rows[-1]:
                stages = {
                    name: taken - before["stages"].get(name, 0.0)
                    for name, taken in row["stages"].items()
                    if name != "preparation"
                }
                facts, seconds = row["facts"] - before["facts"], row["time"] - before["time"]
                groups.append(
                    {
                        "facts": facts,
                        "until": row["facts"],
                        "seconds": seconds,
                        "cpu_seconds": row["cpu"] - before["cpu"],
                        "edits_per_second": facts / seconds,
                        "stages": {**stages, "rest": seconds - sum(stages.values())},
                    }
                )
                before = row
        return groups


def run(
    model: PeftModel, facts: list[Fact], tokenizer: Any, **options: Any
) -> tuple[EditReport, Stamps, dict[str, Any]]:
    """The report, the time stamps, and one for the start of the first batch."""
    stamps = Stamps()
    with mock.patch.object(editing, "Stopwatch", Stages):
        report = model.edit_facts(facts, tokenizer, tracker=stamps, **options)
    return report, stamps, {"facts": 0, "stages": {}, **Stages.current.prepared}


def memory_sizes(memory: EditMemory) -> dict[str, int]:
    """Bytes of the keys and values in memory, and of the files of pairs and facts, and of key statistics."""
    pairs = [tensor for batches in memory.pairs.values() for batch in batches for tensor in batch]
    with tempfile.TemporaryDirectory() as folder:
        memory.save(folder)
        files = {path.name: path.stat().st_size for path in Path(folder).iterdir()}
    statistics = sum(size for name, size in files.items() if name.startswith("key_statistics"))
    return {
        "keys_and_values": sum(tensor.numel() * tensor.element_size() for tensor in pairs),
        "files": sum(files.values()) - statistics,
        "statistics_files": statistics,
    }


def line(group: dict[str, Any], recalled: float) -> str:
    """A group as text."""
    stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in group["stages"].items())
    return (
        f"to {group['until']:6d}  {group['edits_per_second']:8.2f} edits/s  {group['seconds']:8.2f} s ({stages})  "
        f"recalled {100 * recalled:.1f} %"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--facts", type=int, default=10000)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--group", type=int, default=1000, help="facts per row of the table")
    parser.add_argument("--search-steps", type=int, default=25)
    parser.add_argument("--probes", type=int, default=0, help="earlier facts asked again after each batch (in 'rest')")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("lifelong.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model, tokenizer, facts = model_and_facts(args.model, args.facts, search_steps=args.search_steps)
    model.edit_facts(facts[:2], tokenizer, progress=False)  # warm-up; makes the contexts
    model.remove_facts(facts[:2])
    options = {"batch_size": args.batch_size, "probes": args.probes, "progress": args.progress}
    report, stamps, start = run(model, facts, tokenizer, **options)
    groups = stamps.groups(start, args.group)
    for group in groups:
        members = report.facts[group["until"] - group["facts"] : group["until"]]
        group["recalled"] = sum(fact.recalled for fact in members) / len(members)
        group["steps"] = sum(fact.steps for fact in members) / len(members)
        print(line(group, group["recalled"]), flush=True)
    whole = [group for group in groups if group["facts"] == groups[0]["facts"]]
    summary = {
        "seconds": stamps.rows[-1]["time"] - start["time"],
        "preparation": report.seconds["preparation"],
        "last_to_first": whole[-1]["seconds"] / groups[0]["seconds"],
        "last_to_first_cpu": whole[-1]["cpu_seconds"] / groups[0]["cpu_seconds"],
        "written": report.written,
        "facts_held": report.facts_held,
        "memory_bytes": memory_sizes(model.peft_config["default"].memory),
        "peak_resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "last_log": stamps.rows[-1]["values"],
    }
    sizes = {name: f"{size / 2**20:.1f} MiB" for name, size in summary["memory_bytes"].items()}
    print(
        f"{report.facts_held} facts held after {summary['seconds']:.1f} s and {summary['preparation']:.1f} s of "
        f"preparation; last to first {summary['last_to_first']:.3f} "
        f"(CPU time {summary['last_to_first_cpu']:.3f}); {sizes}; "
        f"peak {summary['peak_resident_bytes'] / 2**20:.0f} MiB"
    )
    about = {**vars(args), "output": str(args.output), "torch": torch.__version__}
    args.output.write_text(json.dumps({"settings": about, "summary": summary, "groups": groups}, indent=2))


if __name__ == "__main__":
    main()
