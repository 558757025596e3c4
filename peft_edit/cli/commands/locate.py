"""Rank a model's layers by how well facts can be written there."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..arguments import add_model_options, add_source_options, positive
from ..errors import CliError, UsageError
from ..models import ModelChoice, load_base
from ..output import Output, Result
from ..sources import read_facts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `peft-edit locate`."""
    parser.add_argument("model", help="base model: directory, Hub id, or 'tiny' for the bundled one")
    parser.add_argument("facts", help="facts like those to be written: file, Hub dataset, or 'tiny'")
    parser.add_argument("--layers", type=positive, metavar="N", help="layers in a band; by default a sixth of them")
    parser.add_argument("--most-facts", type=positive, default=100, metavar="N", help="facts to use at most")
    parser.add_argument("--no-tracing", action="store_true", help="skip the causal tracing, which takes most time")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="write the heat map of the tracing (.png, .pdf, .svg)"
    )
    add_source_options(parser)
    add_model_options(parser, named=False)


def run(args: argparse.Namespace, out: Output) -> Result:
    """Locates, and says how to edit there."""
    from ...analysis.locating import locate_layers

    if args.plot is not None and args.no_tracing:
        raise UsageError("--plot shows the tracing: leave --no-tracing out.")
    facts = read_facts(args.facts, args.subset, args.split, args.data_revision, args.limit).sound()
    base, tokenizer = load_base(ModelChoice.of(args, args.model))
    out.note(f"Trying every layer with {min(len(facts), args.most_facts)} facts.")
    report = locate_layers(base, tokenizer, facts, tracing=not args.no_tracing, most_facts=args.most_facts)
    best = report.best_layers(args.layers)
    document = {**report.to_dict(), "best_layers": best}
    layers = json_list(best)
    blocks = [str(report), f"To edit there: peft-edit edit … --set layers_to_transform={layers}"]
    if args.plot is not None:
        _write_plot(report, args.plot)
        document["plot"] = str(args.plot)
        blocks.append(f"Wrote '{args.plot}'.")
    return Result(document, blocks)


def json_list(layers: list[int]) -> str:
    """The layers as `--set` reads them."""
    return f"[{','.join(map(str, layers))}]"


def _write_plot(report: object, path: Path) -> None:
    try:
        figure = report.plot()  # type: ignore[attr-defined]
    except ImportError as error:
        raise CliError("--plot needs matplotlib: pip install 'peft-edit[plots]'.") from error
    figure.savefig(path)
