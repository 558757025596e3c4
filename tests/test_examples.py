"""The examples of several processes and of a lifelong run, as a user starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--main_process_port", "0"]


def run(*command: str, expected: int = 0) -> str:
    """What a Python command prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == expected, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("processes", [1, 2])
def test_distributed_editing(tmp_path: Path, processes: int) -> None:
    launch = [*LAUNCH, "--num_processes", "2"] if processes == 2 else []
    options = ["--count", "12", "--batch-size", "6", "--cpu", "--output", str(tmp_path)]
    printed = run(*launch, str(EXAMPLES / "distributed_editing.py"), *options)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["processes"] == processes == len(results["checksums"])
    assert len(set(results["checksums"])) == 1
    assert results["before"]["edits"] < 20 < 80 < results["after"]["edits"]
    assert results["before"]["neighbours"] == 100.0
    assert printed.count("the adapter holds 12") == 1  # the main process alone prints
    assert len((tmp_path / "adapter" / "edit_facts.jsonl").read_text().splitlines()) == 12


def test_lifelong_editing_ends_with_the_same_adapter_after_an_interruption(tmp_path: Path) -> None:
    def start(folder: str, *options: str, expected: int = 0) -> str:
        fixed = ["--count", "14", "--batch-size", "4", "--probes", "3", "--output", str(tmp_path / folder)]
        return run(str(EXAMPLES / "lifelong_editing.py"), *fixed, *options, expected=expected)

    start("whole")
    assert "start again" in start("cut", "--stop-after", "13", expected=1)
    # Three batches were written, and a checkpoint after the second.
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["checkpoint-8"]
    assert "edited 6 facts in this start" in start("cut")
    for name in ("adapter_model.safetensors", "edit_memory.safetensors"):
        [one, other] = [(tmp_path / folder / "adapter" / name).read_bytes() for folder in ("whole", "cut")]
        assert one == other
