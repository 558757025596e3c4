"""Speed of collect_statistics against a bare forward pass of the same layers over the same batches.

    python benchmarks/statistics.py --output statistics.json

Models with random weights in the shape of GPT-2 small and of a small Llama, their default edited layers, and texts of
20 to 400 random token ids. The bare pass ends where collect_statistics ends, at the input of the last edited module,
and keeps nothing. Both are run in turn and the medians compared: bare / total is the share of the time that the
forward pass needs anyway. The floor beside it is that share if every FLOP took the same time, at best: matrix products
alone, half of k kᵀ (it is symmetric). Prints a table and writes JSON.
"""

from __future__ import annotations

import sys
from pathlib import Path


sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder's statistics.py would hide Python's own

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from peft_edit import collect_statistics
from peft_edit.architectures import block_index, default_layers, find_blocks, find_down_projections
from peft_edit.collecting import _batches, _padded
from peft_edit.hooks import StopForward, on_input


SHAPES = {
    "gpt2-small": ("gpt2", {}),
    "llama-like": (
        "llama",
        {
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
        },
    ),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build(shape: str, device: str, dtype: torch.dtype) -> nn.Module:
    """The model of that shape, with random weights."""
    model_type, settings = SHAPES[shape]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    return model.to(device=device, dtype=dtype).eval()


def edited_modules(model: Any) -> list[str]:
    """Names of the modules that are edited by default."""
    path, blocks = find_blocks(model)
    (target,) = find_down_projections(model)
    return [f"{path}.{layer}.{target}" for layer in default_layers(len(blocks), model.config.model_type)]


def random_texts(tokens: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Token ids of at least that many tokens in all, in texts of 20 to 400."""
    generator = random.Random(seed)
    texts: list[list[int]] = []
    while sum(map(len, texts)) < tokens:
        texts.append([generator.randrange(vocabulary) for _ in range(generator.randint(20, 400))])
    return texts


def collect(model: Any, texts: list[list[int]], names: list[str], batch_tokens: int) -> None:
    collect_statistics(model, None, texts, names, max_tokens=sum(map(len, texts)), batch_tokens=batch_tokens)


def bare_forward(model: Any, batches: list[list[list[int]]], last: str, device: str) -> None:
    """The batches through the model up to the input of the last module."""

    def stop(_hidden: torch.Tensor) -> None:
        raise StopForward

    with torch.no_grad(), on_input(model.get_submodule(last), stop):
        for batch in batches:
            ids, mask = _padded(batch)
            try:
                model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
            except StopForward:
                pass


def seconds(clock: Callable[[], float], function: Callable[..., None], *args: Any) -> float:
    """Time of one call."""
    start = clock()
    function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def flops_per_token(model: Any, names: list[str], texts: list[list[int]]) -> tuple[float, float]:
    """FLOPs per token of the forward pass up to the last module, and of half of k kᵀ in every module.

    Counted are the weights' products and attention (each token with those before it); the blocks' order of modules is
    the order in which they run.
    """
    path, blocks = find_blocks(model)
    weights = 0
    for name, module in model.named_modules():
        if name == names[-1]:
            break
        if name.startswith(f"{path}.") and isinstance(module, (nn.Linear, Conv1D)):
            weights += module.weight.numel()
    # Each token of a text of n attends to (n + 1) / 2 tokens, with two products of the hidden width.
    attended = sum(len(text) * (len(text) + 1) / 2 for text in texts) / sum(map(len, texts))
    attention = 4 * attended * model.config.hidden_size * (block_index(names[-1]) + 1)
    widths = [max(model.get_submodule(name).weight.shape) for name in names]
    return 2 * weights + attention, sum(width * (width + 1) for width in widths)


def measure(shape: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    model = build(shape, args.device, DTYPES[args.dtype])
    names = edited_modules(model)
    texts = random_texts(args.tokens, model.config.vocab_size, args.seed)
    batches = list(_batches(texts, args.batch_tokens))
    tokens = sum(map(len, texts))
    clock = time.process_time if args.cpu_time else time.perf_counter
    total, bare = [], []
    for repeat in range(args.repeats + 1):
        taken = seconds(clock, collect, model, texts, names, args.batch_tokens)
        forward = seconds(clock, bare_forward, model, batches, names[-1], args.device)
        if repeat > 0:  # the first one warms up
            total.append(taken)
            bare.append(forward)
    forward_flops, product_flops = flops_per_token(model, names, texts)
    padded = sum(len(batch) * max(map(len, batch)) for batch in batches)
    return {
        "shape": shape,
        "modules": names,
        "tokens": tokens,
        "batches": len(batches),
        "padding": 1 - tokens / padded,
        "tokens_per_second": tokens / statistics.median(total),
        "total_seconds": statistics.median(total),
        "bare_seconds": statistics.median(bare),
        "ratio": statistics.median(one / other for one, other in zip(bare, total)),
        "forward_flops_per_token": forward_flops,
        "product_flops_per_token": product_flops,
        "flop_floor": forward_flops / (forward_flops + product_flops),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=30720)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time instead of wall time, on a shared machine")
    parser.add_argument("--only", nargs="*", choices=list(SHAPES), help="shapes to run; all by default")
    parser.add_argument("--output", type=Path, default=Path("statistics.json"))
    args = parser.parse_args()

    rows = []
    print(f"{'shape':12s} tokens/s   total    bare  bare/total  floor  MFLOP/token: forward, k kᵀ  padding")
    for shape in args.only or SHAPES:
        row = measure(shape, args)
        rows.append(row)
        print(
            f"{shape:12s} {row['tokens_per_second']:8.0f} {row['total_seconds']:5.2f} s {row['bare_seconds']:5.2f} s "
            f"{row['ratio']:11.3f} {row['flop_floor']:6.3f} {row['forward_flops_per_token'] / 1e6:21.1f}, "
            f"{row['product_flops_per_token'] / 1e6:5.1f} {100 * row['padding']:6.1f} %",
            flush=True,
        )
    about = {"device": args.device, "dtype": args.dtype, "threads": torch.get_num_threads(), "cpu_time": args.cpu_time}
    args.output.write_text(json.dumps([{**about, **row} for row in rows], indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
