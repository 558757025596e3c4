"""Edits per second with one process and with two on the same facts, and whether they end with the same adapter.

    python benchmarks/scaling.py --output scaling.json

The script starts itself again, as `accelerate launch` would, with one thread in each process (gloo, on the CPU). Only
`edit_facts` is timed, after a warm-up edit that is taken back and a barrier; the slowest process counts. The numbers
of processes take turns, and of the repeats the fastest counts. The default is the bundled tiny model; `--model
gpt2-small` has random weights, so that its facts never converge under MPES. Prints a table and writes JSON.
"""

from __future__ import annotations

import sys
from pathlib import Path


sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder's statistics.py would hide Python's own

import argparse
import json
import os
import socket
import subprocess
import tempfile
import time
import warnings
from typing import Any

import torch
from accelerate import PartialState

from benchmarks.lifelong import MODELS, model_and_facts
from peft_edit.workers import Workers


WARM_UP = 4  # facts


def free_port() -> int:
    """A port on this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def work(args: argparse.Namespace) -> None:
    """What each process does: edits, and leaves what it found in the folder."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    PartialState(cpu=True)
    model, tokenizer, facts = model_and_facts(args.model, args.facts, search_steps=args.search_steps)
    workers = Workers.of(model)
    model.edit_facts(facts[:WARM_UP], tokenizer, progress=False)
    model.remove_facts(facts[:WARM_UP])
    workers.wait()
    start = time.perf_counter()
    report = model.edit_facts(facts, tokenizer, batch_size=args.batch_size, progress=False)
    seconds = time.perf_counter() - start
    found = {
        "seconds": seconds,
        "stages": report.seconds,
        "steps": sum(fact.steps for fact in report.facts) / len(report.facts),
        "recalled": report.recalled,
        "deltas": {name: layer.get_delta("default") for name, layer in model.edit_layers().items()},
    }
    torch.save(found, args.folder / f"{workers.rank}.pt")
    workers.wait()


def launch(processes: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Starts that many processes, and returns what each of them found."""
    port = str(free_port())
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--folder", folder, "--model", args.model]
        for name in ("facts", "batch_size", "search_steps"):
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        started = []
        for rank in range(processes):
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "ACCELERATE_USE_CPU": "true",
            }
            started.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
        outputs = [process.communicate()[0] for process in started]
        for process, output in zip(started, outputs):
            if process.returncode != 0:
                raise RuntimeError(f"A process ended with {process.returncode}:\n{output}")
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(processes)]


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest relative difference between two adapters' modules."""
    return max(float((other[name] - delta).norm() / delta.norm()) for name, delta in one.items())


def row(processes: int, runs: list[list[dict[str, Any]]], facts: int) -> dict[str, Any]:
    """The fastest of some runs, each as slow as its slowest process."""
    slowest = [max(run, key=lambda found: found["seconds"]) for run in runs]
    best = min(slowest, key=lambda found: found["seconds"])
    return {
        "processes": processes,
        "seconds": best["seconds"],
        "edits_per_second": facts / best["seconds"],
        "all_seconds": [found["seconds"] for found in slowest],
        "stages": best["stages"],
        "steps": best["steps"],
        "recalled": best["recalled"],
    }


def compare(args: argparse.Namespace) -> None:
    """Runs both, prints the table and writes the JSON."""
    runs: dict[int, list[list[dict[str, Any]]]] = {1: [], args.processes: []}
    for _ in range(args.repeats):
        for processes, done in runs.items():
            done.append(launch(processes, args))
    rows = [row(processes, done, args.facts) for processes, done in runs.items()]
    for found in rows:
        stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in found["stages"].items())
        print(
            f"{found['processes']} process(es)  {found['edits_per_second']:8.2f} edits/s  {found['seconds']:.2f} s "
            f"({stages})  {found['steps']:.1f} steps  {found['recalled']} recalled",
            flush=True,
        )
    alone = runs[1][0][0]["deltas"]
    together = [found["deltas"] for run in runs[args.processes] for found in run]
    summary = {
        "ratio": rows[1]["edits_per_second"] / rows[0]["edits_per_second"],
        "difference_to_one_process": max(difference(alone, deltas) for deltas in together),
        "difference_between_processes": max(difference(together[0], deltas) for deltas in together),
    }
    print(
        f"x {summary['ratio']:.2f}; largest relative difference of the adapters: to one process "
        f"{summary['difference_to_one_process']:.1e}, between processes {summary['difference_between_processes']:.1e}"
    )
    about = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    args.output.write_text(json.dumps({"settings": about, "summary": summary, "rows": rows}, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--facts", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--search-steps", type=int, default=25)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("scaling.json"))
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of a process that the script has started
    args = parser.parse_args()
    if args.folder is not None:
        work(args)
    elif args.processes < 2:
        parser.error("--processes must be at least 2")
    else:
        compare(args)


if __name__ == "__main__":
    main()
