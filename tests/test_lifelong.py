"""Lifelong runs: streams, checkpoints, resuming after a kill to the same bits, logs."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_edit import EditConfig, Fact
from peft_edit.checkpoints import find_checkpoint
from peft_edit.facts import FactError

from .models import build_model
from .world import texts, town_facts, word_tokenizer


def small(**settings):
    config = EditConfig(
        task_type="CAUSAL_LM", layers_to_transform=[0, 1], target_modules=["mlp.down_proj"], num_contexts=1, **settings
    )
    model = get_peft_model(build_model("llama"), config).eval()
    model.collect_statistics(texts(), word_tokenizer())
    return model


def edit(model, facts, **options):
    return model.edit_facts(facts, word_tokenizer(), batch_size=2, progress=False, **options)


def state(model):
    memory = model.peft_config["default"].memory
    deltas = {name: layer.get_delta("default").clone() for name, layer in model.edit_layers().items()}
    return deltas, memory.keys, memory.values, [record.key for record in memory.records]


def assert_same(one, other):
    assert one[3] == other[3]
    for mine, theirs in zip(one[:3], other[:3]):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_stream_is_read_batch_by_batch_and_gives_what_a_list_gives():
    facts, read = town_facts(7), []

    def stream():
        for fact in facts:
            read.append(fact)
            yield fact

    one, other = small(), small()
    edit(one, facts)
    report = edit(other, stream())
    assert len(read) == 7 and len(report.facts) == 7
    assert_same(state(one), state(other))


def test_a_bad_fact_in_a_stream_stops_there():
    model = small()
    items = [*town_facts(3), {"subject": "Ada", "prompt": "no placeholder", "target": "Rome"}]
    with pytest.raises(FactError, match="In the facts from 2 on"):
        edit(model, iter(items))
    assert len(model.edited_facts()) == 2


def test_streaming_datasets():
    datasets = pytest.importorskip("datasets")
    rows = [{"subject": fact.subject, "prompt": fact.prompt, "target": fact.target} for fact in town_facts(4)]
    model = small()
    edit(model, datasets.Dataset.from_list(rows).to_iterable_dataset())
    assert [record.subject for record in model.edited_facts()] == [row["subject"] for row in rows]


class Stopped(Exception):
    """In the place of a kill."""


@pytest.mark.parametrize("budget", [None, 0.2])
@pytest.mark.parametrize("replacing", [False, True])
def test_resumes_to_the_same_bits_wherever_it_was_stopped(tmp_path, budget, replacing):
    facts = town_facts(9)
    if replacing:  # the second half gives new targets to some facts of the first
        facts = [
            *facts,
            *(Fact(fact.subject, fact.prompt, "Lima" if fact.target != "Lima" else "Oslo") for fact in facts[:4]),
        ]
    whole = small(norm_budget=budget)
    edit(whole, iter(facts), output_dir=tmp_path / "whole")
    stops = 0

    def stream(limit):
        for count, fact in enumerate(facts):
            if count == limit:
                raise Stopped
            yield fact

    run = tmp_path / "stopped"
    for limit in (0, 3, 6, 8, 11):
        if limit >= len(facts):
            break
        with pytest.raises(Stopped):
            edit(small(norm_budget=budget), stream(limit), output_dir=run, resume_from_checkpoint=True)
        stops += 1
    resumed = small(norm_budget=budget)
    report = edit(resumed, iter(facts), output_dir=run, resume_from_checkpoint=True)
    assert 0 < len(report.facts) < len(facts) and stops >= 4
    assert_same(state(whole), state(resumed))
    assert [path.name for path in run.iterdir()] == [f"checkpoint-{len(facts)}"]
    for name in ("adapter_model.safetensors", "edit_memory.safetensors"):
        [one, other] = [(find_checkpoint(folder) / name).read_bytes() for folder in (tmp_path / "whole", run)]
        assert one == other


def test_a_checkpoint_is_an_adapter(tmp_path):
    model = small()
    edit(model, town_facts(4), output_dir=tmp_path, save_steps=10)
    loaded = PeftModel.from_pretrained(build_model("llama"), find_checkpoint(tmp_path)).eval()
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert [record.key for record in loaded.edited_facts()] == [fact.key for fact in town_facts(4)]
    again = edit(small(), town_facts(4), output_dir=tmp_path, resume_from_checkpoint=True)
    assert again.facts == [] and again.facts_held == 4


def test_other_facts_or_settings_are_refused(tmp_path):
    edit(small(), town_facts(4), output_dir=tmp_path)
    fresh = small()
    with pytest.raises(ValueError, match="pass resume_from_checkpoint=True"):
        edit(fresh, town_facts(4), output_dir=tmp_path)
    with pytest.raises(ValueError, match="not those of the run"):
        edit(fresh, town_facts(9)[3:], output_dir=tmp_path, resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="batches of 2, not 3"):
        fresh.edit_facts(
            town_facts(4), word_tokenizer(), batch_size=3, output_dir=tmp_path, resume_from_checkpoint=True
        )
    (find_checkpoint(tmp_path) / "run_state.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be resumed"):
        edit(small(), town_facts(4), output_dir=tmp_path, resume_from_checkpoint=True)


def test_the_log_goes_to_a_tracker():
    rows = []

    class Tracker:
        def log(self, values, step):
            rows.append((step, values))

    model = small()
    report = edit(model, town_facts(6), tracker=Tracker(), probes=3)
    assert [step for step, _ in rows] == [2, 4, 6]
    for batch, (_, values) in enumerate(rows):
        assert values["edit/search_steps"] == sum(fact.steps for fact in report.facts[2 * batch : 2 * batch + 2]) / 2
        assert values["edit/norm_share/model.layers.0.mlp.down_proj"] == list(report.norms[batch].values())[0]
        assert 0 <= values["probe/recalled"] <= 1 and 0 < values["probe/probability"] <= 1
    json.dumps(rows)


def test_tensorboard_through_accelerate(tmp_path):
    pytest.importorskip("tensorboard")
    from accelerate import Accelerator

    accelerator = Accelerator(log_with="tensorboard", project_dir=tmp_path, cpu=True)
    accelerator.init_trackers("edits")
    edit(small(), town_facts(2), tracker=accelerator)
    accelerator.end_training()
    assert any(path.stat().st_size > 0 for path in tmp_path.rglob("events.out.tfevents*"))


SCRIPT = """
import os, signal, sys
import torch
from peft import get_peft_model
import peft_edit.checkpoints as checkpoints
from peft_edit import EditConfig
from peft_edit.statistics import KeyStatistics
from peft_edit.tiny import load_tiny_facts, load_tiny_model

torch.set_num_threads(1)
run, statistics, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
calls = 0
replace = os.replace

def killing(*args):
    # The kill strikes at one of the renames that make a file or a checkpoint appear.
    global calls
    calls += 1
    if calls == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(*args)

os.replace = killing
base, tokenizer = load_tiny_model()
model = get_peft_model(base, EditConfig(task_type="CAUSAL_LM", search_steps=4, num_contexts=1)).eval()
model.edit_facts(
    iter(load_tiny_facts()[:8]), tokenizer, batch_size=2, statistics=KeyStatistics.load(statistics), progress=False,
    output_dir=run, resume_from_checkpoint=True,
)
model.save_pretrained(run + "-final")
"""


def test_killed_at_any_point_the_run_ends_with_the_same_adapter(tmp_path, tiny_statistics):
    name = "model.layers.0.mlp.down_proj"
    tiny_statistics.subset([name]).save(tmp_path / "statistics")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}

    def start(run, kill_at):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / run), str(tmp_path / "statistics"), str(kill_at)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    assert start("whole", 0).returncode == 0
    for kill_at in (5, 12, 7):
        before = find_checkpoint(tmp_path / "killed")
        assert start("killed", kill_at).returncode == -signal.SIGKILL
        after = find_checkpoint(tmp_path / "killed")
        assert before is None or int(after.name.split("-")[1]) >= int(before.name.split("-")[1])
    done = start("killed", 0)
    assert done.returncode == 0, done.stderr
    [whole, killed] = [
        load_file(tmp_path / f"{run}-final" / "adapter_model.safetensors") for run in ("whole", "killed")
    ]
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[key], killed[key]) for key in whole)


@pytest.mark.parametrize("change", ["facts", "batch size"])
def test_a_refused_resume_leaves_the_adapter_alone(tmp_path, change):
    edit(small(), town_facts(4), output_dir=tmp_path)
    model = small()
    edit(model, town_facts(6)[5:])
    before = state(model)
    others = town_facts(4)[::-1] if change == "facts" else town_facts(4)
    size = 2 if change == "facts" else 3
    with pytest.raises(ValueError, match="are not those of the run|has batches of 2, not 3"):
        model.edit_facts(
            others,
            word_tokenizer(),
            batch_size=size,
            progress=False,
            output_dir=tmp_path,
            resume_from_checkpoint=True,
        )
    assert_same(state(model), before)
