"""Several processes: the adapter of one alone in each of them, errors in all or none, weights spread with FSDP2."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peft_edit.workers import Workers

from . import distributed_run


ROOT = Path(__file__).resolve().parents[1]


def launch(scenario, folder, processes):
    """Runs a scenario as `accelerate launch` would, and returns what each process found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    started = []
    for rank in range(processes):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
        }
        command = [sys.executable, "-m", "tests.distributed_run", scenario, str(folder)]
        started.append(
            subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    outputs = [process.communicate(timeout=300)[0].decode() for process in started]
    for process, output in zip(started, outputs):
        assert process.returncode == 0, output
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def assert_like_one_alone(found, alone, tolerance=1e-9):
    """Nearly to the bit: one difference in rounding could let a fact at a tie stop a step later."""
    for mine in found:
        assert mine["facts"] == alone["facts"]
        assert mine["reports"] == alone["reports"]
        for name, delta in alone["deltas"].items():
            assert float((mine["deltas"][name] - delta).norm()) <= tolerance * float(delta.norm())
            assert torch.equal(mine["deltas"][name], found[0]["deltas"][name])
            moment = alone["moments"][name]
            assert float((mine["moments"][name] - moment).norm()) <= tolerance * float(moment.norm())


@pytest.mark.parametrize("scenario, processes", [("edit", 2), ("edit_two_layers", 2), ("edit", 3), ("many", 2)])
def test_every_process_ends_like_one_alone(tmp_path, scenario, processes):
    alone = distributed_run.SCENARIOS[scenario]()
    assert_like_one_alone(launch(scenario, tmp_path, processes), alone)


def test_processes_without_work_are_pointed_out(tmp_path):
    warned, silent = launch("idle", tmp_path, 2)
    assert ["1 of 2 processes" in message and "search_slots=1" in message for message in warned["warnings"]] == [True]
    assert silent["warnings"] == []


def test_what_one_process_raises_all_raise_and_nothing_has_changed(tmp_path):
    for found in launch("failing", tmp_path, 2):
        assert found == {"message": "process 1 has had enough", "unchanged": True}


def test_different_facts_are_refused(tmp_path):
    for found in launch("different_facts", tmp_path, 2):
        assert "given different facts" in found["message"]


def test_streams_that_differ_are_refused_before_their_batch_is_written(tmp_path):
    for found in launch("different_streams", tmp_path, 2):
        assert "given different facts" in found["message"] and found["held"] == 2


def test_different_directories_are_refused(tmp_path):
    for found in launch("different_directories", tmp_path, 2):
        assert "given different output_dir" in found["message"]


def test_one_process_logs_what_all_have_probed(tmp_path):
    logged, none = (found["rows"] for found in launch("probes", tmp_path, 2))
    assert [step for step, _ in logged] == [2, 4] and not none
    assert all(0 <= row["probe/recalled"] <= 1 for _, row in logged)


def test_weights_spread_over_processes(tmp_path):
    found = launch("sharded", tmp_path, 2)
    for mine in found:
        assert "once before editing" in mine["refusal"]
        assert mine["sharded"] and mine["share_of_a_weight"] == 0.5
    assert_like_one_alone(found, distributed_run.SCENARIOS["whole"](), tolerance=1e-5)


def test_one_process_alone_is_no_group():
    workers = Workers()
    assert workers.is_main and workers.share(3) == [0, 1, 2] and workers.gather("x") == ["x"]
    assert workers.together(lambda: 5) == 5
    with pytest.raises(KeyError):
        workers.together(lambda: {}["missing"])
