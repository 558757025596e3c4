"""A lifelong run: facts from a stream, with checkpoints, a log and probes of old facts. Interrupt it, start it again.

    python examples/lifelong_editing.py                     # Ctrl-C at any time
    python examples/lifelong_editing.py --stop-after 130    # or let it stop by itself
    python examples/lifelong_editing.py                     # goes on, and ends with the same adapter
    tensorboard --logdir lifelong_output                    # if tensorboard is installed

Runs offline on a CPU. Writes checkpoints, log and adapter to `lifelong_output/`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available
from peft import get_peft_model

from peft_edit import EditConfig, Fact, KeyStatistics
from peft_edit.tiny import load_tiny_facts, load_tiny_model


class Stopped(Exception):
    """The stream has broken off."""


def arriving(facts: Iterable[Fact], stop_after: int | None) -> Iterator[Fact]:
    """Facts one by one, as from a queue or a growing file; nothing is known of those to come.

    Args:
        facts: The facts.
        stop_after (`int`, *optional*): Break off after so many.

    Raises:
        Stopped: where it breaks off.
    """
    for count, fact in enumerate(facts):
        if count == stop_after:
            raise Stopped
        yield fact


def make_tracker(folder: Path) -> Accelerator | None:
    """TensorBoard through accelerate, where it is installed."""
    if not is_tensorboard_available():
        return None
    accelerator = Accelerator(log_with="tensorboard", project_dir=folder, cpu=True)
    accelerator.init_trackers("log")
    return accelerator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="facts in the stream")
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--save-steps", type=int, default=2, help="batches between two checkpoints")
    parser.add_argument("--probes", type=int, default=20, help="old facts that are asked again after each batch")
    parser.add_argument("--stop-after", type=int, help="break the stream off after so many facts")
    parser.add_argument("--output", type=Path, default=Path("lifelong_output"))
    args = parser.parse_args()

    base, tokenizer = load_tiny_model()
    known = load_tiny_facts()
    facts, kept = known[: args.count], known[args.count :]
    model = get_peft_model(base, EditConfig(task_type="CAUSAL_LM")).eval()

    # Once for all starts of the run.
    folder = args.output / "statistics"
    if not (folder / "key_statistics.json").exists():
        texts = (f"{fact.filled_prompt} {fact.target_true}." for fact in kept)
        model.collect_statistics(texts, tokenizer).save(folder)

    tracker = make_tracker(args.output)
    try:
        report = model.edit_facts(
            arriving(facts, args.stop_after),
            tokenizer,
            batch_size=args.batch_size,
            statistics=KeyStatistics.load(folder),
            output_dir=args.output / "checkpoints",
            save_steps=args.save_steps,
            resume_from_checkpoint=True,  # from the newest checkpoint; from the beginning where there is none
            tracker=tracker,
            probes=args.probes,
        )
    except (KeyboardInterrupt, Stopped):
        print(f"interrupted with {len(model.edited_facts())} facts in the adapter; start again to go on")
        raise SystemExit(1) from None
    finally:
        if tracker is not None:
            tracker.end_training()

    print(report)
    model.save_pretrained(args.output / "adapter")
    print(f"\nedited {len(report.facts)} facts in this start; wrote {args.output}/adapter")


if __name__ == "__main__":
    main()
