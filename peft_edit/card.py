"""The model card of an edit adapter: what was edited into which model, how well it holds, how to load and undo it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from huggingface_hub import CardData, ModelCard
from peft import PeftModel

from .adapter import module_reports
from .config import EditConfig
from .files import replace_file
from .fingerprint import model_fingerprint
from .hub_names import hub_id
from .markdown import escape, table
from .memory import MEMORY_FACTS, EditRecord
from .methods import METHODS
from .model import EditModel
from .report import ModuleReport
from .sharded import is_sharded


CARD = "README.md"
NORM_PLOT = "edit_norms.png"
TAGS = ("peft", "knowledge-editing", "transformers")

# What stands between these lines is generated; what an author writes around them stays.
BEGIN = "<!-- peft-edit: generated from here on; write above this line, or below the last one -->"
END = "<!-- peft-edit: end of the generated part -->"

_UNWRITTEN = "# Model Card for Model ID"  # heading of the Hub's template as long as nobody has filled it in


@dataclass(frozen=True)
class CardContents:
    """What a card says besides what the model knows.

    Args:
        name (`str`): What `from_pretrained` is given to load the adapter: a repository of the Hub, or a directory.
        include_facts (`bool`): List the facts. Those of an adapter that is saved without memory are never listed.
        scores (*optional*): Measured scores: an `EditScores`, or a mapping of names to numbers, nested or not.
        license (`str`, *optional*): The adapter's licence, by its identifier on the Hub.
        tags (`tuple[str, ...]`): Further tags.
        most_facts (`int`): Facts in the table; the others are counted.
        plot (`bool`): Draw the norms as `edit_norms.png` beside the adapter, if matplotlib is installed.
    """

    name: str = "edits"
    include_facts: bool = True
    scores: Any = None
    license: str | None = None
    tags: tuple[str, ...] = ()
    most_facts: int = 50
    plot: bool = False


def write_card(model: PeftModel, directory: str | os.PathLike, contents: CardContents | None = None) -> Path:
    """Writes `README.md`. In a card that is there already the generated part and the metadata are brought up to date.

    Args:
        model (`PeftModel`): The model with the edit adapter or adapters.
        directory (`str`): Where the adapter is, or will be, saved.
        contents (`CardContents`, *optional*): What else the card says.

    Returns:
        `Path`: The card.

    Raises:
        ValueError: if the model has no edit adapter, or the card that is there cannot be read.
        OSError: if the directory cannot be written to.
    """
    contents = contents or CardContents()
    tuner = model.base_model
    if not isinstance(tuner, EditModel):
        raise ValueError(f"A card of edits needs a PeftModel with an edit adapter, got a {type(tuner).__name__}.")
    path = Path(directory, CARD)
    card = _read(path)
    _update_metadata(card.data, model, contents)
    sections = [*_body(tuner, Path(directory), contents), *_licence_section(card.data.get("license"))]
    card.text = _merged(card.text, "\n".join(sections))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda place: place.write_text(str(card), encoding="utf-8"))
    except OSError as error:
        raise type(error)(
            f"The model card '{path}' cannot be written ({error.strerror or error}): save to a directory that you "
            "can write to."
        ) from error
    return path


def base_id(tuner: EditModel) -> str | None:
    """The base model's name on the Hub; None if it has none that the adapters or the model know."""
    return next((found for name in _base_names(tuner) if (found := hub_id(name))), None)


# --- the file ----------------------------------------------------------------------------------------------------


def _read(path: Path) -> ModelCard:
    if not path.is_file():
        return ModelCard("---\n{}\n---\n")
    try:
        return ModelCard(path.read_text(encoding="utf-8"))
    except Exception as error:  # of reading, decoding, YAML or the metadata's own checks
        raise ValueError(
            f"The model card '{path}' cannot be read ({' '.join(str(error).split())}): repair or delete it."
        ) from error


def _merged(text: str, generated: str) -> str:
    """The card's text with its generated part replaced, or appended to what an author has written."""
    part = f"{BEGIN}\n\n{generated}\n\n{END}"
    if BEGIN in text and END in text.split(BEGIN, 1)[1]:
        before, rest = text.split(BEGIN, 1)
        return before + part + rest.split(END, 1)[1]
    if not text.strip() or _UNWRITTEN in text:
        return f"\n{part}\n"
    return f"{text.rstrip()}\n\n{part}\n"


def _update_metadata(data: CardData, model: PeftModel, contents: CardContents) -> None:
    tuner: Any = model.base_model
    data["library_name"] = "peft"
    base = base_id(tuner)
    tags = [*(data.get("tags") or []), *TAGS, *contents.tags]
    if base is not None:
        data["base_model"] = base
        data["base_model_relation"] = "adapter"
        tags.append(f"base_model:adapter:{base}")
    data["tags"] = list(dict.fromkeys(tags))
    if contents.license is not None:
        data["license"] = contents.license
    if not data.get("pipeline_tag") and any(config.task_type == "CAUSAL_LM" for config in model.peft_config.values()):
        data["pipeline_tag"] = "text-generation"


def _base_names(tuner: EditModel) -> list[str]:
    """What the adapters and the base model's own config call the base model: names on the Hub, or paths."""
    named = (config.base_model_name_or_path for config in tuner.peft_config.values())
    return [name for name in (*named, getattr(getattr(tuner.model, "config", None), "_name_or_path", None)) if name]


# --- the text ----------------------------------------------------------------------------------------------------


def _body(tuner: EditModel, directory: Path, contents: CardContents) -> Iterator[str]:
    configs = {name: config for name, config in tuner.peft_config.items() if tuner.edit_layers(name)}
    yield f"# {escape(contents.name)}: edited facts\n"
    yield (
        "A [PEFT](https://huggingface.co/docs/peft) adapter made by [peft-edit](https://pypi.org/project/peft-edit/): "
        "facts written into the weights of a language model, by solving for a change of some MLP projections rather "
        "than by training.\n"
    )
    yield from _base_section(tuner, configs)
    for name, config in configs.items():
        if len(configs) > 1:
            yield f"# Adapter {escape(name)}\n"
        yield from _facts_section(config, contents)
        yield from _settings_section(config)
        yield from _norms_section(tuner, name, directory, contents)
    if contents.scores is not None:
        yield from _scores_section(contents.scores)
    yield from _loading_section(tuner, configs, contents)
    yield from _undo_section(configs, contents)
    yield from _limits_section()


def _base_section(tuner: EditModel, configs: Mapping[str, EditConfig]) -> Iterator[str]:
    base, names = base_id(tuner), _base_names(tuner)
    fingerprint = _fingerprint(tuner, configs)
    yield "## Base model\n"
    folder = f', loaded from a folder "{escape(Path(names[0]).absolute().name)}"' if names else ""
    yield f"[{base}](https://huggingface.co/{base})" if base else f"A model without a name on the Hub{folder}"
    if fingerprint is None:
        yield ""
        return
    sizes = ", ".join(
        f"{label} {fingerprint[field]}"
        for field, label in (
            ("model_type", "type"),
            ("hidden_size", "hidden size"),
            ("num_hidden_layers", "layers"),
            ("vocab_size", "vocabulary"),
        )
        if fingerprint.get(field) is not None
    )
    yield f"({escape(sizes)}). Fingerprint of the edited modules' weights: `{_digest(fingerprint)}`.\n"
    yield "The adapter refuses to load on a base model whose weights differ.\n"


def _fingerprint(tuner: EditModel, configs: Mapping[str, EditConfig]) -> Mapping[str, Any] | None:
    """That of the memory; else of the model at hand, unless its base weights are out of reach."""
    for config in configs.values():
        if config.memory is not None:
            return config.memory.statistics.fingerprint
    layers = tuner.edit_layers()
    if is_sharded(tuner.model) or any(layer.merged for layer in layers.values()):
        return None
    return model_fingerprint(tuner.model, list(layers))


def _digest(fingerprint: Mapping[str, Any]) -> str:
    content = {key: value for key, value in fingerprint.items() if key != "name_or_path"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _shown_facts(config: EditConfig, contents: CardContents) -> tuple[EditRecord, ...] | None:
    """The facts that the card may name; None if they are withheld or unknown."""
    if config.memory is None or not config.save_memory or not contents.include_facts:
        return None
    return config.memory.records


def _facts_section(config: EditConfig, contents: CardContents) -> Iterator[str]:
    yield "## Facts\n"
    records = _shown_facts(config, contents)
    if records is None:
        count = "" if config.memory is None else f"{len(config.memory)} facts were edited. "
        yield (
            f"{count}Facts, subjects, keys and values are not published with this adapter. That is no secret keeping: "
            "who asks the model can guess what it was taught.\n"
        )
        return
    if not records:
        yield "None yet.\n"
        return
    yield f"{len(records)} {'fact' if len(records) == 1 else 'facts'}, oldest first:\n"
    shown = records[: contents.most_facts]
    before = any(record.target_true for record in shown)
    rows = [
        (record.id, record.filled_prompt, record.target, *((record.target_true or "",) if before else ()))
        for record in shown
    ]
    yield from table(("id", "prompt", "target", *(("before",) if before else ())), rows)
    if len(records) > len(shown):
        yield f"… and {len(records) - len(shown)} more in `{MEMORY_FACTS}`.\n"


def _settings_section(config: EditConfig) -> Iterator[str]:
    from . import __version__

    method = METHODS.get(config.method)
    yield "## Method and settings\n"
    rows = [
        ("method", config.method if method is None else f"{config.method}: {method.summary} ({method.source})"),
        ("update rule", " ".join([config.update, *(f"{k}={v}" for k, v in config.update_settings.items())])),
        ("preservation weight λp", config.preservation_weight),
        ("norm penalty λn", config.norm_penalty),
        ("norm budget, share of ‖W0‖", "none" if config.norm_budget is None else config.norm_budget),
        ("early stopping", config.early_stopping),
        ("search", f"at most {config.search_steps} steps, {config.search_optimizer}, rate {config.search_lr}"),
        ("refinements", config.refinement_rounds),
        ("contexts", config.num_contexts),
        ("seed", config.seed),
    ]
    if config.memory is not None:
        rows.append(("tokens of the key statistics", f"{config.memory.statistics.tokens:,}"))
    versions = {"peft-edit": __version__, "PEFT": peft.__version__, "PyTorch": torch.__version__}
    rows.append(("written with", ", ".join(f"{name} {version}" for name, version in versions.items())))
    yield from table(("setting", "value"), rows)


def _norms_section(tuner: EditModel, name: str, directory: Path, contents: CardContents) -> Iterator[str]:
    """Left out where base weights are spread over processes: only one of them writes the card."""
    if is_sharded(tuner.model):
        return
    reports = module_reports(tuner, name)
    yield "## Size of the change\n"
    rows = [
        (
            report.name,
            f"{report.norm:.4g}",
            f"{100 * report.share:.2f} %",
            "" if math.isnan(report.preservation_weight) else f"{report.preservation_weight:.4g}",
            "" if math.isnan(report.norm_penalty) else f"{report.norm_penalty:.4g}",
            "yes" if report.budget_binding else "no",
        )
        for report in reports
    ]
    yield from table(("module", "‖Δ‖", "of ‖W0‖", "λp", "λn", "budget binds"), rows)
    place = Path("" if name == "default" else name, NORM_PLOT)
    if contents.plot and _plot_norms(reports, directory / place):
        yield f"![Norm of the change per module]({place.as_posix().replace(' ', '%20')})\n"


def _plot_norms(reports: Sequence[ModuleReport], path: Path) -> bool:
    """Draws the bars; False if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6.4, 1.2 + 0.35 * len(reports)), layout="constrained")
    axes = figure.subplots()
    axes.barh([report.name for report in reports], [100 * report.share for report in reports], color="#0072B2")
    axes.invert_yaxis()
    axes.set_xlabel("‖Δ‖ in % of ‖W0‖")
    budget = reports[0].budget if reports else None
    if budget is not None:
        axes.axvline(100 * budget, color="#D55E00", linestyle="--", label="budget")
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return True


def _scores_section(scores: Any) -> Iterator[str]:
    values = scores if isinstance(scores, Mapping) else scores.to_dict()
    intervals = values.get("intervals", {})
    hidden = ("intervals", "per_fact", "confidence", "resamples", "seed")
    rows = []
    for name, value in _numbers({key: value for key, value in values.items() if key not in hidden}):
        ends = intervals.get(name)
        rows.append((name.replace("_", " "), f"{value:.4g}", "" if ends is None else f"{ends[0]:.4g} – {ends[1]:.4g}"))
    yield "## Scores\n"
    if not intervals:
        yield from table(("score", "value"), [row[:2] for row in rows])
        return
    share = f"{100 * values['confidence']:g} % interval" if "confidence" in values else "interval"
    yield from table(("score", "value", share), rows)


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a nested mapping, under their joined names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}: ")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", value


def _loading_section(tuner: EditModel, configs: Mapping[str, EditConfig], contents: CardContents) -> Iterator[str]:
    base = json.dumps(base_id(tuner) or "path/to/the/base/model")
    yield "## How to load\n"
    yield "```bash\npip install peft-edit\n```\n"
    yield "```python\nimport peft_edit  # makes PEFT know the adapter type"
    yield "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
    yield f"base = AutoModelForCausalLM.from_pretrained({base})"
    yield f"tokenizer = AutoTokenizer.from_pretrained({base})"
    for name in configs:
        place = "" if name == "default" else f", subfolder={json.dumps(name)}, adapter_name={json.dumps(name)}"
        yield f"model = PeftModel.from_pretrained(base, {json.dumps(contents.name)}{place})"
    yield "```\n"


def _undo_section(configs: Mapping[str, EditConfig], contents: CardContents) -> Iterator[str]:
    yield "## How to undo\n"
    held = [records for config in configs.values() if (records := _shown_facts(config, contents))]
    if held:
        named = held[0][0].id
        fact = json.dumps(named) if re.fullmatch(r"[\w.-]+", named) else '"an id from the table"'
        yield "One fact; what is left is the adapter that never had it:\n"
        yield f"```python\nmodel.remove_facts({fact})  # model.edited_facts() lists all, with their ids\n```\n"
        yield "All of them, for the time of a block:\n"
    else:
        yield "Single facts cannot be taken out of this copy. All of them, for the time of a block:\n"
    yield "```python\nwith model.disable_adapter():\n    ...\n```\n"
    yield "`model.unload()` gives the base model back for good.\n"


def _limits_section() -> Iterator[str]:
    yield "## Limits\n"
    yield (
        "- The facts were written as they were given; nobody has checked here that they are true. The model states "
        "them without a source.\n"
        "- An edit holds for its prompt and mostly for other wordings of it. It does not follow the other way round "
        '("B is A"), through several steps of reasoning, or through a long text.\n'
        "- Answers about other subjects can change too. Score the edited model on what matters to you.\n"
        "- Say that a model is edited when you pass it on, merged or not. Do not use edits to deceive.\n"
    )


def _licence_section(license: Any) -> Iterator[str]:
    yield "## Licence\n"
    own = "No licence is named for this adapter." if license is None else f"This adapter: {escape(str(license))}."
    yield f"{own} The licence of the base model applies to the edited model too."
