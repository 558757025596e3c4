"""The edit memory: facts, keys, values and key statistics, everything that the delta is solved from.

An adapter with its memory can go on editing, forget single facts, and be solved again under another norm budget. A
memory is never changed in place: every operation returns a new one, so a transaction rolls back by keeping the old.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .files import replace_file
from .solve import NormalEquations, solve_dtype
from .statistics import KeyStatistics


MEMORY_JSON = "edit_memory.json"
MEMORY_TENSORS = "edit_memory.safetensors"
MEMORY_FACTS = "edit_facts.jsonl"
MEMORY_FILES = (MEMORY_JSON, MEMORY_TENSORS, MEMORY_FACTS, "key_statistics.json", "key_statistics.safetensors")
FORMAT_VERSION = 1


@dataclass(frozen=True)
class EditRecord:
    """One fact that the adapter holds.

    Args:
        id (`str`): Identifier, for `remove_facts`.
        subject (`str`): Subject.
        prompt (`str`): Prompt with `{}` for the subject.
        target (`str`): What the model was made to say.
        created (`str`): When, UTC, ISO 8601.
        batch (`int`): The batch of the adapter in which the fact was written, counted from 1.
        target_true (`str`, *optional*): The answer before, where the user gave it.
    """

    id: str
    subject: str
    prompt: str
    target: str
    created: str
    batch: int
    target_true: str | None = None

    @property
    def key(self) -> tuple[str, str]:
        """Subject and prompt without outer white space, as in `Fact.key`."""
        return self.subject.strip(), self.prompt.strip()


@dataclass(frozen=True)
class EditMemory:
    """Everything the cumulative delta is solved from. Row i of every tensor belongs to `records[i]`.

    Args:
        statistics (`KeyStatistics`): Second moments of the keys of each edited module on ordinary text.
        contexts (`tuple[str, ...]`, *optional*): Prefixes behind which facts are searched; None until the first edit.
        records (`tuple[EditRecord, ...]`): The facts, oldest first.
        keys (`dict[str, torch.Tensor]`): Per module (n, d_in).
        values (`dict[str, torch.Tensor]`): Per module (n, d_out): what the delta should add to the output at the key.
        batches (`int`): Batches written so far (removed facts do not lower it).
    """

    statistics: KeyStatistics
    contexts: tuple[str, ...] | None = None
    records: tuple[EditRecord, ...] = ()
    keys: Mapping[str, torch.Tensor] = field(default_factory=dict)
    values: Mapping[str, torch.Tensor] = field(default_factory=dict)
    batches: int = 0
    _equations: Mapping[str, NormalEquations] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.records)

    def __deepcopy__(self, _memo: Any) -> EditMemory:
        return self  # immutable, so copies of a model may share it

    def equations(self, module: str, d_in: int, d_out: int, device: torch.device) -> NormalEquations:
        """The normal equations of a module, in the solver's dtype on `device`; built if not at hand."""
        known = self._equations.get(module)
        if known is not None and known.gram.device == device:
            return known
        dtype = solve_dtype(device)
        if not self.records:
            return NormalEquations.empty(d_in, d_out, device=device, dtype=dtype)
        return NormalEquations.from_pairs(
            self.keys[module].to(device=device, dtype=dtype), self.values[module].to(device=device, dtype=dtype)
        )

    def with_equations(self, equations: Mapping[str, NormalEquations]) -> EditMemory:
        """The same memory with its normal equations at hand."""
        return replace(self, _equations=dict(equations))

    def with_contexts(self, contexts: tuple[str, ...]) -> EditMemory:
        """The same memory with the prefixes of its searches."""
        return replace(self, contexts=contexts)

    def with_statistics(self, statistics: KeyStatistics) -> EditMemory:
        """The same facts under other key statistics."""
        return replace(self, statistics=statistics)

    def append(
        self,
        records: Sequence[EditRecord],
        keys: Mapping[str, torch.Tensor],
        values: Mapping[str, torch.Tensor],
        equations: Mapping[str, NormalEquations] | None = None,
    ) -> EditMemory:
        """The memory with one more batch; `equations` are those that include it, if they are at hand."""

        def extended(old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: torch.cat([old[name], new[name]]) if name in old else new[name] for name in new}

        return replace(
            self,
            records=self.records + tuple(records),
            keys=extended(self.keys, keys),
            values=extended(self.values, values),
            batches=self.batches + 1,
            _equations=dict(equations or {}),
        )

    def without(self, ids: Collection[str]) -> EditMemory:
        """The memory that never had these facts; ids that it does not hold are passed over."""
        gone = set(ids)
        keep = [index for index, record in enumerate(self.records) if record.id not in gone]
        if len(keep) == len(self.records):
            return self
        if not keep:
            return replace(self, records=(), keys={}, values={}, _equations={})
        drop = [index for index, record in enumerate(self.records) if record.id in gone]
        equations = {}
        if len(drop) <= len(keep):  # a downdate is cheaper than building them again
            for name, known in self._equations.items():
                keys, values = self.keys[name][drop].to(known.gram), self.values[name][drop].to(known.gram)
                equations[name] = known.remove(keys, values)
        return replace(
            self,
            records=tuple(self.records[index] for index in keep),
            keys={name: tensor[keep] for name, tensor in self.keys.items()},
            values={name: tensor[keep] for name, tensor in self.values.items()},
            _equations=equations,
        )

    def union(self, other: EditMemory) -> EditMemory:
        """Both memories in one: normal equations of disjoint edits over one base add up.

        Raises:
            ValueError: if a fact is in both, or the memories belong to different models or modules.
        """
        shared = {record.key for record in self.records} & {record.key for record in other.records}
        if shared:
            subject, prompt = sorted(shared)[0]
            raise ValueError(
                f"Both edit memories hold {len(shared)} of the same facts, among them {prompt!r} on {subject!r}: "
                "remove them from one adapter first."
            )
        if set(self.statistics.second_moments) != set(other.statistics.second_moments):
            raise ValueError("The edit memories belong to different modules and cannot be added up.")
        if not other.records:
            return self
        shift = self.batches
        moved = [replace(record, batch=record.batch + shift) for record in other.records]
        joined = self.append(moved, other.keys, other.values)
        return replace(joined, batches=self.batches + other.batches)

    # --- files -------------------------------------------------------------------------------------------------

    def save(self, directory: str | os.PathLike) -> None:
        """Writes `MEMORY_FILES`, each atomically: tensors as safetensors, facts as JSON lines, the rest as JSON."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"keys.{name}": tensor.contiguous().cpu() for name, tensor in self.keys.items()}
        tensors |= {f"values.{name}": tensor.contiguous().cpu() for name, tensor in self.values.items()}
        self.statistics.save(folder)
        replace_file(folder / MEMORY_TENSORS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        lines = "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in self.records)
        replace_file(folder / MEMORY_FACTS, lambda path: path.write_text(lines, encoding="utf-8"))
        about = {
            "format_version": FORMAT_VERSION,
            "facts": len(self.records),
            "batches": self.batches,
            "contexts": self.contexts,
            "modules": sorted(self.statistics.second_moments),
        }
        text = json.dumps(about, indent=2, ensure_ascii=False)
        replace_file(folder / MEMORY_JSON, lambda path: path.write_text(text + "\n", encoding="utf-8"))

    @classmethod
    def load(cls, directory: str | os.PathLike) -> EditMemory:
        """Reads what `save` wrote and checks all of it.

        Raises:
            ValueError: naming the file that is missing, truncated or inconsistent, and how.
        """
        folder = Path(directory)
        statistics = KeyStatistics.load(folder)
        try:
            about = json.loads((folder / MEMORY_JSON).read_text(encoding="utf-8"))
            version, count = about["format_version"], about["facts"]
            contexts, batches = about["contexts"], about["batches"]
            contexts = None if contexts is None else tuple(contexts)
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise _broken(folder / MEMORY_JSON, repr(error)) from error
        if version != FORMAT_VERSION:
            raise _broken(folder / MEMORY_JSON, f"format version {version}, this release reads {FORMAT_VERSION}")
        try:
            lines = (folder / MEMORY_FACTS).read_text(encoding="utf-8").splitlines()
            records = tuple(EditRecord(**json.loads(line)) for line in lines if line.strip())
        except (OSError, json.JSONDecodeError, TypeError) as error:
            raise _broken(folder / MEMORY_FACTS, repr(error)) from error
        if len(records) != count or len({record.id for record in records}) != count:
            raise _broken(
                folder / MEMORY_FACTS, f"{len(records)} facts where {MEMORY_JSON} counts {count} distinct ones"
            )
        keys, values = _load_pairs(folder / MEMORY_TENSORS, statistics, count)
        return cls(statistics, contexts, records, keys, values, batches)


def _load_pairs(
    path: Path, statistics: KeyStatistics, count: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise _broken(path, str(error)) from error
    modules = statistics.second_moments
    expected = {f"{kind}.{name}" for kind in ("keys", "values") for name in modules} if count else set()
    if set(tensors) != expected:
        wrong = sorted(set(tensors) ^ expected)[0]
        raise _broken(path, f"tensor {wrong!r} is {'missing' if wrong in expected else 'not expected'}")
    for name, tensor in tensors.items():
        kind, _, module = name.partition(".")
        width = modules[module].shape[0] if kind == "keys" else tensor.shape[-1]
        if tensor.dim() != 2 or tuple(tensor.shape) != (count, width):
            raise _broken(path, f"tensor {name!r} has shape {tuple(tensor.shape)}, expected ({count}, {width})")
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise _broken(path, f"tensor {name!r} holds values that are not finite numbers")
    return (
        {name: tensors[f"keys.{name}"] for name in modules if count},
        {name: tensors[f"values.{name}"] for name in modules if count},
    )


def _broken(path: Path, why: str) -> ValueError:
    return ValueError(
        f"The edit memory file '{path}' cannot be used ({why}): fetch or save the adapter again, or delete its "
        f"edit_memory.* files to use it for inference only."
    )
