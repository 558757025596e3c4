"""Write the edited model as a model of its own: base weights and adapter in one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..arguments import add_model_options, directory
from ..errors import CliError
from ..models import adapter_folder, load_adapter
from ..output import Output, Result, size
from ..saving import check_writable, write_directory


MODEL_FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json", "generation_config.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `peft-edit merge`."""
    parser.add_argument("adapter", help="the adapter: directory or Hub id")
    parser.add_argument("-o", "--output", type=directory, required=True, help="directory of the merged model")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a weights file; by default 5GB")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that --output holds")
    add_model_options(parser)


def run(args: argparse.Namespace, out: Output) -> Result:
    """Merges and writes model and tokenizer."""
    folder = adapter_folder(args.adapter)
    _check_output(args.output, args.overwrite)
    check_writable(args.output)
    model, tokenizer = load_adapter(folder, args)
    facts = model.peft_config[model.active_adapter].memory
    out.note("Merging.")
    merged: Any = model.merge_and_unload()

    def write(staged: Path) -> None:
        merged.save_pretrained(str(staged), max_shard_size=args.max_shard_size)
        tokenizer.save_pretrained(str(staged))

    write_directory(args.output, write, stale=MODEL_FILES)
    weights = sorted(args.output.glob("*.safetensors"))
    written = sum(path.stat().st_size for path in weights)
    document = {
        "model": str(args.output),
        "facts": None if facts is None else len(facts),
        "dtype": str(merged.dtype).removeprefix("torch."),
        "files": [path.name for path in weights],
        "bytes": written,
    }
    return Result(document, [f"Wrote the merged model to '{args.output}': {size(written)} in {len(weights)} file(s)."])


def _check_output(output: Path, overwrite: bool) -> None:
    """Neither an adapter nor, unasked, a model is written over."""
    if (output / "adapter_config.json").exists():
        raise CliError(f"'{output}' holds an adapter, which a model beside it would hide: choose another --output.")
    if (output / "config.json").exists() and not overwrite:
        raise CliError(f"'{output}' holds a model: replace it (--overwrite) or choose another --output.")
