"""Speed of inference with an unmerged and a merged adapter against the base model alone, and of loading and saving.

    python benchmarks/inference.py --output inference.json

The models have the shape of GPT-2 small and of a Llama of the same width, with random weights; the adapter has random
deltas on the default layers. The three variants take turns, and the median over the repeats counts. Prints a table and
writes JSON. On the CPU.
"""

from __future__ import annotations

import sys
from pathlib import Path


sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder's statistics.py would hide Python's own

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from peft_edit import EditConfig


SHAPES: dict[str, PretrainedConfig] = {
    "gpt2-small": GPT2Config(),
    "llama-like": LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, vocab_size=32000
    ),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCH, WIDTH = 8, 64


def build(shape: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(SHAPES[shape], dtype=dtype).eval()


def adapted(base: Any) -> PeftModel:
    return get_peft_model(copy.deepcopy(base), EditConfig(init_weights=False, task_type="CAUSAL_LM")).eval()


def merged(base: Any) -> PeftModel:
    model = adapted(base)
    model.merge_adapter()
    return model


def forward(model: Any, ids: torch.Tensor) -> None:
    """One pass over the whole batch."""
    model(input_ids=ids, use_cache=False)


def decode(model: Any, ids: torch.Tensor, tokens: int) -> None:
    """Greedy decoding of one sequence, a token at a time, after a first token."""
    token, cache = ids[:1, :1], None
    for _ in range(tokens):
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        token, cache = output.logits[:, -1:].argmax(-1), output.past_key_values


def interleaved(
    runs: dict[str, Callable[[], None]], repeats: int, clock: Callable[[], float]
) -> dict[str, dict[str, float]]:
    """Median seconds of each run, its median ratio to the base's time in the same repeat, and its fastest repeat's.

    Every repeat begins with another run; one more goes before them to warm up. On a busy machine only the fastest
    repeats compare.
    """
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(-1, repeats):
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            start = clock()
            runs[name]()
            if repeat >= 0:
                times[name].append(clock() - start)
    ratios = {name: [own / base for own, base in zip(times[name], times["base"])] for name in names}
    return {
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "ratio": {name: statistics.median(values) for name, values in ratios.items() if name != "base"},
        "fastest_ratio": {name: min(times[name]) / min(times["base"]) for name in names if name != "base"},
    }


def measure_speed(
    models: dict[str, Any], repeats: int, tokens: int, clock: Callable[[], float]
) -> dict[str, dict[str, dict[str, float]]]:
    """Times of base, unmerged and merged, for a forward pass and for decoding."""
    ids = torch.randint(models["base"].config.vocab_size, (BATCH, WIDTH), generator=torch.Generator().manual_seed(0))
    runs = {
        "forward": {name: partial(forward, model, ids) for name, model in models.items()},
        "decode": {name: partial(decode, model, ids, tokens) for name, model in models.items()},
    }
    with torch.inference_mode():
        return {task: interleaved(variants, repeats, clock) for task, variants in runs.items()}


def measure_files(base: Any, model: PeftModel, repeats: int) -> dict[str, float]:
    """Median seconds of saving the adapter, and of loading it onto the base model."""
    times: dict[str, list[float]] = {"save": [], "load": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            model.save_pretrained(folder)
            times["save"].append(time.perf_counter() - start)
            fresh = copy.deepcopy(base)
            start = time.perf_counter()
            PeftModel.from_pretrained(fresh, folder)
            times["load"].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=32, help="tokens to decode")
    parser.add_argument("--output", type=Path, default=Path("inference.json"))
    parser.add_argument("--only", nargs="*", choices=list(SHAPES), help="shapes to run; all by default")
    parser.add_argument("--dtypes", nargs="*", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--cpu-time", action="store_true", help="for a busy machine, with OMP_NUM_THREADS=1")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter

    rows = []
    for shape in args.only or SHAPES:
        for dtype in args.dtypes:
            base = build(shape, DTYPES[dtype])
            models = {"base": base, "unmerged": adapted(base), "merged": merged(base)}
            speed = measure_speed(models, args.repeats, args.tokens, clock)
            files = measure_files(base, models["unmerged"], 3)
            for task, times in speed.items():
                rows.append({"shape": shape, "dtype": dtype, "task": task, **times, "adapter_seconds": files})
                print(
                    f"{shape:11s} {dtype:9s} {task:8s} base {1000 * times['seconds']['base']:8.1f} ms  "
                    f"unmerged x {times['ratio']['unmerged']:.3f} (fastest {times['fastest_ratio']['unmerged']:.3f})  "
                    f"merged x {times['ratio']['merged']:.3f} (fastest {times['fastest_ratio']['merged']:.3f})  "
                    f"adapter: save {files['save']:.2f} s, load {files['load']:.2f} s",
                    flush=True,
                )
    args.output.write_text(json.dumps(rows, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
