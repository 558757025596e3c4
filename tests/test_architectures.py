"""Blocks, down-projections and default layers, by name and by structure."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from peft_edit.architectures import (
    TARGET_MODULES,
    block_index,
    check_layers,
    default_layers,
    find_blocks,
    find_down_projections,
)

from .models import FAMILIES, HIDDEN_SIZE, NUM_LAYERS, build_model


@pytest.mark.parametrize("family", FAMILIES)
def test_structure_finds_what_the_table_says(family):
    model = build_model(family)
    path, blocks = find_blocks(model)
    assert len(blocks) == NUM_LAYERS and model.get_submodule(path) is blocks
    names = TARGET_MODULES[model.config.model_type]
    assert find_down_projections(model) == names
    for block in blocks:
        projection = block.get_submodule(names[0])
        assert isinstance(projection, (nn.Linear, Conv1D))
        shape = projection.weight.shape if isinstance(projection, Conv1D) else projection.weight.T.shape
        assert shape[1] == HIDDEN_SIZE < shape[0]


@pytest.mark.parametrize("family", ("llama", "gpt2", "opt"))
def test_blocks_of_a_model_without_head(family):
    path, blocks = find_blocks(build_model(family).base_model)
    assert len(blocks) == NUM_LAYERS and path.split(".")[-1] in ("layers", "h")


def test_published_layers():
    assert default_layers(32, "llama") == [4, 5, 6, 7, 8]
    assert default_layers(48, "gpt2") == [13, 14, 15, 16, 17]


@pytest.mark.parametrize("model_type", ("llama", "gpt2"))
@pytest.mark.parametrize("depth", range(1, 100))
def test_default_layers_are_a_band_inside_the_model_and_not_the_last(model_type, depth):
    layers = default_layers(depth, model_type)
    assert 1 <= len(layers) <= 5
    assert layers == list(range(layers[0], layers[0] + len(layers)))
    assert layers[0] >= 0 and layers[-1] < max(depth - 1, 1)
    assert layers[0] <= depth // 2


def test_layers_out_of_range_are_named_with_the_range():
    check_layers([0, 3], 4)
    check_layers(3, 4)
    for wrong in (4, [0, 4], -1, [-1], ["2"]):
        with pytest.raises(ValueError, match=r"layers_to_transform.*4.*0 to 3"):
            check_layers(wrong, 4)


def test_block_index():
    assert block_index("model.layers.12.mlp.down_proj") == 12
    assert block_index("transformer.h.0.mlp.experts.7.c_proj") == 0
    with pytest.raises(ValueError, match="lm_head"):
        block_index("lm_head")


@pytest.mark.parametrize(
    "model_type, experts",
    [
        ("mixtral", {"num_local_experts": 2}),
        ("qwen3_moe", {"num_experts": 2, "moe_intermediate_size": 16, "head_dim": 8, "num_experts_per_tok": 1}),
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}),
    ],
)
def test_a_mixture_of_experts_is_refused_by_name(model_type, experts):
    config = AutoConfig.for_model(
        model_type,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        **experts,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"mixture of experts.*\.mlp") as error:
        find_down_projections(model)
    assert "attn" not in str(error.value)


class Experts(nn.Module):
    """A mixture held as a list of experts and a router, as older code has it."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(4, 2)
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])


class Custom(nn.Module):
    """A language model of no known architecture."""

    def __init__(self, block):
        super().__init__()
        self.config = AutoConfig.for_model("llama", hidden_size=4, num_hidden_layers=2, num_attention_heads=1)
        self.trunk = nn.ModuleList([block(), block()])


def test_a_list_of_experts_is_refused():
    with pytest.raises(ValueError, match="mixture of experts"):
        find_down_projections(Custom(Experts))


def test_no_projection_says_how_to_name_it():
    with pytest.raises(ValueError, match=r"target_modules="):
        find_down_projections(Custom(lambda: nn.ModuleDict({"attention": nn.Linear(4, 4), "up": nn.Linear(4, 8)})))


def test_the_last_projection_outside_attention_is_taken():
    names = {"up": nn.Linear(4, 8), "down": nn.Linear(8, 4), "self_attn": nn.ModuleDict({"out": nn.Linear(4, 4)})}
    assert find_down_projections(Custom(lambda: nn.ModuleDict(names))) == ["down"]


def test_no_blocks_says_how_to_name_modules():
    with pytest.raises(ValueError, match=r"target_modules"):
        find_blocks(nn.Sequential(nn.Linear(2, 2)))
