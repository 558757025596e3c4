"""Where an adapter edits: the layers are chosen by measurement, and an empty adapter is moved there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .adapter import base_model, editable_adapter


if TYPE_CHECKING:
    from .analysis import LocateReport
    from .model import EditModel


def locate_and_move(
    tuner: EditModel, facts: Any, tokenizer: Any, count: int | None, adapter_name: str | None, **options: Any
) -> LocateReport:
    """See `EditModel.locate_layers`."""
    from .analysis import locate_layers

    name = editable_adapter(tuner, adapter_name)
    if tuner.peft_config[name].memory is not None:
        raise ValueError(
            f"Adapter {name!r} holds facts or key statistics of its present layers: locate the layers before anything "
            "else, or in a new adapter."
        )
    with base_model(tuner) as model:
        report = locate_layers(model, tokenizer, facts, **options)
    move_adapter(tuner, name, report.best_layers(count))
    return report


def move_adapter(tuner: EditModel, adapter_name: str, layers: list[int]) -> None:
    """Puts an adapter that holds nothing on the down-projections of other blocks."""
    config, active = tuner.peft_config[adapter_name], list(tuner.active_adapters)
    given = config.given
    tuner.delete_adapter(adapter_name)
    config.layers_to_transform, config.in_use, config.unlocated = layers, False, False
    tuner.peft_config[adapter_name] = config
    tuner.inject_adapter(tuner.model, adapter_name)
    config.given = given
    tuner.set_adapter(active)


def check_located(tuner: EditModel, adapter_name: str, what: str) -> None:
    """Raises a ValueError if the adapter's layers are still to be chosen."""
    if tuner.peft_config[adapter_name].unlocated:
        raise ValueError(
            f'The layers of adapter {adapter_name!r} are to be chosen by measurement (layers_to_transform="auto"): '
            f"call model.locate_layers(some_facts, tokenizer) before {what}."
        )
