"""A downstream task that needs no file: is a number small?"""

from __future__ import annotations

from dataclasses import replace

from peft_edit.evaluation.downstream_tasks import DownstreamTask, Example


def toy(count=12, positives=4, **changes):
    """Examples whose text says their number; the first `positives` are labelled yes."""
    examples = tuple(Example(f"Number {index}\nIs it small:", int(index < positives)) for index in range(count))
    return replace(DownstreamTask("toy", ("no", "yes"), "Small or not?", 1, examples), **changes)
