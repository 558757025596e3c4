"""Readings at the subject: those of plain passes over single sequences, also after deltas below have changed."""

import pytest
import torch
from peft import get_peft_model

from peft_edit import EditConfig
from peft_edit.architectures import block_index, find_blocks, find_down_projections
from peft_edit.hooks import on_input, on_output
from peft_edit.prompts import PromptEncoder
from peft_edit.reading import SubjectReader

from .models import build_model
from .world import town_facts, word_tokenizer


def plain(model, module, block, row):
    """Input and output of a module and output of a block at one row's subject, from the whole sequence."""
    seen = {}

    def keep(name):
        return lambda hidden: seen.update({name: hidden.reshape(-1, hidden.shape[-1])[row.subject_index]})

    with torch.no_grad(), on_input(module, keep("input")), on_output(module, keep("output")):
        with on_output(block, keep("block")):
            model(input_ids=torch.tensor([row.ids]))
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "gemma2"])
def test_equals_plain_passes_while_deltas_change(family):
    base = build_model(family)
    names = [name.rsplit(".", 1)[-1] if family == "opt" else name for name in find_down_projections(base)]
    config = EditConfig(task_type="CAUSAL_LM", target_modules=names, layers_to_transform=[0, 2, 3])
    model = get_peft_model(base, config).eval().base_model
    blocks = list(find_blocks(base)[1])
    encoder = PromptEncoder(word_tokenizer(), 1024, 128)
    facts = [encoder.encode_fact(fact, ("word1 word2 word3 . ",)) for fact in town_facts(5)]
    reader = SubjectReader(base, blocks, [fact.rows for fact in facts], chunk=3)
    layers = model.edit_layers()
    last = block_index(list(layers)[-1])
    for name, layer in layers.items():
        place = block_index(name)
        keys = reader.keys(layer, place)
        output, hidden = reader.outputs(layer, place, last)
        assert keys.shape == (5, 2, layer.in_features)
        for index, fact in enumerate(facts):
            for row, key in zip(fact.rows, keys[index]):
                assert torch.allclose(plain(base, layer, blocks[last], row)["input"], key, atol=1e-5)
            seen = plain(base, layer, blocks[last], fact.rows[0])
            assert torch.allclose(seen["output"], output[index], atol=1e-5)
            assert torch.allclose(seen["block"], hidden[index], atol=1e-5)
        layer.set_delta("default", 0.1 * torch.randn(layer.get_delta("default").shape))
