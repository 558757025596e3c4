"""Editing: from validated facts to a new delta and a new memory, one batch at a time, each batch a transaction."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from .adapter import delta_norms, module_reports, module_solution, solve_all, transaction
from .anchoring import anchor_norm, anchored
from .architectures import block_index, find_blocks
from .facts import Fact
from .gradients import FactGradients, read_gradients
from .hooks import evaluating
from .lifelong import Run
from .memory import EditMemory, EditRecord
from .preparation import encode_facts, prepared_memory, search_settings
from .prompts import FactPrompts, PromptEncoder, context_window
from .report import EditReport, FactReport
from .residual import ResidualPath, probe_residual_path
from .scoring import score_targets
from .search import FullForward, SearchResult, choose_forward, search_groups, search_targets
from .sharded import runnable
from .shared_keys import held_under_same_key, in_turns, with_companions
from .solve import Unmet
from .spreading import Spread
from .statistics import KeyStatistics
from .stopwatch import Stopwatch
from .stream import FactStream
from .workers import Workers


if TYPE_CHECKING:
    from .model import EditModel


SCORED_TOGETHER = 16  # as in the search, so that rounding does not depend on the number of processes


class FactEditor:
    """Writes facts into one adapter. Made for one call of `edit_facts`.

    Args:
        tuner (`EditModel`): The wrapped model.
        adapter_name (`str`): The adapter, as `editable_adapter` gave it.
        tokenizer: The model's tokenizer.
        statistics (`KeyStatistics`, *optional*): Key statistics to use from now on.
        search_slots (`int`): Facts searched at the same time; 0 for as many as memory allows.
        full_search (`bool`): Run the search on whole sequences.
        strict (`bool`): Raise when a fact's search diverges, instead of leaving the fact out.
        progress (`bool`): Show a progress bar.
    """

    def __init__(
        self,
        tuner: EditModel,
        adapter_name: str,
        tokenizer: Any,
        statistics: KeyStatistics | None = None,
        search_slots: int = 0,
        full_search: bool = False,
        strict: bool = False,
        progress: bool = True,
    ) -> None:
        if any(parameter.is_inference() for parameter in tuner.model.parameters()):
            raise RuntimeError(
                "The model's weights were made in torch.inference_mode(), so that no gradient can pass them: load the "
                "model, and wrap it, outside of it."
            )
        self.tuner = tuner
        self.adapter_name = adapter_name
        self.tokenizer = tokenizer
        self.full_search = full_search
        self.strict = strict
        self.progress = progress
        self.config = tuner.peft_config[adapter_name]
        self.model: Any = tuner.model
        self.layers = tuner.edit_layers(adapter_name)
        self.blocks = list(find_blocks(self.model)[1])
        self.block_of = {name: block_index(name) for name in self.layers}
        self.last = list(self.layers)[-1]
        embedding = self.model.get_input_embeddings()
        self.encoder = PromptEncoder(
            tokenizer, embedding.num_embeddings, context_window(self.model.config), self.config.chat_template
        )
        self.watch = Stopwatch()
        self.forward: FullForward | None = None
        self.workers = Workers.of(self.model)
        self.device = self.layers[self.last].get_delta(adapter_name).device
        self.contexts: tuple[str, ...] = ()
        self.held: dict[tuple[str, str], EditRecord] = {}
        self._base_norms: dict[str, float] = {}
        self.paths: dict[str, ResidualPath | None] = {}
        self.given_statistics = statistics
        self.settings = search_settings(self.config, self.block_of[self.last], len(self.blocks), search_slots)

    def run(self, stream: FactStream, run: Run) -> EditReport:
        """Edits a stream of facts batch by batch; see `EditModel.edit_facts`."""
        report = EditReport()
        with evaluating(self.model), runnable(self.model), torch.inference_mode(False), torch.enable_grad():
            with self.watch("preparation"):
                self.workers.together(lambda: run.start(self, stream))
                memory: EditMemory | None = self.workers.together(self._prepared_memory)
                assert memory is not None
                self.contexts = memory.contexts or ()
                self.held = {record.key: record for record in memory.records}
                batches = self._batches(stream)
                total = None if stream.left is None else len(stream.left)
            hidden = not self.progress or not self.workers.is_main
            with tqdm(total=total, desc="Editing", unit="facts", disable=hidden) as bar:
                for facts, prompts in batches:
                    with transaction(self.tuner, self.adapter_name):
                        if memory is not None:
                            self._adopt(memory)
                        done = bar.n + len(facts)
                        reports = self._edit_batch(facts, prompts, bar.update)
                        bar.update(done - bar.n)  # the share of other processes
                    memory = None  # the adapter has it now
                    report.facts += reports
                    report.norms.append(self._norm_shares())
                    run.after_batch(self, stream, report, len(reports))
            run.save(self, stream)
        report.modules = module_reports(self.tuner, self.adapter_name)
        report.seconds = self.watch.seconds
        report.facts_held = len(self.config.memory) if self.config.memory is not None else 0
        return report

    def _batches(self, stream: FactStream) -> Iterable[tuple[list[Fact], list[FactPrompts]]]:
        """Facts and their prompts; all of them are checked at once where they are all known."""
        if stream.left is None:
            return self._streamed(stream)
        self.workers.check_same(repr([(fact.key, fact.target) for fact in stream.left]), "facts")
        encoded = iter(self._encode(stream.left))
        return ((facts, list(islice(encoded, len(facts)))) for facts in stream.batches())

    def _streamed(self, stream: FactStream) -> Iterator[tuple[list[Fact], list[FactPrompts]]]:
        """Facts and their prompts, each batch checked as it comes: that it is sound, and the same in every process."""
        batches = stream.batches()
        while True:
            first = stream.consumed
            facts = self.workers.together(lambda: next(batches, None))
            self.workers.check_same(f"{stream.consumed} {stream.digest}", "facts")
            if facts is None:
                return
            yield facts, self._encode(facts, first)

    def _norm_shares(self) -> dict[str, float]:
        return {
            name: float(layer.get_delta(self.adapter_name).double().norm()) / self._base_norm(name)
            for name, layer in self.layers.items()
        }

    def _base_norm(self, name: str) -> float:
        if name not in self._base_norms:
            self._base_norms[name] = self.layers[name].base_norm()
        return self._base_norms[name]

    # --- before the first batch ----------------------------------------------------------------------------------

    def _prepared_memory(self) -> EditMemory:
        return prepared_memory(self.tuner, self.adapter_name, self.tokenizer, self.given_statistics)

    def _adopt(self, memory: EditMemory) -> None:
        """Makes the prepared memory the adapter's; under new statistics what it holds is solved again."""
        held = self.config.memory
        if held is not None and len(held) and held.statistics is not memory.statistics:
            solve_all(self.tuner, self.adapter_name, memory)
        else:
            self.config.memory = memory

    def _encode(self, facts: Sequence[Fact], first: int = 0) -> list[FactPrompts]:
        return encode_facts(self.encoder, facts, self.contexts, self.held.values(), self.settings.infers, first)

    def _path(self, name: str, prompts: FactPrompts) -> ResidualPath | None:
        if name not in self.paths:
            row = prompts.rows[0]
            device = self.model.get_input_embeddings().weight.device
            ids = torch.tensor([row.ids[: row.prompt_length]], device="cpu" if device.type == "meta" else device)
            self.paths[name] = probe_residual_path(
                self.model, self.blocks[self.block_of[name]], self.layers[name], ids
            )
            if self.paths[name] is None and len(self.layers) > 1:
                raise ValueError(
                    f"The output of '{name}' does not reach the residual stream by addition, scaling or an RMS norm, "
                    "so a target cannot be spread over several layers of this architecture: edit one layer "
                    "(layers_to_transform=[k])."
                )
        return self.paths[name]

    def _forward(self, example: FactPrompts) -> FullForward:
        """How the search runs the model; settled with the first fact."""
        if self.forward is None:
            for name in self.layers:
                self._path(name, example)
            first = next(iter(self.layers.values()))
            self.forward = choose_forward(
                self.model,
                self.blocks,
                self.block_of[self.last],
                self.layers[self.last],
                self.paths[self.last],
                example,
                keys_of=first,
                force_full=self.full_search,
            )
        return self.forward

    # --- one batch -----------------------------------------------------------------------------------------------

    def _edit_batch(self, facts: Sequence[Fact], prompts: Sequence[FactPrompts], advance: Any) -> list[FactReport]:
        """All of it at once, or in turns where facts share a key."""
        turns = in_turns(facts) if self.config.joint_search else [list(range(len(facts)))]
        reports: dict[int, FactReport] = {}
        for turn in turns:
            done = self._edit_turn([facts[place] for place in turn], [prompts[place] for place in turn], advance)
            reports.update(zip(turn, done))
        return [reports[place] for place in range(len(facts))]

    def _edit_turn(self, facts: Sequence[Fact], prompts: Sequence[FactPrompts], advance: Any) -> list[FactReport]:
        replaced = [self.held.get(fact.key) for fact in facts]
        before = self.config.memory
        self._forget(before, replaced)
        with self.watch("search"):
            found = self._found(self._joined(facts, prompts), advance)
        written = self._usable(facts, found)
        kept = [index for index, good in enumerate(written) if good]
        if any(record is not None and not good for record, good in zip(replaced, written)):
            replaced = [record if good else None for record, good in zip(replaced, written)]
            self._forget(before, replaced)  # what could not be replaced stays
        records: list[EditRecord] = []
        if kept:
            chosen = [prompts[i] for i in kept]
            usable = self._anchored(chosen, found.of(kept)) if isinstance(found, SearchResult) else found.of(kept)
            records = self._write([facts[i] for i in kept], chosen, usable)
        with self.watch("check"):
            log_probability, greedy = self.score([_question(fact) for fact in prompts])
        for record in replaced:
            if record is not None:
                del self.held[record.key]
        self.held |= {record.key: record for record in records}
        return [
            FactReport(
                id=fact.fact_id,
                subject=fact.subject,
                prompt=fact.prompt,
                target=fact.target,
                written=written[index],
                converged=bool(found.converged[index]),
                steps=int(found.steps[index]),
                search_probability=float(found.probability[index]),
                probability=float(log_probability[index].exp()),
                recalled=bool(greedy[index]),
                replaced=None if (old := replaced[index]) is None else old.target,
            )
            for index, fact in enumerate(facts)
        ]

    def _joined(self, facts: Sequence[Fact], prompts: Sequence[FactPrompts]) -> Sequence[FactPrompts]:
        """The prompts, with those of facts that the adapter holds under the same key."""
        if not self.config.joint_search or self.settings.infers:
            return prompts
        return [
            with_companions(own, [self.encoder.encode_fact(other, self.contexts) for other in others])
            for own, others in zip(prompts, held_under_same_key(facts, self.held.values()))
        ]

    def _forget(self, memory: EditMemory, replaced: Sequence[EditRecord | None]) -> None:
        """The adapter as `memory` has it, without the facts that are about to be replaced."""
        outdated = {record.id for record in replaced if record is not None}
        if outdated or memory is not self.config.memory:
            with self.watch("solve"):
                solve_all(self.tuner, self.adapter_name, memory.without(outdated))

    def _found(self, prompts: Sequence[FactPrompts], advance: Any) -> SearchResult | FactGradients:
        """What the update rule edits from: searched targets, or gradients."""
        if not self.config.update_rule().from_gradients:
            return self._search(prompts, advance)
        if len(prompts) + len(self.held) < 2:
            raise ValueError(
                f"The update {self.config.update!r} measures by how much facts differ, and there is only one: begin "
                "with a batch of at least two."
            )

        def read(own: list[int]) -> Sequence[torch.Tensor]:
            gradients = read_gradients(self.model, self.layers, [prompts[place] for place in own])
            advance(len(own))
            return gradients.tensors()

        return FactGradients.from_tensors(self.workers.rows(len(prompts), read))

    def _anchored(self, prompts: Sequence[FactPrompts], found: SearchResult) -> SearchResult:
        """The found values at the norm that the config asks for; the first batch sets the anchor."""
        memory, anchor = self.config.memory, self.config.value_norm
        if anchor == "free":
            return found
        if anchor == "anchored":
            if memory.anchor is None:
                pilot = self._search_unedited(prompts) if len(memory) else found
                memory = self.config.memory = replace(memory, anchor=anchor_norm(pilot))
            anchor = memory.anchor
        return anchored(found, anchor, self.paths[self.last] or ResidualPath())

    def _search_unedited(self, prompts: Sequence[FactPrompts]) -> SearchResult:
        """As `_search`, without what this adapter has written."""
        deltas = {name: layer.get_delta(self.adapter_name) for name, layer in self.layers.items()}
        try:
            for name, layer in self.layers.items():
                layer.set_delta(self.adapter_name, torch.zeros_like(deltas[name]))
            return self._search(prompts, lambda _count: None)
        finally:
            for name, layer in self.layers.items():
                layer.set_delta(self.adapter_name, deltas[name])

    def _search(self, prompts: Sequence[FactPrompts], advance: Any) -> SearchResult:
        def search(own: list[int]) -> Sequence[torch.Tensor]:
            chosen = [prompts[place] for place in own]
            found = search_targets(self._forward(prompts[0]), chosen, self.settings, on_finished=advance)
            # Companions, behind a fact's own rows, have the same keys.
            return replace(found, keys=found.keys[:, : 1 + len(self.contexts)]).tensors()

        found = self.workers.rows(len(prompts), search, self.groups(prompts))
        return SearchResult(*(tensor.to(self.device) for tensor in found))

    def groups(self, prompts: Sequence[FactPrompts]) -> list[list[int]]:
        """The groups that processes share out."""
        groups, processes = search_groups(prompts, self.settings), self.workers.size
        if self.workers.splits and self.workers.is_main and len(groups) < processes:
            warnings.warn(
                f"{processes - len(groups)} of {processes} processes have nothing to search: a batch of "
                f"{len(prompts)} facts makes {len(groups)} group(s). Take larger batches, or smaller groups with "
                f"search_slots={max(1, len(prompts) // (2 * processes))}.",
                stacklevel=2,
            )
        return groups

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability (P,) of targets after prompts, and whether they are the greedy completion (P,)."""

        def score(own: list[int]) -> Sequence[torch.Tensor]:
            scores = score_targets(self.model, [pairs[place] for place in own])
            return scores.log_probability, scores.greedy

        starts = range(0, len(pairs), SCORED_TOGETHER)
        groups = [list(range(start, min(start + SCORED_TOGETHER, len(pairs)))) for start in starts]
        log_probability, greedy = self.workers.rows(len(pairs), score, groups)
        return log_probability, greedy

    def _usable(self, facts: Sequence[Fact], found: SearchResult | FactGradients) -> list[bool]:
        failed = [bool(flag) for flag in found.failed]
        if all(failed) and not bool(found.steps.any()):
            raise ValueError(
                "The model's outputs are not finite before anything is changed: the weights hold "
                "NaN or infinite values, or overflow in this dtype (try bfloat16 or float32)."
            )
        bad = [fact for fact, flag in zip(facts, failed) if flag]
        if bad:
            message = (
                f"The target search diverged for {len(bad)} fact(s), first {bad[0].filled_prompt!r} -> "
                f"{bad[0].target!r}; lower search_lr, or use a wider dtype."
            )
            if self.strict:
                raise ValueError(message + " The batch was rolled back (strict=True).")
            warnings.warn(message + " They were not written.", stacklevel=2)
        return [not flag for flag in failed]

    def _write(
        self, facts: Sequence[Fact], prompts: Sequence[FactPrompts], found: SearchResult | FactGradients
    ) -> list[EditRecord]:
        """Spreads the wanted change over the edited layers as MEMIT does (arXiv 2210.07229, algorithm 1)."""
        memory = self.config.memory
        spread = Spread(self, prompts, found)
        pairs, solutions = {}, {}
        for index, (name, layer) in enumerate(self.layers.items()):
            with self.watch("keys"):
                keys, values = spread.pairs(index)
            with self.watch("solve"):
                known = module_solution(self.tuner, self.adapter_name, name, memory)
                unmet = self._unmet(name, prompts, found) if isinstance(found, SearchResult) else None
                solution, values = known.add(keys, values, self.config.refinement_rounds, unmet)
                layer.set_delta(self.adapter_name, solution.delta)
                solutions[name] = solution.kept
                pairs[name] = (keys.cpu(), values.cpu())
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        records = [
            EditRecord(fact.fact_id, fact.subject, fact.prompt, fact.target, now, memory.batches + 1, fact.target_true)
            for fact in facts
        ]
        memory = memory.append(records, pairs, solutions, isinstance(found, FactGradients))
        self.config.memory = memory.with_delta_norms(delta_norms(self.tuner, self.adapter_name))
        return records

    def _unmet(self, name: str, prompts: Sequence[FactPrompts], found: SearchResult) -> Unmet | None:
        """Which facts need more to be written of them into a module than there is under a delta of it.

        Those that the search has brought to be answered, and that are not yet answered with `sufficient_probability`;
        a fact that once was is not asked for again. Before the last module no fact can be judged.
        """
        sufficient = self.config.sufficient_probability
        if sufficient >= 1:
            return None
        needed = found.converged.clone()
        layer = self.layers[name]

        def unmet(delta: torch.Tensor) -> torch.Tensor:
            places = needed.nonzero().flatten().tolist()
            if name == self.last and places:
                layer.set_delta(self.adapter_name, delta)
                with self.watch("check"):
                    log_probability, greedy = self.score([_question(prompts[place]) for place in places])
                answered = greedy & (log_probability >= math.log(sufficient))
                needed[places] = ~answered.to(needed.device)
            return needed.to(delta.device)

        return unmet


def _question(prompts: FactPrompts) -> tuple[Sequence[int], Sequence[int]]:
    """A fact's bare prompt and target, as token ids."""
    bare = prompts.rows[0]
    return bare.ids[: bare.prompt_length], bare.target_ids
