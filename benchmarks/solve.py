"""Seconds to add a batch of pairs to a running solution, against a fresh solve, after more and more past pairs.

    python benchmarks/solve.py --output solve.json
    python benchmarks/solve.py --wide --device cuda --output solve.json

Random keys and values of the width of GPT-2 small's MLP (3072 -> 768), with `--wide` also of Llama-3-8B's (14336 ->
4096), in float64, with the refinement rounds that `edit_facts` makes by default. The past pairs are put in at once.
Then batches are added through one whole cycle, up to and with the next factorisation. Of a long cycle only some adds
are timed, spread evenly; the pairs between them are put in together, and then held as the single batches that they
would have been, so that the factorisation finds what it would have found. Columns:

    add         median of the timed adds that do not factorise
    factorising the add that does, at the end of the cycle
    mean        of all adds of the cycle: (mean of the timed ones * adds that do not factorise + factorising) / adds
    fresh       `solve_delta` of all pairs from their summed equations; "from pairs" with the summing
    drift       relative difference of the delta to a fresh one, at the end of the cycle, before the factorisation

Prints a table and writes JSON. On a CPU `--wide` takes many minutes and 20 GB.
"""

from __future__ import annotations

import sys
from pathlib import Path


sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder's statistics.py would hide Python's own

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from peft_edit.config import REFINEMENTS_WITH_MPES
from peft_edit.running import PENDING_SHARE, Penalties, RunningSolution
from peft_edit.solve import NormalEquations, auto_penalties


NARROW, WIDE = (3072, 768), (14336, 4096)

T = TypeVar("T")


@dataclass
class Pairs:
    """Random pairs, and the sum of all that were drawn.

    Args:
        shape (`tuple[int, int]`): d_in, d_out.
        device (`str`): Where they lie.
    """

    shape: tuple[int, int]
    device: str

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(0)

    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(count, d_in) keys and (count, d_out) values."""
        make: dict[str, Any] = {"generator": self.generator, "device": self.device, "dtype": torch.float64}
        return torch.randn(count, self.shape[0], **make), torch.randn(count, self.shape[1], **make)

    def covariance(self) -> torch.Tensor:
        """A second moment whose spectrum falls off, as that of real keys does."""
        spectrum = 1.0 / torch.arange(1, self.shape[0] + 1, device=self.device).sqrt()
        common, _ = self.draw(16)
        return torch.diag(spectrum) + (common.T @ common / 16).float()


def timed(function: Callable[[], T], device: str) -> tuple[float, T]:
    """Seconds of one call, and what it returns."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def in_single_batches(running: RunningSolution, before: RunningSolution, batch: int) -> RunningSolution:
    """What was added since `before` in one batch, as if it had come in batches of `batch`."""
    ((keys, values),) = running.pending[len(before.pending) :]
    return replace(running, pending=(*before.pending, *zip(keys.split(batch), values.split(batch))))


def one_cycle(
    running: RunningSolution, pairs: Pairs, batch: int, samples: int, rounds: int
) -> tuple[list[float], RunningSolution]:
    """Seconds of some adds, and the solution, with no room for another batch before it must be factorised."""
    room = pairs.shape[0] // PENDING_SHARE // batch  # adds without a factorisation
    samples = min(samples, room)
    seconds = []
    for place in range(samples):
        between = (place + 1) * room // samples - place * room // samples - 1
        if between:
            filled, _ = running.add(*pairs.draw(between * batch), rounds)
            running = in_single_batches(filled, running, batch)
        keys, values = pairs.draw(batch)
        taken, (running, _) = timed(lambda r=running, k=keys, v=values: r.add(k, v, rounds), pairs.device)
        seconds.append(taken)
    return seconds, running


def against_fresh(running: RunningSolution, device: str) -> tuple[float, float]:
    """Seconds of a fresh solve for the same pairs, and the relative difference to it."""
    equations = running.all_equations()
    seconds, solution = timed(lambda: running.penalties.solve(equations), device)
    return seconds, float((running.delta - solution.delta).norm() / solution.delta.norm())


def measure(
    shape: tuple[int, int], past: int, batch: int, device: str, samples: int = 24, rounds: int = REFINEMENTS_WITH_MPES
) -> dict[str, Any]:
    """One row of the table."""
    pairs = Pairs(shape, device)
    covariance = pairs.covariance()
    penalties = Penalties(covariance, *auto_penalties(covariance, "auto", "auto"))
    keys, values = pairs.draw(past)
    summing, equations = timed(lambda: NormalEquations.from_pairs(keys, values), device)
    running = RunningSolution.solved(equations, (past,), penalties)
    if running.factor is None:
        running, _ = running.add(*pairs.draw(batch), rounds)  # the first pairs of all are solved for afresh
    running.add(*pairs.draw(batch), rounds)  # warm-up
    seconds, running = one_cycle(running, pairs, batch, samples, rounds)
    fresh, drift = against_fresh(running, device)
    keys, values = pairs.draw(batch)
    factorising, (after, _) = timed(lambda: running.add(keys, values, rounds), device)
    assert after.sums[-1] == running.count + batch and not after.pending
    plain = shape[0] // PENDING_SHARE // batch
    seconds = seconds or [factorising]  # too large a batch to be added without
    return {
        "d_in": shape[0],
        "d_out": shape[1],
        "past": past,
        "batch": batch,
        "timed_adds": len(seconds),
        "add": statistics.median(seconds),
        "factorising": factorising,
        "adds_per_factorisation": plain + 1,
        "mean": (statistics.fmean(seconds) * plain + factorising) / (plain + 1),
        "fresh": fresh,
        "fresh_from_pairs": fresh + summing,
        "pairs_at_the_end": running.count,
        "drift": drift,
    }


def line(row: dict[str, Any]) -> str:
    """The row as text."""
    return (
        f"{row['d_in']:5d} -> {row['d_out']:4d} {row['past']:6d} {row['batch']:5d} {1000 * row['add']:9.2f} ms "
        f"{1000 * row['factorising']:9.1f} ms {1000 * row['mean']:9.2f} ms {1000 * row['fresh']:9.1f} ms "
        f"{1000 * row['fresh_from_pairs']:9.1f} ms {row['fresh'] / row['mean']:9.1f}x {row['drift']:8.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wide", action="store_true", help=f"also {WIDE[0]} -> {WIDE[1]}")
    parser.add_argument("--shape", type=int, nargs=2, action="append", help="d_in d_out, instead of these shapes")
    parser.add_argument("--past", type=int, nargs="*", default=[0, 100, 1000, 10000])
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[1, 100])
    parser.add_argument("--samples", type=int, default=24, help="adds timed in a cycle, at most")
    parser.add_argument("--rounds", type=int, default=REFINEMENTS_WITH_MPES, help="refinement rounds")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("solve.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    rows = []
    heads = "d_in -> d_out   past batch", "add", "factorising", "mean", "fresh", "from pairs", "fresh/mean", "drift"
    print("{}{:>13s}{:>13s}{:>13s}{:>13s}{:>13s}{:>11s}{:>8s}".format(*heads))
    for shape in args.shape or ([NARROW, WIDE] if args.wide else [NARROW]):
        for past in args.past:
            for batch in args.batch_sizes:
                rows.append(measure(tuple(shape), past, batch, args.device, args.samples, args.rounds))
                print(line(rows[-1]), flush=True)
    about = {**vars(args), "output": str(args.output), "torch": torch.__version__}
    args.output.write_text(json.dumps({"settings": about, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
