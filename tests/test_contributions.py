"""What residual streams are made of: the parts of attention, MLPs and edits, against plain hooks."""

import pytest
import torch
from peft import get_peft_model

from peft_edit import EditConfig
from peft_edit.analysis import residual_contributions
from peft_edit.analysis.passes import down_projections
from peft_edit.prompts import PromptEncoder

from .models import build_model
from .planted_answers import TOKENIZER, one_word_facts


class TestContributions:
    def test_parts_are_those_of_the_blocks(self, tiny, facts) -> None:
        model, tokenizer = tiny
        found = residual_contributions(model, tokenizer, facts[:3], batch_size=2)
        values = torch.zeros(3, 5)
        for fact in facts[:3]:
            seen = {}
            handles = []
            for layer, block in enumerate(model.model.layers):
                for name, module in (("attention", block.self_attn), ("mlp", block.mlp), ("block", block)):

                    def hook(_module, _args, output, key=(name, layer), seen=seen):
                        seen[key] = (output[0] if isinstance(output, tuple) else output)[0]

                    handles.append(module.register_forward_hook(hook))
            prompt = PromptEncoder(tokenizer, 2400).encode(fact, fact.prompt, "", None)
            with torch.no_grad():
                model(input_ids=torch.tensor([prompt.ids]))
            for handle in handles:
                handle.remove()
            for layer in range(5):
                size = seen["block", layer][prompt.subject_index].norm()
                for row, name in enumerate(("attention", "mlp")):
                    values[row, layer] += seen[name, layer][prompt.subject_index].norm() / size / 3
                values[2, layer] += size / 3
        torch.testing.assert_close(torch.tensor(found.attention), values[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.tensor(found.mlp), values[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.tensor(found.norm), values[2], rtol=1e-4, atol=1e-5)
        assert found.edit == [0.0] * 5 and found.positions == 3

    def test_the_edits_part_is_delta_times_key(self, tiny, facts) -> None:
        model, tokenizer = tiny
        wrapped = get_peft_model(model, EditConfig(task_type="CAUSAL_LM", layers_to_transform=[1])).eval()
        layer = wrapped.base_model.model.model.layers[1].mlp.down_proj
        before = residual_contributions(wrapped, tokenizer, facts[:1])
        delta = torch.randn(160, 1024, generator=torch.Generator().manual_seed(0)) * 0.05
        layer.set_delta("default", delta)
        found = residual_contributions(wrapped, tokenizer, facts[:1])
        prompt = PromptEncoder(tokenizer, 2400).encode(facts[0], facts[0].prompt, "", None)
        seen = {}
        handles = [
            layer.register_forward_pre_hook(lambda _m, args: seen.update(key=args[0][0, prompt.subject_index])),
            wrapped.base_model.model.model.layers[1].register_forward_hook(
                lambda _m, _a, out: seen.update(h=(out[0] if isinstance(out, tuple) else out)[0, prompt.subject_index])
            ),
        ]
        with torch.no_grad():
            wrapped(input_ids=torch.tensor([prompt.ids]))
        for handle in handles:
            handle.remove()
        expected = float((delta @ seen["key"]).norm() / seen["h"].norm())
        assert found.edit[1] == pytest.approx(expected, rel=1e-4) and expected > 0.01
        assert found.edit[0] == found.edit[2] == 0.0
        with wrapped.disable_adapter():
            assert residual_contributions(wrapped, tokenizer, facts[:1]) == before

    @pytest.mark.parametrize("family", ["gemma2", "granite", "gptj", "gpt2", "opt"])
    def test_other_families_add_up_too(self, family: str) -> None:
        """Norms behind the MLP, factors, parallel blocks: attention's part is what attention writes."""
        model = build_model(family)
        found = residual_contributions(model, TOKENIZER, one_word_facts())
        assert all(0 < share < 2 for share in [*found.attention, *found.mlp])
        with torch.no_grad():
            for module in down_projections(model):
                for parameter in module.parameters():
                    parameter.zero_()
        silent = residual_contributions(model, TOKENIZER, one_word_facts())
        assert max(silent.mlp) < 1e-6 < min(silent.attention)

    def test_texts_are_averaged_over_all_tokens_but_the_first(self, tiny, facts) -> None:
        model, tokenizer = tiny
        texts = [facts[0].filled_prompt, facts[1].filled_prompt]
        found = residual_contributions(model, tokenizer, texts)
        assert found.positions == sum(len(tokenizer(text)["input_ids"]) - 1 for text in texts)
        apart = [residual_contributions(model, tokenizer, [text]) for text in texts]
        mean = sum(part.mlp[2] * part.positions for part in apart) / found.positions
        assert found.mlp[2] == pytest.approx(mean, rel=1e-4)
        assert len(str(found).splitlines()) == 6 and found.to_dict()["positions"] == found.positions
        with pytest.raises(ValueError, match="no token to measure on"):
            residual_contributions(model, tokenizer, [])
