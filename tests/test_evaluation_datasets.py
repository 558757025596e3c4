"""Editing data sets are loaded: local files, streaming, directories, the Hub, pinned revisions, missing sources."""

import json
import sys
import warnings
from itertools import islice
from pathlib import Path

import pytest

from peft_edit.evaluation import cases, datasets
from peft_edit.evaluation.cases import CaseError
from peft_edit.evaluation.datasets import (
    DATASETS,
    cases_from_record,
    load_cases,
    load_counterfact,
    load_jsonl,
    load_knowedit,
    load_mquake,
    load_multi_counterfact,
    load_ripple_edits,
    load_zsre,
)

from .dataset_records import EASYEDIT, FLAT, KNOWEDIT, MEND, MQUAKE, NESTED, REMASTERED, RIPPLE, one, written


SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.mark.parametrize(
    ("loader", "options", "record"),
    [
        (load_counterfact, {}, NESTED),
        (load_counterfact, {}, FLAT),
        (load_multi_counterfact, {}, NESTED),
        (load_zsre, {}, EASYEDIT),
        (load_zsre, {"form": "mend"}, MEND),
        (load_mquake, {}, MQUAKE),
        (load_mquake, {"variant": "remastered_cf_3k"}, REMASTERED),
        (load_ripple_edits, {"subset": "random"}, RIPPLE),
        (load_knowedit, {"subset": "wiki_counterfact"}, KNOWEDIT),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_every_loader_reads_local_files(tmp_path, loader, options, record, suffix):
    expected = cases_from_record(record)
    path = written(tmp_path, [record, record, record], suffix)
    assert loader(path, limit=2, **options) == 2 * expected
    assert list(loader(path, streaming=True, **options)) == 3 * expected


def test_streaming_reads_lines_only_when_asked(tmp_path):
    path = written(tmp_path, [FLAT, FLAT])
    with path.open("a") as file:
        file.write("{broken\n")
    stream = load_jsonl(path, streaming=True)
    assert [next(stream), next(stream)] == 2 * [one(FLAT)]
    with pytest.raises(CaseError, match="Line 3 of .* is not valid JSON"):
        next(stream)
    assert load_jsonl(path, limit=2) == 2 * [one(FLAT)], "the broken line is never reached"


def test_streaming_reads_arrays_piece_by_piece(tmp_path):
    path = tmp_path / "array.json"
    count = 600
    path.write_text("[" + ", ".join([json.dumps(FLAT)] * count) + ", {broken]")
    assert path.stat().st_size > 2 * datasets._CHUNK
    stream = load_cases(path, streaming=True)
    assert list(islice(stream, count)) == count * [one(FLAT)]
    with pytest.raises(CaseError, match=f"not valid JSON after record {count} "):
        next(stream)


def test_json_values_agree_with_the_json_module(tmp_path, monkeypatch):
    values = [{"text": "ü" * length, "list": [1, {"a": "]"}]} for length in (0, 1, 50, 300)] + [[], "x", None]
    values += range(1000, 1040)
    path = tmp_path / "values.json"
    for chunk in (1, 2, 7, 64, 4096):
        monkeypatch.setattr(datasets, "_CHUNK", chunk)
        for indent in (None, 2):
            path.write_text(json.dumps(values, indent=indent, ensure_ascii=False), encoding="utf-8")
            assert list(datasets._json_values(path)) == values
        path.write_text("\n".join(json.dumps(value) for value in values) + "\n1234")
        assert list(datasets._json_values(path)) == [*values, 1234]


@pytest.mark.parametrize("text", ["[1, 2", "[1, 2,", "[", "]", '[{"a": 1}, {"b"', '{"a": '])
def test_cut_files_are_refused(tmp_path, text):
    path = tmp_path / "cut.json"
    path.write_text(text)
    with pytest.raises(CaseError, match="not valid JSON after record"):
        list(datasets._json_values(path))


def test_bundled_needs_nothing(facts):
    assert [case.fact for case in load_cases("bundled")] == facts
    assert next(load_cases("bundled", streaming=True)).fact == facts[0]
    assert len(load_cases("bundled", limit=3)) == 3


def test_unknown_names_list_the_known_ones(tmp_path):
    with pytest.raises(CaseError) as error:
        load_cases("counterfacts")
    assert all(name in str(error.value) for name in ["bundled", *DATASETS])
    with pytest.raises(CaseError, match="no file 'gone.jsonl'"):
        load_cases("gone.jsonl", streaming=True)
    with pytest.raises(CaseError, match="no file or directory '/no/such/place'"):
        load_cases("counterfact", source="/no/such/place")
    with pytest.raises(CaseError, match="subset must be one of popular, random, recent, got 'old'"):
        load_ripple_edits(subset="old")
    with pytest.raises(CaseError, match="split must be one of test, train, got 'dev'"):
        load_knowedit(split="dev")
    with pytest.raises(CaseError, match="holds no file 'recent_test.json'"):
        load_knowedit(tmp_path)


def test_a_directory_in_the_published_form(tmp_path):
    folder = tmp_path / "benchmark" / "wiki_recent"
    folder.mkdir(parents=True)
    (folder / "recent_test.json").write_text(json.dumps([KNOWEDIT]))
    (folder / "recent_train.json").write_text(json.dumps([EASYEDIT]))
    assert load_knowedit(tmp_path) == load_knowedit(folder) == [one(KNOWEDIT)]
    assert load_knowedit(tmp_path, split="train") == [one(EASYEDIT)]


def test_a_directory_of_tables(tmp_path):
    hf = pytest.importorskip("datasets")
    hf.Dataset.from_list([NESTED, NESTED]).to_parquet(tmp_path / "data" / "train-0.parquet")
    hf.Dataset.from_list([NESTED]).to_parquet(tmp_path / "data" / "test-0.parquet")
    assert load_counterfact(tmp_path) == 3 * [one(NESTED)]
    assert list(load_counterfact(tmp_path, streaming=True, split="train")) == 2 * [one(NESTED)]


def test_tables_are_asked_for_at_the_pinned_revision(monkeypatch):
    hf = pytest.importorskip("datasets")
    calls = []

    def load_dataset(repo, **options):
        calls.append((repo, options))
        return [NESTED] if options["split"] == "test" else [NESTED, NESTED]

    monkeypatch.setattr(hf, "load_dataset", load_dataset)
    pinned = DATASETS["counterfact"].revision
    assert len(load_counterfact()) == 3
    assert calls == [
        ("azhx/counterfact", {"split": split, "revision": pinned, "streaming": False}) for split in ("train", "test")
    ]
    calls.clear()
    list(load_counterfact("me/copy", split="test", revision="v2", streaming=True))
    assert calls == [("me/copy", {"split": "test", "revision": "v2", "streaming": True})]
    calls.clear()
    assert load_cases("me/any", limit=1) == [one(NESTED)]
    assert calls == [("me/any", {"split": "train", "revision": None, "streaming": False})]


def test_files_are_asked_for_at_the_pinned_revision(monkeypatch, tmp_path):
    hf, hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    calls = []

    def hf_hub_download(*args, **options):
        calls.append((args, options))
        return str(written(tmp_path, [KNOWEDIT]))

    class Downloads:
        def download(self, url):
            calls.append(url)
            return str(written(tmp_path, [MQUAKE]))

    monkeypatch.setattr(hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(hf, "DownloadManager", Downloads)
    assert load_knowedit() == [one(KNOWEDIT)]
    pinned = {"repo_type": "dataset", "revision": DATASETS["knowedit_wiki_recent"].revision}
    assert calls.pop() == (("zjunlp/KnowEdit", "benchmark/wiki_recent/recent_test.json"), pinned)
    assert len(load_mquake(revision="abc")) == 2
    assert calls.pop() == "https://raw.githubusercontent.com/princeton-nlp/MQuAKE/abc/datasets/MQuAKE-CF-3k-v2.json"


def test_an_unreachable_hub_asks_for_a_local_file(monkeypatch):
    hf, hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")

    def fail(*args, **options):
        raise ConnectionError("name or service not known")

    def fail_later(*args, **options):
        yield NESTED
        raise OSError("connection lost")

    monkeypatch.setattr(hf, "load_dataset", fail)
    monkeypatch.setattr(hub, "hf_hub_download", fail)
    monkeypatch.setattr(hf.DownloadManager, "download", fail)
    said = r"could not be reached \(ConnectionError\): give the path of a local copy, load_cases\('{}', source="
    for name in ("counterfact", "zsre", "multi_counterfact", "mquake_t", "ripple_edits_recent"):
        with pytest.raises(ConnectionError, match=said.format(name)):
            load_cases(name, streaming=True)
    monkeypatch.setattr(hf, "load_dataset", fail_later)
    stream = load_counterfact(streaming=True)
    assert next(stream) == one(NESTED)
    with pytest.raises(ConnectionError, match=r"reached \(OSError\)"):
        next(stream)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in ("counterfact", "multi_counterfact"):
        with pytest.raises(ImportError, match=r"pip install 'peft-edit\[eval\]'"):
            load_cases(name)


def test_pinned_revisions_are_whole_commits():
    pinned = [spec.revision for spec in DATASETS.values() if spec.revision not in ("", "main")]
    assert pinned and all(len(revision) == 40 and int(revision, 16) for revision in pinned)


@pytest.mark.skipif(not (SHARED / "counterfact.json").is_file(), reason="the published file is not here")
def test_the_published_counterfact():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_counterfact(SHARED / "counterfact.json")
    assert len(loaded) == len(json.loads((SHARED / "counterfact.json").read_text())) == 15006
    for case in loaded:
        assert case.fact.target_true and len(case.fact.paraphrases) == 1
        assert len(case.fact.neighborhood) + len(case.probes.get(cases.UNRELATED, ())) == 1


@pytest.mark.skipif(not (SHARED / "zsre_test.json").is_file(), reason="the published file is not here")
def test_the_published_zsre():
    with pytest.warns(UserWarning, match=r"3 record\(s\) cannot be edited.*: 396 of .*; 597 of .*; 676 of "):
        loaded = load_zsre(SHARED / "zsre_test.json")
    records = json.loads((SHARED / "zsre_test.json").read_text())
    assert len(loaded) == len(records) - 3 == 1301
    kept = [record for index, record in enumerate(records) if index not in (396, 597, 676)]
    count = sum(len(items) for record in kept for items in record["portability"].values())
    count += sum(len(items) for record in kept for items in record["locality"].values())
    assert sum(len(probes) for case in loaded for probes in case.probes.values()) == count
    assert all(case.fact.filled_prompt == record["prompt"] for case, record in zip(loaded, kept))
