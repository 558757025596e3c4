"""Collect key statistics of a model from ordinary text, once for all its adapters."""

from __future__ import annotations

import argparse
from typing import Any

from ...collecting import collect_statistics
from ...statistics import STATISTICS_JSON, STATISTICS_TENSORS
from ..arguments import add_model_options, add_set_option, directory, parse_settings, positive
from ..editable import editable_model
from ..errors import CliError
from ..models import ModelChoice, load_base
from ..output import Output, Result, Table, size
from ..saving import check_writable, write_directory
from ..sources import read_texts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `peft-edit stats`."""
    parser.add_argument("model", help="base model: directory, Hub id, or 'tiny' for the bundled one")
    parser.add_argument("text", help="a .txt file, a .jsonl file, or a dataset on the Hub")
    parser.add_argument("-o", "--output", type=directory, required=True, help="directory to write to")
    parser.add_argument("--max-tokens", type=positive, metavar="N", help="by default ten per input of a module")
    parser.add_argument("--batch-tokens", type=positive, default=4096, metavar="N", help="tokens per forward pass")
    parser.add_argument("--column", default="text", help="field of a record that holds the text; by default text")
    parser.add_argument("--subset", help="of a dataset on the Hub")
    parser.add_argument("--split", default="train", help="of a dataset; by default train")
    parser.add_argument("--data-revision", help="of a dataset on the Hub")
    parser.add_argument("--overwrite", action="store_true", help="replace statistics that --output holds")
    add_set_option(parser)
    add_model_options(parser, named=False)


def run(args: argparse.Namespace, out: Output) -> Result:
    """Collects and saves the statistics of the modules that an adapter with these settings would edit."""
    settings = parse_settings(args.settings)
    texts = read_texts(args.text, args.subset, args.split, args.data_revision, args.column)
    if (args.output / STATISTICS_JSON).exists() and not args.overwrite:
        raise CliError(f"'{args.output}' holds key statistics: replace them (--overwrite) or choose another --output.")
    check_writable(args.output)
    base, tokenizer = load_base(ModelChoice.of(args, args.model))
    model: Any = editable_model(base, None, args.method, settings)
    names = list(model.base_model.edit_layers())
    out.note(f"Collecting key statistics of {len(names)} modules from '{args.text}'.")
    statistics = collect_statistics(
        model.base_model.model,
        tokenizer,
        texts,
        names,
        max_tokens=args.max_tokens,
        batch_tokens=args.batch_tokens,
        source=args.text,
        progress=out.progress,
    )
    write_directory(args.output, statistics.save, stale=(STATISTICS_JSON, STATISTICS_TENSORS))
    widths = {name: moment.shape[0] for name, moment in statistics.second_moments.items()}
    written = (args.output / STATISTICS_TENSORS).stat().st_size
    document = {
        "statistics": str(args.output),
        "tokens": statistics.tokens,
        "source": statistics.source,
        "modules": widths,
        "bytes": written,
    }
    rows = [(name, str(width)) for name, width in widths.items()]
    summary = f"Key statistics from {statistics.tokens} tokens: wrote '{args.output}', {size(written)}."
    return Result(document, [Table(("module", "d_in"), rows), summary])
