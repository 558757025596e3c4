"""Take facts out of an adapter, as if they had never been written."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any

from ...adapter import module_reports
from ...memory import EditRecord
from ..adapters import AdapterFiles
from ..arguments import add_model_options, directory
from ..errors import CliError, UsageError
from ..models import adapter_folder, load_adapter
from ..output import Output, Result, Table, shorten
from ..saving import check_writable
from ..write import save_adapter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `peft-edit remove`."""
    parser.add_argument("adapter", help="the adapter: directory or Hub id")
    parser.add_argument("ids", nargs="*", metavar="ID", help="ids of facts, as `peft-edit show` lists them")
    parser.add_argument("--subject", action="append", default=[], help="all facts on this subject; may be given again")
    parser.add_argument("-o", "--output", type=directory, help="write to this directory; by default the adapter's own")
    parser.add_argument("--plan-only", action="store_true", help="say what would be removed; change nothing")
    add_model_options(parser)


def run(args: argparse.Namespace, out: Output) -> Result:
    """Removes the facts and writes the adapter back."""
    if not args.ids and not args.subject:
        raise UsageError("Say what to remove: ids, or --subject (see `peft-edit show`).")
    folder = adapter_folder(args.adapter)
    chosen = choose(AdapterFiles.read(folder).held(), args.ids, args.subject)
    output = args.output if args.output is not None else folder
    rows = [(record.id, shorten(record.filled_prompt, 64), record.target.strip()) for record in chosen]
    document = {
        "adapter": str(output),
        "removed": [{"id": r.id, "subject": r.subject, "prompt": r.prompt, "target": r.target} for r in chosen],
        "changed": not args.plan_only,
    }
    table = Table(("id", "prompt", "target"), rows)
    if args.plan_only:
        return Result(document, [table, f"{len(rows)} fact(s) would be removed; nothing was changed."])
    if args.output is None and not Path(args.adapter).is_dir():
        raise UsageError("--output is needed: an adapter of the Hub is not changed in the cache.")
    check_writable(output)
    model, _ = load_adapter(folder, args)
    model.remove_facts([record.id for record in chosen])
    save_adapter(model, output)
    held = len(model.edited_facts())
    tuner: Any = model.base_model
    reports = module_reports(tuner, model.active_adapter)
    document |= {
        "facts_held": held,
        "modules": [{"name": m.name, "norm": m.norm, "share": m.share} for m in reports],
    }
    return Result(document, [table, f"Removed {len(rows)} fact(s); '{output}' holds {held}."])


def choose(records: tuple[EditRecord, ...], ids: list[str], subjects: list[str]) -> list[EditRecord]:
    """The records of these ids and subjects, in the order of the ledger.

    Raises:
        CliError: naming the first id or subject that there is none of; near ones are proposed.
    """
    known_ids = {record.id for record in records}
    known_subjects = {record.subject.strip() for record in records}
    wanted_subjects = {subject.strip() for subject in subjects}
    for kind, wanted, known in (("id", ids, known_ids), ("subject", subjects, known_subjects)):
        for name in wanted:
            if name.strip() not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean '{near[0]}'?" if near else f"`peft-edit show` lists the {len(records)} it holds."
                raise CliError(f"The adapter holds no fact of the {kind} '{name}'; {hint}")
    chosen_ids = {name.strip() for name in ids}
    return [r for r in records if r.id in chosen_ids or r.subject.strip() in wanted_subjects]
