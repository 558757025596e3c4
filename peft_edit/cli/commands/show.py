"""Show what an adapter holds: its facts, norms and budget, without loading the model."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from ..adapters import AdapterFiles
from ..arguments import add_model_options, positive
from ..models import TINY, ModelChoice, adapter_folder, is_bundled, load_base, put_adapter
from ..output import Output, Result, Table, shorten


SETTINGS = ("method", "norm_budget", "norm_penalty", "preservation_weight", "update", "early_stopping")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `peft-edit show`."""
    parser.add_argument("adapter", help="the adapter: directory or Hub id")
    parser.add_argument("--subject", help="only facts on this subject")
    parser.add_argument(
        "--last", type=positive, metavar="N", help="only the last N facts; by default 20, with --json all"
    )
    parser.add_argument("--all", action="store_true", help="all facts")
    parser.add_argument("--check", action="store_true", help="read every file whole and check it")
    add_model_options(parser)


def run(args: argparse.Namespace, out: Output) -> Result:
    """The adapter's ledger and norms; with `--model` norms as shares of the base weights too."""
    files = AdapterFiles.read(adapter_folder(args.adapter))
    if args.check:
        files.check()
    norms = files.norms()
    modules = [{"name": name, "norm": norm, "share": None} for name, norm in norms.items()]
    if args.model is not None:
        modules = _with_shares(args, files)
    chosen = [record for record in files.records or () if args.subject in (None, record.subject.strip())]
    base_name = files.config.get("base_model_name_or_path") or ""
    document: dict[str, Any] = {
        "adapter": args.adapter,
        "base_model": TINY if is_bundled(base_name) else base_name,
        "facts_held": None if files.records is None else len(files.records),
        "batches": files.batches,
        "settings": {name: files.config.get(name) for name in SETTINGS},
        "statistics": {"tokens": files.statistics.get("tokens"), "source": files.statistics.get("source")},
        "modules": modules,
        "checked": args.check,
    }
    most = args.last or (None if args.all or out.as_json else 20)
    shown = chosen if most is None else chosen[-most:]
    document["facts"] = [asdict(record) for record in shown]
    return Result(document, _blocks(document, len(chosen) - len(shown)))


def _with_shares(args: argparse.Namespace, files: AdapterFiles) -> list[dict[str, Any]]:
    """Norms beside those of the base weights."""
    base, _ = load_base(ModelChoice.of(args, args.model))
    model: Any = put_adapter(base, files.folder)
    rows = []
    for name, layer in model.base_model.edit_layers().items():
        norm = float(layer.get_delta(model.active_adapter).double().norm())
        rows.append({"name": name, "norm": norm, "share": norm / layer.base_norm()})
    return rows


def _blocks(document: dict[str, Any], left_out: int) -> list[str | Table]:
    settings, statistics = document["settings"], document["statistics"]
    budget = settings["norm_budget"]
    held = document["facts_held"]
    lines = [
        f"Adapter '{document['adapter']}' on {document['base_model'] or 'a model that it does not name'}",
        "no edit memory: for inference only"
        if held is None
        else f"{held} facts in {document['batches']} batch(es), by {settings['method']}",
        f"norm budget {'none' if budget is None else f'{100 * budget:g} % of ||W0||'}, λp "
        f"{settings['preservation_weight']}, λn {settings['norm_penalty']}, update {settings['update']}",
    ]
    if statistics["tokens"]:
        lines.append(f"key statistics of {statistics['tokens']} tokens ({statistics['source'] or 'no source named'})")
    modules = Table(
        ("module", "||Δ||", "of ||W0||"),
        [
            (m["name"], f"{m['norm']:.4g}", "-" if m["share"] is None else f"{100 * m['share']:.2f}%")
            for m in document["modules"]
        ],
    )
    blocks: list[str | Table] = ["\n".join(lines), modules]
    if document["facts"]:
        rows = [
            (
                record["id"],
                shorten(record["prompt"].replace("{}", record["subject"], 1), 56),
                shorten(record["target"], 24),
                shorten(record["target_true"] or "", 24),
                str(record["batch"]),
                record["created"][:16].replace("T", " "),
            )
            for record in document["facts"]
        ]
        blocks.append(Table(("id", "prompt", "target", "before", "batch", "written (UTC)"), rows))
    if left_out:
        blocks.append(f"… and {left_out} older facts (--all shows them).")
    return blocks
