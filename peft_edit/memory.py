"""The edit memory: facts, keys, values and key statistics, everything that the delta is solved from.

An adapter with its memory can go on editing, forget single facts, and be solved again under another norm budget. A
memory is never changed in place: every operation returns a new one, so a transaction rolls back by keeping the old.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .facts import fill
from .files import replace_file
from .running import Penalties, RunningSolution
from .solve import NormalEquations, solve_dtype
from .statistics import KeyStatistics


MEMORY_JSON = "edit_memory.json"
MEMORY_TENSORS = "edit_memory.safetensors"
MEMORY_FACTS = "edit_facts.jsonl"
MEMORY_FILES = (MEMORY_JSON, MEMORY_TENSORS, MEMORY_FACTS, "key_statistics.json", "key_statistics.safetensors")
FORMAT_VERSION = 1

Pairs = tuple[torch.Tensor, torch.Tensor]  # keys and values of one batch


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

    @property
    def filled_prompt(self) -> str:
        """The prompt with the subject in place."""
        return fill(self.prompt, self.subject)


@dataclass(frozen=True)
class FactoredMark:
    """Where a module's running solution stood, so that it can be resumed to the last bit.

    Args:
        sums (`tuple[int, ...]`): Pairs in its equations after each product that was added to them.
        norm_penalty (`float`): λ in force.
        penalties (`tuple`): λp, λn, the largest norm and the null space's threshold that it was solved under.
    """

    sums: tuple[int, ...]
    norm_penalty: float
    penalties: tuple[float, float, float | None, float | None]


@dataclass(frozen=True)
class EditMemory:
    """Everything the cumulative delta is solved from.

    Args:
        statistics (`KeyStatistics`): Second moments of the keys of each edited module on ordinary text.
        contexts (`tuple[str, ...]`, *optional*): Prefixes behind which facts are searched; None until the first edit.
        records (`tuple[EditRecord, ...]`): The facts, oldest first.
        pairs (`dict[str, tuple]`): Per module, for each batch its keys (k, d_in) and values (k, d_out): what the delta
            should add to the output at the key. Rows in the order of `records`.
        batches (`int`): Batches written so far (removed facts do not lower it).
        anchor (`float`, *optional*): The norm that values are rescaled to (`value_norm="anchored"`); None until it has
            been measured.
        gradients (`bool`): Whether values are gradients of the loss by the module's output, not outputs.
        delta_norms (`dict[str, float]`): Per module, ||Δ||_F as it was solved from these pairs. A delta that has
            another one has come from elsewhere.
    """

    statistics: KeyStatistics
    contexts: tuple[str, ...] | None = None
    records: tuple[EditRecord, ...] = ()
    pairs: Mapping[str, tuple[Pairs, ...]] = field(default_factory=dict, repr=False)
    batches: int = 0
    anchor: float | None = None
    gradients: bool = False
    delta_norms: Mapping[str, float] = field(default_factory=dict, repr=False, compare=False)
    _solutions: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    _equations: Mapping[str, NormalEquations] = field(default_factory=dict, repr=False, compare=False)
    _marks: Mapping[str, FactoredMark] = field(default_factory=dict, repr=False, compare=False)
    _downdated: bool = field(default=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.records)

    def __deepcopy__(self, _memo: Any) -> EditMemory:
        return self  # immutable, so copies of a model may share it

    @property
    def keys(self) -> dict[str, torch.Tensor]:
        """Per module (n, d_in), row i of `records[i]`; put together on every call."""
        return {name: torch.cat([keys for keys, _ in batches]) for name, batches in self.pairs.items()}

    @property
    def values(self) -> dict[str, torch.Tensor]:
        """Per module (n, d_out), row i of `records[i]`; put together on every call."""
        return {name: torch.cat([values for _, values in batches]) for name, batches in self.pairs.items()}

    # --- the solution ------------------------------------------------------------------------------------------

    def solver_devices(self, module: str) -> tuple[torch.device, torch.device] | None:
        """Where the module's solution at hand lies, and where its equations; None if there is none."""
        known = self._solutions.get(module)
        if not isinstance(known, RunningSolution):
            return None
        return known.delta.device, known.equations.gram.device

    def kept(self, module: str) -> Any:
        """The module's solution at hand, of whatever kind; None if there is none."""
        return self._solutions.get(module)

    def solution(
        self,
        module: str,
        penalties: Penalties,
        shape: tuple[int, int],
        device: torch.device,
        store: torch.device | None = None,
    ) -> RunningSolution:
        """A module's ridge solution under these penalties: the one at hand, the one that was saved, or a fresh one.

        Args:
            module (`str`): The module.
            penalties (`Penalties`): What to solve under.
            shape (`tuple[int, int]`): d_in, d_out of the module.
            device (`torch.device`): Where to solve.
            store (`torch.device`, *optional*): Where to keep the equations meanwhile.
        """
        known = self._solutions.get(module)
        if isinstance(known, RunningSolution) and known.delta.device == device:
            if known.penalties.same_as(penalties):
                return known
            if known.penalties.null_space is None and penalties.null_space is None:
                return RunningSolution.solved(known.all_equations(), known.all_sums, penalties, store=store)
        empty = NormalEquations.empty(*shape, device=device, dtype=solve_dtype(device))
        mark = self._marks.get(module)
        if mark is not None and mark.penalties == penalties.numbers:
            return RunningSolution.resumed(self.pairs[module], mark.sums, mark.norm_penalty, penalties, empty, store)
        if penalties.null_space is None and module in self._equations:
            return RunningSolution.solved(self._equations[module].to(device), (len(self),), penalties, store=store)
        equations, sums = empty, [0]
        for keys, values in self.pairs.get(module, ()):
            equations = equations.add(penalties.effective(keys.to(empty.gram)), values)
            sums.append(sums[-1] + len(keys))
        return RunningSolution.solved(equations, tuple(sums), penalties, store=store)

    def with_solutions(self, solutions: Mapping[str, Any]) -> EditMemory:
        """The same memory with its solutions at hand."""
        return replace(self, _solutions=dict(solutions), _equations={}, _marks={})

    def with_delta_norms(self, delta_norms: Mapping[str, float]) -> EditMemory:
        """The same memory, which knows what its deltas are like."""
        return replace(self, delta_norms=dict(delta_norms))

    def canonical(self) -> EditMemory:
        """The same memory as it would be read back from its files: nothing depends on facts that were removed."""
        if not self._downdated:
            return self
        return replace(self, _solutions={}, _equations={}, _marks={}, _downdated=False)

    # --- other memories ----------------------------------------------------------------------------------------

    def with_contexts(self, contexts: tuple[str, ...]) -> EditMemory:
        """The same memory with the prefixes of its searches."""
        return replace(self, contexts=contexts)

    def with_statistics(self, statistics: KeyStatistics) -> EditMemory:
        """The same facts under other key statistics; where those say the same, saved solutions can be resumed."""
        moments = self.statistics.second_moments
        marks = {
            name: mark
            for name, mark in self._marks.items()
            if torch.equal(moments[name], statistics.second_moments[name])
        }
        return replace(self, statistics=statistics, _marks=marks)

    def append(
        self,
        records: Sequence[EditRecord],
        pairs: Mapping[str, Pairs],
        solutions: Mapping[str, Any],
        gradients: bool = False,
    ) -> EditMemory:
        """The memory with one more batch and the solutions that include it."""
        return replace(
            self,
            records=self.records + tuple(records),
            pairs={name: (*self.pairs.get(name, ()), batch) for name, batch in pairs.items()},
            batches=self.batches + 1,
            gradients=gradients,
            _solutions=dict(solutions),
            _equations={},
            _marks={},
        )

    def without(self, ids: Collection[str]) -> EditMemory:
        """The memory that never had these facts; ids that it does not hold are passed over."""
        gone = set(ids)
        keep = torch.tensor([record.id not in gone for record in self.records], dtype=torch.bool)
        dropped = int((~keep).sum())
        if not dropped:
            return self
        unsolved = replace(self, _solutions={}, _equations={}, _marks={}, _downdated=False)
        if dropped == len(keep):
            return replace(unsolved, records=(), pairs={})
        downdated = {}
        if 2 * dropped <= len(keep):  # cheaper than building them again
            for name, known in self._solutions.items():
                if not isinstance(known, RunningSolution) or known.penalties.null_space is not None:
                    continue
                keys = torch.cat([batch[~part] for part, (batch, _) in self._with_rows(keep, name)])
                values = torch.cat([batch[~part] for part, (_, batch) in self._with_rows(keep, name)])
                downdated[name] = known.all_equations().remove(keys, values)
        pairs = {
            name: tuple(
                (keys[part], values[part]) for part, (keys, values) in self._with_rows(keep, name) if bool(part.any())
            )
            for name in self.pairs
        }
        records = tuple(record for record, kept in zip(self.records, keep.tolist()) if kept)
        return replace(unsolved, records=records, pairs=pairs, _equations=downdated, _downdated=bool(downdated))

    def _with_rows(self, rows: torch.Tensor, module: str) -> Iterator[tuple[torch.Tensor, Pairs]]:
        """Each batch of a module with its part of `rows`."""
        batches = self.pairs[module]
        return zip(rows.split([len(keys) for keys, _ in batches]), batches)

    def union(self, other: EditMemory) -> EditMemory:
        """Both memories in one: normal equations of disjoint edits over one base add up.

        Raises:
            ValueError: if a fact or an id is in both, or the memories belong to different models or modules.
        """
        shared = {record.key for record in self.records} & {record.key for record in other.records}
        if shared:
            subject, prompt = sorted(shared)[0]
            raise ValueError(
                f"Both edit memories hold {len(shared)} of the same facts, among them {prompt!r} on {subject!r}: "
                "remove them from one adapter first."
            )
        twice = {record.id for record in self.records} & {record.id for record in other.records}
        if twice:
            raise ValueError(
                f"Both edit memories hold a fact under the id {sorted(twice)[0]!r}, and not the same one: edit one of "
                "them again under another id."
            )
        if set(self.statistics.second_moments) != set(other.statistics.second_moments):
            raise ValueError("The edit memories belong to different modules and cannot be added up.")
        if not other.records:
            return self
        if self.records and self.gradients != other.gradients:
            raise ValueError(
                "One edit memory holds values and the other value gradients, which cannot be solved together: combine "
                "the adapters with combination_type='linear'."
            )
        shift = self.batches
        moved = tuple(replace(record, batch=record.batch + shift) for record in other.records)
        return EditMemory(
            self.statistics,
            self.contexts,
            self.records + moved,
            {name: self.pairs.get(name, ()) + batches for name, batches in other.pairs.items()},
            self.batches + other.batches,
            self.anchor if self.anchor is not None else other.anchor,
            other.gradients,
        )

    # --- files -------------------------------------------------------------------------------------------------

    def save(self, directory: str | os.PathLike) -> None:
        """Writes `MEMORY_FILES`, each atomically: tensors as safetensors, facts as JSON lines, the rest as JSON."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"keys.{name}": tensor for name, tensor in self.keys.items()}
        tensors |= {f"values.{name}": tensor for name, tensor in self.values.items()}
        self.statistics.save(folder)
        replace_file(folder / MEMORY_TENSORS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        lines = "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in self.records)
        replace_file(folder / MEMORY_FACTS, lambda path: path.write_text(lines, encoding="utf-8"))
        about = {
            "format_version": FORMAT_VERSION,
            "facts": len(self.records),
            "batches": self.batches,
            "contexts": self.contexts,
            "anchor": self.anchor,
            "gradients": self.gradients,
            "modules": sorted(self.statistics.second_moments),
            "delta_norms": dict(self.delta_norms),
            "factored": {name: asdict(mark) for name, mark in self._current_marks().items()},
        }
        text = json.dumps(about, indent=2, ensure_ascii=False)
        replace_file(folder / MEMORY_JSON, lambda path: path.write_text(text + "\n", encoding="utf-8"))

    def _current_marks(self) -> Mapping[str, FactoredMark]:
        if self._downdated:
            return {}
        return self._marks or {
            name: FactoredMark(solution.sums, solution.norm_penalty, solution.penalties.numbers)
            for name, solution in self._solutions.items()
            if isinstance(solution, RunningSolution)
        }

    @classmethod
    def load(cls, directory: str | os.PathLike) -> EditMemory:
        """Reads what `save` wrote and checks all of it. Keys and values stay on disk, mapped into memory.

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
            # Files of the first release know none of these.
            anchor, gradients = about.get("anchor"), bool(about.get("gradients"))
            norms = {str(name): float(norm) for name, norm in about.get("delta_norms", {}).items()}
            anchor = None if anchor is None else float(anchor)
            marks = {
                name: FactoredMark(tuple(mark["sums"]), float(mark["norm_penalty"]), tuple(mark["penalties"]))
                for name, mark in about.get("factored", {}).items()
            }
        except (OSError, json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise _broken(folder / MEMORY_JSON, repr(error)) from error
        if anchor is not None and not 0 < anchor < float("inf"):
            raise _broken(folder / MEMORY_JSON, f"the norm anchor is {anchor}")
        if version != FORMAT_VERSION:
            raise _broken(folder / MEMORY_JSON, f"format version {version}, this release reads {FORMAT_VERSION}")
        try:
            lines = (folder / MEMORY_FACTS).read_text(encoding="utf-8").split("\n")
            records = tuple(EditRecord(**json.loads(line)) for line in lines if line.strip())
        except (OSError, json.JSONDecodeError, TypeError) as error:
            raise _broken(folder / MEMORY_FACTS, repr(error)) from error
        if len(records) != count or len({record.id for record in records}) != count:
            raise _broken(
                folder / MEMORY_FACTS, f"{len(records)} facts where {MEMORY_JSON} counts {count} distinct ones"
            )
        sizes = [len(list(batch)) for _, batch in groupby(records, key=lambda record: record.batch)]
        ends = {0, *accumulate(sizes)}
        if any(not mark.sums or not ends.issuperset(mark.sums) or len(mark.penalties) != 4 for mark in marks.values()):
            raise _broken(folder / MEMORY_JSON, "its factorisations do not end where a batch does")
        pairs = _load_pairs(folder / MEMORY_TENSORS, statistics, sizes)
        return cls(statistics, contexts, records, pairs, batches, anchor, gradients, norms, _marks=marks)


def _load_pairs(path: Path, statistics: KeyStatistics, sizes: Sequence[int]) -> dict[str, tuple[Pairs, ...]]:
    count = sum(sizes)
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
    return {
        name: tuple(zip(tensors[f"keys.{name}"].split(sizes), tensors[f"values.{name}"].split(sizes)))
        for name in modules
        if count
    }


def _broken(path: Path, why: str) -> ValueError:
    return ValueError(
        f"The edit memory file '{path}' cannot be used ({why}): fetch or save the adapter again, or delete its "
        f"edit_memory.* files to use it for inference only."
    )
