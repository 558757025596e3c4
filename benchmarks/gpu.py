"""Speed of everything on one GPU, in the shape of Llama-3-8B with random weights in bfloat16.

    python benchmarks/gpu.py --output gpu.json                                          # one H200, a few minutes
    python benchmarks/gpu.py --shape llama-small --device cpu --facts 4 --steps 2       # a trial on a CPU

Key statistics of random token ids (10 tokens per input dimension); then one batch of facts, searched for a fixed
number of steps and with MPES; adding to a running solution; inference unmerged and merged; saving and loading. Facts
of random weights hardly ever converge under MPES: their search goes on until it is given up for want of gain.
Everything is timed with synchronisation before and after, past a warm-up.

The matrix FLOPs of the search are 2 * weights of the blocks above the last edited one * tokens that were run through
them, once for the forward pass and once for the backward pass (the weights are frozen, so backward has one product per
weight, as forward has), and likewise for the output head at the positions that are read. Tokens are counted by hooks
while the search runs, padding included, since the GPU does that work too; what they come to without padding is given
beside it. Attention's own products are not counted, nor is what the search runs once before its first step. "Of the
peak" is all that against the seconds from the first step to the end of the search, and against the whole search stage.
Prints figures and writes JSON.
"""

from __future__ import annotations

import sys
from pathlib import Path


sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder's statistics.py would hide Python's own

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from benchmarks.inference import decode, forward
from benchmarks.shapes import SHAPES, build, facts_and_tokenizer
from benchmarks.solve import measure as measure_solve
from benchmarks.statistics import bare_forward, random_texts
from peft_edit import EditConfig, Fact, editing
from peft_edit.architectures import block_index, find_blocks, find_down_projections
from peft_edit.collecting import _batches


PEAK = 989e12  # H200, bfloat16, dense
BATCH_TOKENS = 4096  # of collect_statistics


# --- clocks ----------------------------------------------------------------------------------------------------


def synchronise() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any]) -> float:
    """Seconds of one call, all of its work done."""
    synchronise()
    start = time.perf_counter()
    function()
    synchronise()
    return time.perf_counter() - start


class SynchronisedStages(editing.Stopwatch):
    """The stopwatch of `edit_facts`, with the GPU's work counted in the stage that asked for it."""

    current: SynchronisedStages

    def __init__(self) -> None:
        super().__init__()
        self.stage = ""
        self.ended: dict[str, float] = {}
        SynchronisedStages.current = self

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        synchronise()
        self.stage = stage
        with super().__call__(stage):
            yield
            synchronise()
        self.stage = ""
        self.ended[stage] = time.perf_counter()


# --- the work of the search ------------------------------------------------------------------------------------


class Work:
    """Counts, while the search of one edit runs, what goes through the blocks above the last edited one and the head.

    Args:
        model: The base model, wrapped.
        last (`int`): The last edited block.
    """

    def __init__(self, model: Any, last: int) -> None:
        self.model = model
        self.above = list(find_blocks(model)[1])[last + 1 :]
        self.head = model.get_output_embeddings()
        self.last_mlp = self.above[-1].get_submodule(find_down_projections(model)[0].rpartition(".")[0])
        last_mlp = sum(weight.numel() for weight in self.last_mlp.parameters() if weight.dim() == 2)
        self.weights = {
            "blocks": sum(weight.numel() for block in self.above for weight in block.parameters() if weight.dim() == 2)
            - last_mlp,
            "last mlp": last_mlp,  # runs on the read positions only, where the search can
            "head": self.head.weight.numel(),
        }
        self.runs = {(part, way): 0 for part in self.weights for way in ("forward", "backward")}
        self.tokens = dict(self.runs)
        self.real: torch.Tensor | int = 0
        self.first_step = 0.0
        self._real_now: torch.Tensor | int = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts what an `edit_facts` within does, under `SynchronisedStages`."""
        with ExitStack() as stack:
            handles = [
                self.model.register_forward_pre_hook(self._model, with_kwargs=True),
                self.above[0].register_forward_pre_hook(self._block, with_kwargs=True),
                self.last_mlp.register_forward_hook(partial(self._rows, "last mlp")),
                self.head.register_forward_hook(partial(self._rows, "head")),
            ]
            for handle in handles:
                stack.callback(handle.remove)
            yield

    def _model(self, _module: nn.Module, _args: Any, arguments: dict[str, Any]) -> None:
        ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
        if ids is not None and mask is not None:
            self._real_now = mask[:, -ids.shape[1] :].sum()  # it covers the prefix too, which is not run

    def _block(self, _module: nn.Module, args: Any, arguments: dict[str, Any]) -> None:
        hidden = args[0] if args else arguments["hidden_states"]
        if self._is_step(hidden):
            self.real = self.real + self._real_now
            if not self.first_step:
                synchronise()
                self.first_step = time.perf_counter()
            self._count("blocks", hidden, hidden.shape[0] * hidden.shape[1])

    def _rows(self, part: str, _module: nn.Module, _args: Any, output: torch.Tensor) -> None:
        if self._is_step(output):
            self._count(part, output, output.numel() // output.shape[-1])

    def _is_step(self, tensor: torch.Tensor) -> bool:
        return tensor.requires_grad and SynchronisedStages.current.stage == "search"

    def _count(self, part: str, tensor: torch.Tensor, tokens: int) -> None:
        def add(way: str, _gradient: Any = None) -> None:
            self.runs[part, way] += 1
            self.tokens[part, way] += tokens

        add("forward")
        tensor.register_hook(partial(add, "backward"))

    def result(self, search_seconds: float, peak: float) -> dict[str, Any]:
        """The counts as figures, given the seconds of the search stage."""
        flops = dict.fromkeys(self.weights, 0)
        for (part, _), tokens in self.tokens.items():
            flops[part] += 2 * self.weights[part] * tokens
        total = sum(flops.values())
        stepping = SynchronisedStages.current.ended["search"] - self.first_step
        forward_tokens = self.tokens["blocks", "forward"]
        real_share = float(self.real) / max(forward_tokens, 1)
        without_padding = flops["blocks"] * real_share + flops["last mlp"] + flops["head"]
        return {
            "passes": {" ".join(key): count for key, count in self.runs.items()},
            "tokens": {" ".join(key): count for key, count in self.tokens.items()},
            "real_token_share": real_share,
            "weights": self.weights,
            "flops": flops,
            "search_seconds": search_seconds,
            "seconds_of_steps": stepping,
            "flops_per_second": total / stepping,
            "of_peak_while_stepping": total / stepping / peak,
            "of_peak_in_search": total / search_seconds / peak,
            "of_peak_while_stepping_real_tokens": without_padding / stepping / peak,
        }


# --- what is measured ------------------------------------------------------------------------------------------


def measure_statistics(model: PeftModel, tokens: int, device: str) -> dict[str, float]:
    """Speed of collecting key statistics, which the adapter keeps, against the bare forward pass."""
    base, names = model.base_model.model, list(model.edit_layers())
    texts = random_texts(tokens, base.config.vocab_size, 0)
    count = sum(map(len, texts))
    batches = list(_batches(texts, BATCH_TOKENS))
    collect = partial(model.collect_statistics, tokenizer=None, max_tokens=count, batch_tokens=BATCH_TOKENS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer tokens than advised
        collect(texts[: max(1, len(texts) // 20)])  # warm-up
    bare_forward(base, batches[:1], names[-1], device)
    bare = seconds(lambda: bare_forward(base, batches, names[-1], device))
    total = seconds(lambda: collect(texts))
    return {"tokens": count, "seconds": total, "bare": bare, "tokens_per_second": count / total, "ratio": bare / total}


def measure_edit(
    model: PeftModel, facts: list[Fact], tokenizer: Any, early_stopping: str, steps: int, peak: float
) -> dict[str, Any]:
    """One batch of facts, which the adapter holds afterwards."""
    config = model.peft_config["default"]
    config.early_stopping, config.search_steps = early_stopping, steps
    work = Work(model.base_model.model, max(map(block_index, model.edit_layers())))
    reports = []
    reset_peak_memory()
    with mock.patch.object(editing, "Stopwatch", SynchronisedStages), work.counting():
        taken = seconds(
            lambda: reports.append(model.edit_facts(facts, tokenizer, batch_size=len(facts), progress=False))
        )
    (report,) = reports
    return {
        "early_stopping": early_stopping,
        "facts": len(facts),
        "steps": sum(fact.steps for fact in report.facts) / len(facts),
        "written": report.written,
        "seconds": taken,
        "seconds_per_edit": taken / len(facts),
        "stages": report.seconds,
        "work": work.result(report.seconds["search"], peak),
        "peak_memory_bytes": peak_memory(),
    }


def measure_edits(model: PeftModel, facts: list[Fact], tokenizer: Any, args: argparse.Namespace) -> list[dict]:
    """Both ways of stopping; the adapter holds the facts of the last afterwards."""
    rows: list[dict] = []
    measure_edit(model, facts, tokenizer, "none", 2, args.peak)  # warm-up; makes the contexts
    for way in ("none", "mpes"):
        removed = seconds(lambda: model.remove_facts(facts))
        if rows:
            rows[-1]["remove_all_seconds"] = removed
        rows.append(measure_edit(model, facts, tokenizer, way, args.steps, args.peak))
        print(edit_line(rows[-1]), flush=True)
    return rows


def measure_inference(model: PeftModel, rows: int, width: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Median seconds of a forward pass and of decoding, with the delta beside the weights and merged into them."""
    ids = torch.randint(model.config.vocab_size, (rows, width), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    runs = {"forward": lambda: forward(model, ids), "decode": lambda: decode(model, ids, tokens)}

    def medians() -> dict[str, float]:
        found = {}
        with torch.inference_mode():
            for task, run in runs.items():
                run()  # warm-up
                found[task] = statistics.median(seconds(run) for _ in range(repeats))
        return found

    unmerged = medians()
    merging = seconds(model.merge_adapter)
    merged = medians()
    unmerging = seconds(model.unmerge_adapter)
    return {
        "unmerged": unmerged,
        "merged": merged,
        "ratio": {task: unmerged[task] / merged[task] for task in runs},
        "merge_seconds": merging,
        "unmerge_seconds": unmerging,
    }


def measure_files(model: PeftModel) -> dict[str, float]:
    """Seconds of saving the adapter with its memory, and of loading it as another adapter of the same model."""
    with tempfile.TemporaryDirectory() as folder:
        saved = seconds(lambda: model.save_pretrained(folder))
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        loaded = seconds(lambda: model.load_adapter(folder, "loaded"))
        model.delete_adapter("loaded")
    return {"save": saved, "load": loaded, "bytes": size}


def reset_peak_memory() -> None:
    """Starts the count of peak GPU memory afresh."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int:
    """Bytes of GPU memory allocated at most since the count began; 0 without a GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


# --- what is printed -------------------------------------------------------------------------------------------


def edit_line(row: dict[str, Any]) -> str:
    """An edit as text."""
    work = row["work"]
    stages = ", ".join(f"{name} {taken:.2f}" for name, taken in row["stages"].items())
    return (
        f"edit, {row['early_stopping']:4s} {row['facts']} facts, {row['steps']:.1f} steps: "
        f"{row['seconds_per_edit']:.4f} s/edit ({stages}); search {work['flops_per_second'] / 1e12:.3g} TFLOP/s, "
        f"{100 * work['of_peak_while_stepping']:.1f} % of the peak while stepping "
        f"({100 * work['of_peak_while_stepping_real_tokens']:.1f} % without padding), "
        f"{100 * work['of_peak_in_search']:.1f} % in the whole search; "
        f"{100 * work['real_token_share']:.0f} % of the tokens real; peak {row['peak_memory_bytes'] / 2**30:.1f} GiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3-8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--layers", type=int, nargs="*", default=None, help="edited layers; by default the usual band")
    parser.add_argument("--peak", type=float, default=PEAK, help="FLOP/s of the device, dense")
    parser.add_argument("--statistics-tokens", type=int, default=0, help="by default 10 per input dimension")
    parser.add_argument("--past", type=int, default=1000, help="pairs before those that are added to a solution")
    parser.add_argument("--rows", type=int, default=8, help="sequences in a forward pass")
    parser.add_argument("--width", type=int, default=512, help="tokens in each of them")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to decode")
    parser.add_argument("--repeats", type=int, default=5, help="of inference")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    args = parser.parse_args()

    result: dict[str, Any] = {"settings": {**vars(args), "output": str(args.output), "torch": torch.__version__}}
    result["settings"]["name"] = torch.cuda.get_device_name() if args.device != "cpu" else "CPU"

    def keep(name: str, value: Any) -> None:
        result[name] = value
        args.output.write_text(json.dumps(result, indent=2))  # so that a run that is cut short leaves what it has

    facts, tokenizer = facts_and_tokenizer(args.facts)
    start = time.perf_counter()
    base = build(args.shape, getattr(torch, args.dtype), args.device)
    places = {} if args.layers is None else {"layers_to_transform": args.layers}
    config = EditConfig(task_type="CAUSAL_LM", **places)
    if args.layers is not None:
        config.target_modules = set(find_down_projections(base))
    model = get_peft_model(base, config).eval()
    layers = model.edit_layers()
    result["settings"]["edited"] = list(layers)
    synchronise()
    print(
        f"{args.shape} in {args.dtype} built in {time.perf_counter() - start:.1f} s; edits {list(layers)}", flush=True
    )

    width = max(layer.in_features for layer in layers.values())
    found = measure_statistics(model, args.statistics_tokens or 10 * width, args.device)
    keep("statistics", found)
    print(
        f"statistics of {found['tokens']} tokens: {found['tokens_per_second']:.0f} tokens/s, bare/total "
        f"{found['ratio']:.3f}",
        flush=True,
    )
    keep("edits", measure_edits(model, facts, tokenizer, args))
    found = measure_inference(model, args.rows, args.width, args.tokens, args.repeats)
    keep("inference", found)
    for task, ratio in found["ratio"].items():
        print(f"{task}: merged {found['merged'][task]:.4f} s, unmerged x {ratio:.3f}", flush=True)
    keep("files", measure_files(model))
    print("save {save:.1f} s, load {load:.1f} s, {bytes:.3g} bytes".format(**result["files"]), flush=True)

    model.remove_facts(facts)
    shape = (width, next(iter(layers.values())).out_features)
    keep("solve", [measure_solve(shape, args.past, batch, args.device) for batch in (100, 1)])
    for row in result["solve"]:
        print(
            f"adding {row['batch']} pairs to {row['past']}, one module: median {row['add']:.4f} s, "
            f"with factorisations {row['mean']:.4f} s (one in {row['adds_per_factorisation']}: "
            f"{row['factorising']:.2f} s); fresh {row['fresh']:.2f} s; drift {row['drift']:.1e}",
            flush=True,
        )
    keep("seconds", time.perf_counter() - start)
    print(f"{result['seconds']:.0f} s in all")


if __name__ == "__main__":
    main()
