"""The command line in process on the bundled model: fixtures that run it, and the adapter that its tests share.

Test modules name this one in `pytest_plugins`, so that each session makes the adapter once, and not each module.
They import its functions too, before pytest could rewrite its asserts: PYTEST_DONT_REWRITE.
"""

import json
import shutil
from pathlib import Path

import pytest

from peft_edit.cli import main
from peft_edit.facts import fact_to_dict
from peft_edit.tiny import load_tiny_facts


FACTS = 4
QUICK = ["--set", "num_contexts=1"]


def write_facts(path, facts):
    path.write_text("".join(json.dumps(fact_to_dict(fact)) + "\n" for fact in facts))
    return str(path)


def contents(folder):
    """Every file below a directory and what it holds."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def document(run, *argv, code=0):
    """The JSON document of a command."""
    found, out, err = run(*argv, "--json")
    assert found == code, err
    return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.fixture(scope="session")
def statistics(tiny_statistics, tmp_path_factory):
    folder = tmp_path_factory.mktemp("statistics")
    tiny_statistics.save(folder)
    return str(folder)


@pytest.fixture(scope="session")
def facts_file(tmp_path_factory):
    return write_facts(tmp_path_factory.mktemp("facts") / "facts.jsonl", load_tiny_facts()[:FACTS])


@pytest.fixture(scope="session")
def edited(facts_file, statistics, tmp_path_factory):
    """An adapter that the command line has made, in batches of two. Not to be changed."""
    output = tmp_path_factory.mktemp("edited") / "edits"
    arguments = [facts_file, "-o", str(output), "--statistics", statistics, "--batch-size", "2", *QUICK, "--quiet"]
    assert main(["edit", "tiny", *arguments]) == 0
    return output


@pytest.fixture
def adapter(edited, tmp_path):
    """The same adapter, to be changed."""
    return Path(shutil.copytree(edited, tmp_path / "adapter"))


@pytest.fixture
def run(capsys):
    """Runs a command; gives exit code, stdout and stderr."""

    def call(*argv):
        capsys.readouterr()
        code = main([str(argument) for argument in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def fails(run):
    """Runs a command that is to fail: with this exit code, one sentence on stderr that holds the text, no output."""

    def call(text, *argv, code=1):
        found, out, err = run(*argv, "--quiet")
        assert found == code, err
        assert out == "" and "Traceback" not in err, out + err
        assert err.startswith("peft-edit: ") and err.count("\n") == 1, err
        assert text in err, err
        return err

    return call
