"""Compare two adapters: facts in one of them only, other targets, and how far their deltas are apart."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from ...memory import EditRecord
from ..adapters import AdapterFiles
from ..errors import CliError
from ..models import adapter_folder
from ..output import Output, Result, Table, shorten


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `peft-edit diff`."""
    parser.add_argument("first", help="an adapter: directory or Hub id")
    parser.add_argument("second", help="the other one")


def run(args: argparse.Namespace, out: Output) -> Result:
    """Compares ledgers and deltas."""
    first, second = (AdapterFiles.read(adapter_folder(name)) for name in (args.first, args.second))
    mine = {record.key: record for record in first.held()}
    theirs = {record.key: record for record in second.held()}
    changed = [
        (record, theirs[key])
        for key, record in mine.items()
        if key in theirs and theirs[key].target.strip() != record.target.strip()
    ]
    modules = _distances(first, second)
    removed = [record for key, record in mine.items() if key not in theirs]
    added = [record for key, record in theirs.items() if key not in mine]
    document = {
        "first": args.first,
        "second": args.second,
        "only_in_first": [asdict(record) for record in removed],
        "only_in_second": [asdict(record) for record in added],
        "other_targets": [{"first": asdict(one), "second": asdict(other)} for one, other in changed],
        "modules": modules,
        "same_facts": not (removed or added or changed),
        "same_deltas": all(module["distance"] == 0 for module in modules),
    }
    return Result(document, _blocks(document, removed, added, changed))


def _distances(first: AdapterFiles, second: AdapterFiles) -> list[dict[str, Any]]:
    """||Δ1||, ||Δ2|| and ||Δ1 − Δ2|| of each module; a module that one adapter has not counts as 0 there."""
    others = dict(second.deltas())
    rows = []
    for name, delta in first.deltas():
        other = others.pop(name, None)
        if other is not None and other.shape != delta.shape:
            raise CliError(
                f"The deltas of '{name}' have the shapes {tuple(delta.shape)} and {tuple(other.shape)}: these are "
                "adapters of different models."
            )
        one = delta.double()
        two = other.double() if other is not None else one * 0
        rows.append(_distance(name, float(one.norm()), float(two.norm()), float((one - two).norm())))
    rows += [
        _distance(name, 0.0, float(delta.double().norm()), float(delta.double().norm()))
        for name, delta in others.items()
    ]
    return rows


def _distance(name: str, first: float, second: float, apart: float) -> dict[str, Any]:
    return {"name": name, "first": first, "second": second, "distance": apart}


def _blocks(
    document: dict[str, Any],
    removed: list[EditRecord],
    added: list[EditRecord],
    changed: list[tuple[EditRecord, EditRecord]],
) -> list[str | Table]:
    lines = [f"- {_line(record)} {record.target.strip()}" for record in removed]
    lines += [f"+ {_line(record)} {record.target.strip()}" for record in added]
    lines += [f"~ {_line(one)} {one.target.strip()} -> {other.target.strip()}" for one, other in changed]
    summary = (
        f"{len(removed)} fact(s) only in '{document['first']}', {len(added)} only in '{document['second']}', "
        f"{len(changed)} with other targets."
    )
    rows = [
        (m["name"], f"{m['first']:.4g}", f"{m['second']:.4g}", f"{m['distance']:.4g}") for m in document["modules"]
    ]
    blocks: list[str | Table] = [summary]
    if lines:
        blocks.append("\n".join(lines))
    return [*blocks, Table(("module", "||Δ1||", "||Δ2||", "||Δ1 - Δ2||"), rows)]


def _line(record: EditRecord) -> str:
    return f"{record.id}  {shorten(record.filled_prompt, 64)}"
