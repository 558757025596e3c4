"""What the command line prints: JSON, tables, help and completion, and the examples of its page."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from peft_edit.cli import main
from peft_edit.cli.output import Output, Result, Table, duration, size, to_json
from peft_edit.cli.parser import build_parser
from peft_edit.cli.shells import SHELLS, commands
from peft_edit.tiny import load_tiny_facts

from .cli_run import document


pytest_plugins = "tests.cli_run"


def test_json_has_no_nan():
    assert json.loads(to_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"y", "x"}, "d": Path("p")})) == {
        "a": None,
        "b": [None, 1.5],
        "c": ["x", "y"],
        "d": "p",
    }


def test_tables():
    lines = str(Table(("id", "n"), [("7f", "5"), ("8", "12")])).split("\n")
    assert lines == ["id   n", "--  --", "7f   5", "8   12"]
    assert [size(0), size(2048), size(3 * 1024**3)] == ["0 B", "2.0 KiB", "3.0 GiB"]
    assert [duration(1.24), duration(600), duration(7200)] == ["1.2 s", "10 min", "2.0 h"]


def test_rich_tables_on_a_terminal(capsys, monkeypatch):
    pytest.importorskip("rich")
    result = Result({}, [Table(("id", "target"), [("1", "[red]Oslo")])])
    Output().show(result)
    assert capsys.readouterr().out.splitlines()[1].startswith("--")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    Output().show(result)
    rich = capsys.readouterr().out
    assert "[red]Oslo" in rich and "--" not in rich
    monkeypatch.setitem(sys.modules, "rich.console", None)
    Output().show(result)
    assert "--" in capsys.readouterr().out


def test_help_and_version(run):
    code, out, _ = run("--help")
    assert code == 0 and all(command.name in out for command in commands(build_parser()))
    assert run("--version")[1].startswith("peft-edit ")
    for command in commands(build_parser()):
        code, out, _ = run(command.name, "--help")
        assert code == 0 and "--json" in out and command.help.rstrip(".")[:20] in out


def test_completion_in_json(run):
    found = document(run, "completion", "bash")
    assert found["shell"] == "bash" and found["script"] == run("completion", "bash")[1].rstrip("\n")


@pytest.mark.parametrize("shell", sorted(SHELLS))
def test_scripts_are_sound(shell, run, tmp_path):
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    path = tmp_path / "script"
    path.write_text(run("completion", shell)[1])
    assert subprocess.run([program, "-n", path], capture_output=True, text=True).stderr == ""


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes(run, tmp_path):
    (tmp_path / "script").write_text(run("completion", "bash")[1])
    (tmp_path / "my facts.jsonl").write_text("")

    def complete(*words):
        script = (
            'source ./script; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _peft_edit 2>/dev/null; '
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
        command = ["bash", "-c", script, "bash", "peft-edit", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout.splitlines()

    assert complete("e") == ["edit", "eval", "export-lora"]
    assert complete("edit", "tiny", "f", "--method", "me") == ["memit", "memit-forgetful"]
    assert complete("edit", "tiny", "my") == ["my facts.jsonl"]
    assert complete("show", "x", "--dtype", "f") == ["float32", "float16"]
    assert complete("completion", "z") == ["zsh"]
    assert "--statistics-text" in complete("edit", "--sta")


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes(run, tmp_path):
    (tmp_path / "script").write_text(run("completion", "fish")[1])
    script = 'function peft-edit; end; source script; complete -C "peft-edit edit tiny f --method me"'
    found = subprocess.run(["fish", "-N", "-c", script], cwd=tmp_path, capture_output=True, text=True).stdout
    assert [line.split("\t")[0] for line in found.splitlines()] == ["memit", "memit-forgetful"]


def test_python_m(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["peft-edit", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("peft_edit", run_name="__main__")
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("peft-edit ")


# --- the page ----------------------------------------------------------------------------------------------------


PAGE = Path(__file__).parents[1] / "docs" / "cli.md"


def shape(line):
    """A line without its numbers, whose widths, and with that the columns', may differ between machines."""
    return re.sub(r"[-\s]+", " ", re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?", "0", line)).strip()


@pytest.mark.skipif(not PAGE.is_file(), reason="the documentation is not there")
def test_examples_of_the_page(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [f"{fact.filled_prompt} {fact.target_true}." for fact in load_tiny_facts()[300:1200]]
    Path("text.txt").write_text("\n\n".join(texts))
    ran = 0
    for block in re.findall(r"^```console\n\$ (.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        command, _, shown = block.partition("\n")
        program, *arguments = shlex.split(command)
        if program == "cat":
            Path(arguments[0]).write_text(shown)
        elif program == "cp":
            shutil.copytree(*arguments[1:])
        elif program == "peft-edit" and shown and "\n$ " not in block:  # not the interrupted one, nor real pushes
            capsys.readouterr()
            code = main(arguments)
            captured = capsys.readouterr()
            assert code == (1 if "peft-edit: " in shown else 0), command
            said = [shape(line) for line in (captured.err + captured.out).splitlines()]
            for line in shown.splitlines():
                assert shape(line) in said, f"{command}: {line}"
            ran += 1
    assert ran >= 13
