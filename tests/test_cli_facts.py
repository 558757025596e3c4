"""The facts and texts that the command line reads: their forms, and what is refused."""

import sys

import pytest

from peft_edit.cli.sources import read_facts, read_texts
from peft_edit.tiny import load_tiny_facts

from .cli_run import write_facts


pytest_plugins = "tests.cli_run"


def test_facts_of_csv(tmp_path):
    path = tmp_path / "facts.csv"
    path.write_text(
        "\ufeffsubject,prompt,target,target_true,paraphrases,notes\n"
        'Ada,"{}, who is from",Rome,Paris,"{} is of | They say {} lives in",x\n'
        "\n"
        "Ben,{} is,Oslo,,,\n",
        encoding="utf-8",
    )
    read = read_facts(str(path))
    assert not read.problems and read.places == ["line 2", "line 4"]
    ada, ben = read.sound()
    assert (ada.prompt, ada.target_true) == ("{}, who is from", "Paris")
    assert ada.paraphrases == ("{} is of", "They say {} lives in")
    assert (ben.target_true, ben.paraphrases, ben.neighborhood) == (None, (), ())
    for suffix, delimiter in ((".csv", ";"), (".tsv", "\t")):
        other = path.with_suffix(suffix)
        other.write_text(f"subject{delimiter}prompt{delimiter}target\nAda{delimiter}{{}} is{delimiter}Rome, Italy\n")
        assert read_facts(str(other)).sound()[0].target == "Rome, Italy"


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("a.csv", "subject,prompt\nAda,{} is\n", "has no column 'target'"),
        ("a.csv", "subject,prompt,target\nAda,{} is\n", "line 2: has 2 cells, the first line names 3"),
        ("a.csv", 'subject,prompt,target\nAda,"{} is,Rome\n', "is not valid CSV"),
        ("a.jsonl", '{"subject": "Ada"}\n', "line 1: field 'prompt' is empty"),
        ("a.jsonl", "[1]\n", "line 1: expected a Fact or a mapping, got list"),
        ("a.jsonl", "", "there are no facts in this source"),
        ("a.json", "[{]", "is not valid JSON (Expecting property name"),
        ("a.xml", "<a/>", "has none of the endings .jsonl, .json, .csv and .tsv"),
        (
            "a.jsonl",
            '{"subject": "A", "prompt": "{} is", "target": "B"}\n{"subject": "A", "prompt": "{} is", "target": "C"}\n',
            "line 2: 'A is' cannot be both 'B' (line 1) and 'C'",
        ),
        (
            "a.jsonl",
            '{"id": 1, "subject": "A", "prompt": "{} is", "target": "B"}\n'
            '{"id": 1, "subject": "D", "prompt": "{} is", "target": "C"}\n',
            "line 2: the id '1' is that of line 1 too",
        ),
    ],
)
def test_facts_that_are_refused(fails, tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    fails(said, "edit", "tiny", tmp_path / name, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_many_bad_facts_in_one_sentence(fails, tmp_path):
    (tmp_path / "a.jsonl").write_text("x\n" * 7)
    said = fails("7 bad fact(s)", "edit", "tiny", tmp_path / "a.jsonl", "-o", tmp_path / "out")
    assert "line 5" in said and "line 6" not in said and "And 2 more." in said


def test_a_file_that_is_no_text(fails, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\x00")
    fails("is not UTF-8 text (byte 0)", "edit", "tiny", tmp_path / "a.jsonl", "-o", tmp_path / "out")


def test_facts_of_a_dataset(tmp_path):
    pytest.importorskip("datasets")
    known = load_tiny_facts()[:3]
    (tmp_path / "data").mkdir()
    write_facts(tmp_path / "data" / "train.jsonl", known)
    facts = read_facts(str(tmp_path / "data"), limit=2).sound()
    assert [fact.key for fact in facts] == [fact.key for fact in known[:2]]
    assert facts[0].paraphrases == known[0].paraphrases


def test_a_directory_that_is_no_dataset(fails, tmp_path):
    (tmp_path / "deep" / "down").mkdir(parents=True)
    write_facts(tmp_path / "deep" / "down" / "train.jsonl", load_tiny_facts()[:1])
    fails("holds no data files (.jsonl, .json, ", "edit", "tiny", tmp_path, "-o", tmp_path / "out")
    fails("name a file, or the directory of a dataset", "stats", "tiny", tmp_path, "-o", tmp_path / "out")


def test_facts_with_unusual_line_separators(tmp_path):
    for name, text in (
        ("a.csv", "subject,prompt,target\nRen\u2028X,{} is,Oslo\n"),
        ("a.jsonl", '{"subject": "Ren\u2028X", "prompt": "{} is", "target": "Oslo"}\n'),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        (fact,) = read_facts(str(tmp_path / name)).sound()
        assert fact.subject == "Ren\u2028X"


def test_a_dataset_without_the_library(fails, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    fails("pip install 'peft-edit[eval]'", "edit", "tiny", "user/facts", "-o", tmp_path / "out")


def test_texts(tmp_path):
    (tmp_path / "a.txt").write_text("one\nline\n\n \n\ntwo\n")
    assert list(read_texts(str(tmp_path / "a.txt"))) == ["one\nline", "two\n"]
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n{"body": "y"}\n')
    assert list(read_texts(str(tmp_path / "a.jsonl"), column="body")) == ["x", "y"]
