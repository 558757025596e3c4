"""The command line loses nothing: Ctrl-C, full and read-only disks, saves that were cut short."""

import errno
from pathlib import Path

import pytest

from peft_edit import checkpoints
from peft_edit.cli import saving as cli_saving
from peft_edit.cli.saving import READY, STAGED, finish_save, write_directory
from peft_edit.cli.write import ADAPTER_FILES

from .cli_run import QUICK, contents, document


pytest_plugins = "tests.cli_run"


# --- interrupted -------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(run, statistics, facts_file, tmp_path, monkeypatch):
    """A run of four facts, one a batch, that Ctrl-C ended after two checkpoints; its arguments and directory."""
    output = tmp_path / "run"
    arguments = ["edit", "tiny", facts_file, "-o", output, "--statistics", statistics, "--batch-size", 1, *QUICK]
    save, saved = checkpoints.save_checkpoint, []

    def interrupt_third(*args, **kwargs):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(save(*args, **kwargs))
        return saved[-1]

    with monkeypatch.context() as patch:
        patch.setattr("peft_edit.lifelong.save_checkpoint", interrupt_third)
        code, out, err = run(*arguments, "--quiet")
    assert (code, out) == (130, "")
    assert err == (
        f"peft-edit: Interrupted with 2 of 4 facts in '{output / 'checkpoint-2'}': run the same command with --resume "
        "to go on.\n"
    )
    return arguments, output


def test_ctrl_c_leaves_a_run_that_is_resumed_to_the_last_bit(
    run, fails, interrupted, facts_file, statistics, tmp_path
):
    arguments, output = interrupted
    assert [path.name for path in output.iterdir()] == ["checkpoint-2"]
    fails("holds an interrupted run (checkpoint-2): go on with it (--resume)", *arguments)
    fails("was begun with search_steps=25, not 7", *arguments, "--resume", "--set", "search_steps=7")
    found = document(run, *arguments, "--resume")
    assert len(found["facts"]) == 2 and found["facts_held"] == 4
    assert not list(output.glob("checkpoint-*"))
    whole = tmp_path / "whole"
    assert run(*[whole if argument is output else argument for argument in arguments])[0] == 0
    assert (whole / "adapter_model.safetensors").read_bytes() == (output / "adapter_model.safetensors").read_bytes()
    # A finished run that is resumed has nothing left to do.
    before = contents(output)
    assert document(run, *arguments, "--resume")["finished_before"]
    assert contents(output) == before


def test_a_run_is_dropped_only_when_asked(run, interrupted):
    arguments, output = interrupted
    assert (
        run("show", output)[2]
        .strip()
        .endswith("It holds checkpoints of a run: `peft-edit edit --resume` finishes it.")
    )
    found = document(run, *arguments, "--overwrite")
    assert len(found["facts"]) == 4 and not list(output.glob("checkpoint-*"))


def test_ctrl_c_before_the_first_checkpoint_leaves_nothing(run, statistics, facts_file, tmp_path, monkeypatch):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_edit.editing.search_targets", interrupt)
    code, out, err = run("edit", "tiny", facts_file, "-o", tmp_path / "a" / "b", "--statistics", statistics, *QUICK)
    assert (code, out) == (130, "") and "Interrupted before the first checkpoint: nothing was written." in err
    assert not (tmp_path / "a" / "b").exists()
    (tmp_path / "c").mkdir()
    monkeypatch.chdir(tmp_path / "c")
    assert run("edit", "tiny", facts_file, "-o", ".", "--statistics", statistics, *QUICK)[0] == 130
    assert (tmp_path / "c").is_dir() and not list((tmp_path / "c").iterdir())


def test_ctrl_c_elsewhere(run, adapter, monkeypatch):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_edit.cli.commands.remove.load_adapter", interrupt)
    before = contents(adapter)
    code, _, err = run("remove", adapter, "--subject", "Sven Wollter")
    assert (code, err) == (130, "peft-edit: Interrupted; nothing was written.\n")
    assert contents(adapter) == before


# --- disks -------------------------------------------------------------------------------------------------------


def refuse(number, text):
    def write(*_args, **_kwargs):
        raise OSError(number, text)

    return write


@pytest.mark.parametrize(
    "number, said", [(errno.EROFS, "is on a read-only disk"), (errno.EACCES, "There is no permission for")]
)
def test_a_disk_that_cannot_be_written_is_found_before_the_work(fails, adapter, tmp_path, monkeypatch, number, said):
    def mkdir(path, *_args, **_kwargs):
        raise OSError(number, "", str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr("peft_edit.cli.models.choose_device", lambda _: pytest.fail("the model is being loaded"))
    for arguments in (["edit", "tiny", "tiny"], ["merge", adapter], ["export-lora", adapter]):
        fails(said, *arguments, "-o", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_output_under_a_file(fails, tmp_path):
    (tmp_path / "file").write_text("x")
    fails("is a file, and a directory is needed", "edit", "tiny", "tiny", "-o", tmp_path / "file")
    fails("leads through a file that is not a directory", "edit", "tiny", "tiny", "-o", tmp_path / "file" / "x")
    assert (tmp_path / "file").read_text() == "x"


def test_a_full_disk_loses_nothing(fails, adapter, facts_file, statistics, tmp_path, monkeypatch):
    before = contents(adapter)
    monkeypatch.setattr("peft_edit.memory.save_file", refuse(errno.ENOSPC, "No space left on device"))
    fails("The disk is full", "remove", adapter, "--subject", "Sven Wollter")
    fails("The disk is full", "edit", "tiny", facts_file, "--adapter", adapter, "--statistics", statistics)
    assert contents(adapter) == before
    fails("The disk is full", "edit", "tiny", facts_file, "-o", tmp_path / "x", "--statistics", statistics, *QUICK)
    monkeypatch.setattr("peft_edit.export.save_file", refuse(errno.ENOSPC, "No space left on device"))
    fails("The disk is full", "export-lora", adapter, "-o", tmp_path / "x")
    assert not (tmp_path / "x").exists()


# --- writing at once ---------------------------------------------------------------------------------------------


def test_a_directory_is_replaced_at_once_or_not_at_all(tmp_path):
    (tmp_path / "old.bin").write_text("old")
    (tmp_path / "mine.txt").write_text("mine")

    def fail(staged):
        (staged / "new.bin").write_text("half")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        write_directory(tmp_path, fail, stale=("*.bin",))
    assert contents(tmp_path) == {"old.bin": b"old", "mine.txt": b"mine"}
    write_directory(tmp_path, lambda staged: (staged / "new.bin").write_text("new"), stale=("*.bin",))
    assert contents(tmp_path) == {"new.bin": b"new", "mine.txt": b"mine"}


def test_a_save_that_was_cut_short_is_finished(run, edited, adapter, monkeypatch):
    replaced = cli_saving.os.replace

    def kill_after_three(source, target, calls=[]):  # noqa: B006 (counts)
        calls.append(target)
        if len(calls) == 4:
            raise SystemExit  # as if killed: nothing is put in order
        replaced(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(cli_saving.os, "replace", kill_after_three)
        with pytest.raises(SystemExit):
            write_directory(
                adapter,
                lambda staged: [(staged / name).write_text(f"new {name}") for name in ("a", "b", "c", "d")],
                stale=ADAPTER_FILES,
            )
    assert (adapter / READY).is_dir() and not (adapter / STAGED).exists()
    finish_save(adapter)
    assert {name: (adapter / name).read_text() for name in "abcd"} == {name: f"new {name}" for name in "abcd"}
    assert not (adapter / READY).exists() and not (adapter / "adapter_config.json").exists()
