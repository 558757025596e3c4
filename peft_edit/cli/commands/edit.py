"""Write facts into a model: makes an adapter, or goes on editing one."""

from __future__ import annotations

import argparse
import shutil
import warnings
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from ...checkpoints import find_checkpoint
from ...facts import Fact
from ..adapters import AdapterFiles
from ..arguments import (
    add_model_options,
    add_set_option,
    add_source_options,
    directory,
    parse_settings,
    positive,
)
from ..editable import check_same_settings, check_statistics_named, editable_model, given_statistics
from ..errors import CliError, Interrupted, UsageError
from ..models import ModelChoice, adapter_folder, load_base
from ..output import Output, Result
from ..plan import make_plan
from ..saving import check_writable, finish_save
from ..sources import read_facts
from ..write import save_adapter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `peft-edit edit`."""
    parser.add_argument("model", help="base model: directory, Hub id, or 'tiny' for the bundled one")
    parser.add_argument("facts", help="facts: .jsonl, .json or .csv file, Hub dataset, or 'tiny' for the bundled ones")
    parser.add_argument(
        "-o", "--output", type=directory, help="directory of the adapter; by default that of --adapter"
    )
    parser.add_argument("--adapter", help="go on editing this adapter")
    add_set_option(parser)
    parser.add_argument("--batch-size", type=positive, metavar="N", help="facts that are solved for together")
    known = parser.add_mutually_exclusive_group()
    known.add_argument("--statistics", metavar="PATH", help="key statistics: directory or Hub id (`peft-edit stats`)")
    known.add_argument("--statistics-text", metavar="TEXT", help="collect key statistics from this text")
    parser.add_argument("--save-steps", type=positive, default=1, metavar="N", help="batches between two checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on with the run that was interrupted in --output")
    parser.add_argument("--overwrite", action="store_true", help="replace what --output holds")
    parser.add_argument("--strict", action="store_true", help="fail if a fact cannot be written")
    parser.add_argument("--plan-only", action="store_true", help="say what would be edited; change nothing")
    add_source_options(parser)
    add_model_options(parser, named=False)


def run(args: argparse.Namespace, out: Output) -> Result:
    """Edits, or plans to."""
    settings = parse_settings(args.settings)
    held = None if args.adapter is None else adapter_folder(args.adapter)
    output = _output(args)
    check_statistics_named(args)
    facts = read_facts(args.facts, args.subset, args.split, args.data_revision, args.limit)
    if args.plan_only and args.resume and output is not None:
        held = find_checkpoint(output) or held  # what the run has written is in an adapter of its own
    if not args.plan_only:
        facts.sound()
    finished = _check_output(output, held, args, facts.facts)
    if finished is not None:
        return finished
    if not args.plan_only:
        assert output is not None
        check_writable(output)
    base, tokenizer = load_base(ModelChoice.of(args, args.model))
    model = editable_model(base, held, args.method, settings)
    if args.plan_only:
        return make_plan(model, tokenizer, facts, args, held, out)
    assert output is not None
    return _edit(model, tokenizer, facts.facts, output, args, out)


def _output(args: argparse.Namespace) -> Path | None:
    if args.output is not None:
        return args.output
    if args.adapter is not None and Path(args.adapter).is_dir():
        return Path(args.adapter)
    if args.plan_only:
        return None
    raise UsageError("--output is needed: the directory that the adapter is written to.")


def _check_output(
    output: Path | None, held: Path | None, args: argparse.Namespace, facts: list[Fact]
) -> Result | None:
    """Whether the output is free, holds the run to resume, or that run is finished: its result then."""
    if output is None or args.plan_only:
        return None
    finish_save(output)
    checkpoint = find_checkpoint(output)
    if checkpoint is not None:
        if args.resume or args.overwrite:
            return None
        raise CliError(
            f"'{output}' holds an interrupted run ({checkpoint.name}): go on with it (--resume), drop it "
            "(--overwrite), or choose another --output."
        )
    if not (output / CONFIG_NAME).is_file():
        return None
    if args.resume and (finished := _finished(output, facts)) is not None:
        return finished
    if args.overwrite or (held is not None and held.resolve() == output.resolve()):
        return None
    raise CliError(
        f"'{output}' holds an adapter: go on editing it (--adapter {output}), replace it (--overwrite), or choose "
        "another --output."
    )


def _finished(output: Path, facts: list[Fact]) -> Result | None:
    """That there is nothing left to do, if the adapter holds all of the facts."""
    held = {record.key: record.target.strip() for record in AdapterFiles.read(output).records or ()}
    if any(held.get(fact.key) != fact.target.strip() for fact in facts):
        return None
    document = {"adapter": str(output), "facts": [], "facts_held": len(held), "finished_before": True}
    return Result(document, [f"Nothing is left to do: '{output}' holds all {len(facts)} facts."])


def _edit(
    model: Any, tokenizer: Any, facts: list[Fact], output: Path, args: argparse.Namespace, out: Output
) -> Result:
    if args.overwrite and not args.resume:
        _drop_run(output)
    checkpoint, was_there = find_checkpoint(output), output.exists()
    if checkpoint is not None:
        check_same_settings(model, checkpoint)
        out.note(f"Resuming after {checkpoint.name.rsplit('-', 1)[1]} facts, with the key statistics of the run.")
    try:
        statistics = None if checkpoint is not None else given_statistics(model, tokenizer, args, out)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="No key statistics were given")
            report = model.edit_facts(
                facts,
                tokenizer,
                batch_size=args.batch_size,
                statistics=statistics,
                strict=args.strict,
                progress=out.progress,
                output_dir=output,
                save_steps=args.save_steps,
                resume_from_checkpoint=args.resume,
            )
        save_adapter(model, output)
    except KeyboardInterrupt:
        raise Interrupted(_how_to_go_on(output, len(facts))) from None
    finally:
        shutil.rmtree(output / ".unfinished", ignore_errors=True)
        if not was_there and output.is_dir() and not any(output.iterdir()):
            output.rmdir()
    _drop_run(output)
    document = {"adapter": str(output), **report.to_dict(), "finished_before": False}
    return Result(document, [str(report), f"Wrote '{output}'."])


def _drop_run(output: Path) -> None:
    """Removes the checkpoints of a run."""
    while (checkpoint := find_checkpoint(output)) is not None:
        shutil.rmtree(checkpoint)


def _how_to_go_on(output: Path, facts: int) -> str:
    checkpoint = find_checkpoint(output)
    if checkpoint is None:
        return "Interrupted before the first checkpoint: nothing was written."
    done = checkpoint.name.rsplit("-", 1)[1]
    return f"Interrupted with {done} of {facts} facts in '{checkpoint}': run the same command with --resume to go on."
