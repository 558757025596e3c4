"""Write the edits as a standard LoRA, for servers that know no edit adapters."""

from __future__ import annotations

import argparse

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ...export import check_output_dir, export_lora
from ..arguments import add_model_options, directory, positive, share
from ..errors import CliError
from ..models import adapter_folder, load_adapter
from ..output import Output, Result
from ..saving import check_writable, write_directory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `peft-edit export-lora`."""
    parser.add_argument("adapter", help="the adapter: directory or Hub id")
    parser.add_argument("-o", "--output", type=directory, required=True, help="directory of the LoRA")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--rank", type=positive, metavar="R", help="largest rank; by default the exact one")
    size.add_argument("--energy", type=share, metavar="E", help="share of ||Δ||² to keep instead, such as 0.99")
    parser.add_argument("--each-own-rank", action="store_true", help="a rank for each module, not one for all")
    parser.add_argument("--all-layers", action="store_true", help="zeros for the other layers, as TGI asks for")
    parser.add_argument("--lora-dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--overwrite", action="store_true", help="replace a LoRA that --output holds")
    add_model_options(parser)


def run(args: argparse.Namespace, out: Output) -> Result:
    """Exports, and states the error that it makes."""
    folder = adapter_folder(args.adapter)
    check_output_dir(args.output)
    if (args.output / CONFIG_NAME).exists() and not args.overwrite:
        raise CliError(f"'{args.output}' holds an adapter: replace it (--overwrite) or choose another --output.")
    check_writable(args.output)
    model, _ = load_adapter(folder, args)
    export = export_lora(
        model,
        rank=args.rank,
        energy=args.energy,
        uniform=not args.each_own_rank,
        all_layers=args.all_layers,
        dtype=getattr(torch, args.lora_dtype),
    )
    write_directory(args.output, export.save, stale=(CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME))
    return Result({"lora": str(args.output), **export.to_dict()}, [str(export), f"Wrote '{args.output}'."])
