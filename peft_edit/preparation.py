"""What has to be known before facts are edited: memory, key statistics, contexts, settings, token sequences."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .adapter import base_model
from .collecting import SAMPLED_PER_INPUT, collect_statistics, sample_texts
from .facts import Fact, FactError
from .memory import EditMemory, EditRecord
from .prompts import FactPrompts, PromptEncoder, generate_contexts
from .search import SearchSettings
from .search.in_context import encode_in_context, middle_block
from .statistics import KeyStatistics


if TYPE_CHECKING:
    from .config import EditConfig
    from .model import EditModel


def prepared_memory(
    tuner: EditModel, adapter_name: str, tokenizer: Any, given: KeyStatistics | None = None
) -> EditMemory:
    """The adapter's memory, or a new one; with statistics and contexts, and checked against the model.

    Args:
        tuner (`EditModel`): The wrapped model.
        adapter_name (`str`): The adapter.
        tokenizer: The model's tokenizer.
        given (`KeyStatistics`, *optional*): Statistics to use from now on.

    Raises:
        ValueError: if the statistics are of another model or other modules.
    """
    config, modules = tuner.peft_config[adapter_name], list(tuner.edit_layers(adapter_name))
    memory = config.memory
    statistics = given or (memory.statistics if memory is not None else None)
    if statistics is None:
        statistics = _sampled_statistics(tuner, adapter_name, tokenizer)
    statistics.check(tuner.model, modules)
    if set(statistics.second_moments) != set(modules):
        statistics = statistics.subset(modules)
    if memory is None:
        memory = EditMemory(statistics=statistics)
    elif statistics is not memory.statistics:
        memory = memory.with_statistics(statistics)
    if memory.contexts is None:
        with base_model(tuner) as model:
            memory = memory.with_contexts(generate_contexts(model, tokenizer, config.num_contexts, config.seed))
    return memory


def _sampled_statistics(tuner: EditModel, adapter_name: str, tokenizer: Any) -> KeyStatistics:
    layers, seed = tuner.edit_layers(adapter_name), tuner.peft_config[adapter_name].seed
    count = SAMPLED_PER_INPUT * max(layer.in_features for layer in layers.values())
    warnings.warn(
        f"No key statistics were given: sampling {count} tokens of text from the model itself. For the best "
        "locality collect them once from ordinary text: collect_statistics(texts, tokenizer).",
        stacklevel=2,
    )
    with base_model(tuner) as model:
        texts = sample_texts(model, tokenizer, count, seed=seed)
        return collect_statistics(model, tokenizer, texts, list(layers), source="sampled from the model")


def search_settings(config: EditConfig, edited: int, blocks: int, slots: int) -> SearchSettings:
    """The target search that a config asks for.

    Args:
        config (`EditConfig`): The adapter's settings.
        edited (`int`): The block of the last edited module.
        blocks (`int`): Blocks of the model.
        slots (`int`): Facts searched at the same time; 0 for as many as the memory allows.

    Raises:
        ValueError: if the block that LTI is to constrain is out of reach.
    """
    return SearchSettings(
        early_stopping=config.early_stopping,
        extra_steps=config.mpes_extra_steps,
        steps=config.search_steps,
        optimizer=config.search_optimizer,
        lr=config.search_lr,
        weight_decay=config.search_weight_decay,
        kl_weight=config.search_kl_weight,
        max_norm=config.search_max_norm,
        patience=config.patience_steps,
        slots=slots,
        final_weight=config.lti_final_weight if config.lti else 0.0,
        middle_weight=config.lti_middle_weight if config.lti else 0.0,
        middle_block=middle_block(edited, blocks, config.lti_layer) if config.lti else None,
    )


def encode_facts(
    encoder: PromptEncoder,
    facts: Sequence[Fact],
    contexts: Sequence[str],
    held: Iterable[EditRecord],
    told: bool,
    first: int = 0,
) -> list[FactPrompts]:
    """The facts as token sequences; nothing is edited if one of them cannot be.

    Args:
        encoder (`PromptEncoder`): Of the model.
        facts (`Sequence[Fact]`): The facts.
        contexts (`Sequence[str]`): Prefixes behind which they are searched.
        held (`Iterable[EditRecord]`): What the adapter holds already.
        told (`bool`): Whether the rows that tell the fact are needed too (LTI).
        first (`int`): How many facts of a stream were edited before these.

    Raises:
        FactError: naming the fact, by its index, that cannot be encoded or has the id of another one.
    """
    ids = {record.id: record for record in held}
    encoded: list[FactPrompts] = []
    outcome = f"In the facts from {first} on nothing was edited (those before were)" if first else "Nothing was edited"
    for index, fact in enumerate(facts, start=first):
        record = ids.get(fact.fact_id)
        if record is not None and record.key != fact.key:
            raise FactError(
                f"{outcome}, fact {index} has the id {fact.fact_id!r}, under which the adapter holds "
                f"another fact ({record.prompt!r} on {record.subject!r}): choose another id."
            )
        try:
            encoded.append(encode_in_context(encoder, fact, contexts) if told else encoder.encode_fact(fact, contexts))
        except FactError as error:
            raise FactError(f"{outcome}, fact {index}: {error}") from None
    return encoded
