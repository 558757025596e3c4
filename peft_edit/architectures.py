"""Where to edit: an architecture's blocks, its MLP down-projections, and the band of layers that hold facts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D


# The module of each block's MLP that writes to the residual stream.
TARGET_MODULES: dict[str, list[str]] = {
    "gpt2": ["mlp.c_proj"],
    "gpt_neo": ["mlp.c_proj"],
    "gpt_bigcode": ["mlp.c_proj"],
    "starcoder2": ["mlp.c_proj"],
    "gptj": ["mlp.fc_out"],
    "codegen": ["mlp.fc_out"],
    "gpt_neox": ["mlp.dense_4h_to_h"],
    "falcon": ["mlp.dense_4h_to_h"],
    "bloom": ["mlp.dense_4h_to_h"],
    "opt": ["fc2"],
    "phi": ["mlp.fc2"],
    **{
        name: ["mlp.down_proj"]
        for name in (
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3_text",
            "phi3",
            "olmo",
            "olmo2",
            "olmo3",
            "stablelm",
            "granite",
            "cohere",
            "smollm3",
            "ministral",
        )
    },
}

_MIXTURE = re.compile(r"expert|moe|sparsemlp|mixture", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_BESIDE_MLP = re.compile(r"attn|attention|norm", re.IGNORECASE)


def default_layers(num_layers: int, model_type: str) -> list[int]:
    """The blocks to edit where the user names none: an early band, scaled with the depth; never the last.

    Blocks 4 to 8 of 32 as published for Llama, 13 to 17 of 48 for GPT-2. Where the depth does not divide, rather
    earlier: past the layer that reads the subject an edit comes too late.
    """
    width = min(5, max(1, num_layers * 5 // 32))
    first = num_layers * 13 // 48 if model_type == "gpt2" else num_layers // 8
    first = max(0, min(first, num_layers - 1 - width))
    return list(range(first, min(first + width, num_layers)))


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks.

    Raises:
        ValueError: if the model has no list of that many blocks.
    """
    config = getattr(model, "config", None)
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        count = getattr(config, name, None)
        if isinstance(count, int):
            lists = [
                (path, module)
                for path, module in model.named_modules()
                if isinstance(module, nn.ModuleList) and len(module) == count
            ]
            if lists:
                return min(lists, key=lambda found: found[0].count("."))
    raise ValueError(
        f"{type(model).__name__} has no list of decoder blocks that its config counts, so it cannot be edited: "
        "peft-edit edits decoder-only language models. For the adapter alone, on any model, name its modules in "
        "EditConfig(target_modules=[...])."
    )


def find_down_projections(model: nn.Module) -> list[str]:
    """Names, below a block, of the last Linear or Conv1D outside attention that writes d_model outputs.

    Raises:
        ValueError: if a block has none, or its MLP is a mixture of experts.
    """
    path, blocks = find_blocks(model)
    hidden = _hidden_size(model)
    names: list[str] = []
    for block in blocks:
        mixture = [
            name
            for name, module in block.named_modules()
            if name and not _BESIDE_MLP.search(name) and _MIXTURE.search(f"{name} {type(module).__name__}")
        ]
        if mixture:
            raise ValueError(
                f"{type(model).__name__} is a mixture of experts ('{path}.*.{mixture[0]}'): a fact passes through "
                "experts that change with its context, so its down-projections cannot be edited; use a dense model."
            )
        found = [
            name
            for name, module in _without_adapters(block)
            if isinstance(module, (nn.Linear, Conv1D)) and not _ATTENTION.search(name) and _outputs(module) == hidden
        ]
        if not found:
            raise ValueError(
                f"No MLP down-projection was found in the blocks '{path}' of {type(model).__name__}: name it, "
                "EditConfig(target_modules=['<name of the last linear module of the MLP>'])."
            )
        if found[-1] not in names:
            names.append(found[-1])
    return names


def _without_adapters(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The block's modules by name, as if adapters did not wrap some of them."""
    wrapped = [name for name, module in block.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in block.named_modules():
        owners = [owner for owner in wrapped if name == owner or name.startswith(f"{owner}.")]
        if not owners:
            yield name, module
        elif isinstance(module, BaseTunerLayer) and name == owners[0]:
            yield name, module.get_base_layer()


def check_layers(layers: Any, num_layers: int) -> None:
    """Raises a ValueError that names the valid range if a layer index is outside it."""
    for layer in [layers] if isinstance(layers, int) else layers:
        if not isinstance(layer, int) or not 0 <= layer < num_layers:
            raise ValueError(
                f"layers_to_transform names layer {layer!r}, but the model has {num_layers} layers, "
                f"0 to {num_layers - 1}."
            )


def block_index(module_name: str) -> int:
    """The block that a module belongs to: the first number in its name.

    Raises:
        ValueError: if there is none.
    """
    numbers = [part for part in module_name.split(".") if part.isdigit()]
    if not numbers:
        raise ValueError(
            f"'{module_name}' is in no numbered block, so it cannot hold edits; name modules inside the blocks."
        )
    return int(numbers[0])


def _hidden_size(model: Any) -> int:
    config = model.config
    text = getattr(config, "get_text_config", lambda: config)()
    return text.hidden_size


def _outputs(module: Any) -> int:
    return module.nf if isinstance(module, Conv1D) else module.out_features
