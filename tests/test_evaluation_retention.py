"""What an edited model retains: tenths of its edits, recall, perplexity by a plain loop and by hand."""

import json
import math

import pytest
import torch
from tokenizers import processors

from peft_edit.evaluation.retention import perplexity, retention, tenths
from peft_edit.evaluation.scores import recall, score_edits
from peft_edit.hooks import on_output

from . import evaluation_run
from .evaluation_run import sentences
from .plain_scores import NAN, edited_tiny, plain_log_probability


pytest_plugins = "tests.plain_scores"


def test_tenths_by_hand():
    assert tenths(100) == {"first": range(10), "middle": range(45, 55), "last": range(90, 100)}
    assert tenths(27) == {"first": range(2), "middle": range(12, 14), "last": range(25, 27)}
    assert tenths(1) == {"first": range(1), "middle": range(1), "last": range(1)}


def test_retention_of_an_edited_model(tiny, facts):
    model, tokenizer = edited_tiny(tiny)
    chosen = facts[:21]
    pairs = [(fact.filled_prompt, fact.target_true) for fact in facts[100:112]]
    text = sentences(facts[200:206])
    found = retention(model, tokenizer, chosen, pairs, text, resamples=20, window=40, stride=20)
    for name, places in (("first", [0, 1]), ("middle", [9, 10]), ("last", [19, 20])):
        scored = score_edits(model, tokenizer, [chosen[place] for place in places], resamples=20)
        for kind, values in scored.per_fact.items():
            assert found.tenths[name].edited.per_fact[kind] == pytest.approx(values, abs=1e-3)
        assert found.tenths[name].base.neighborhood == 100
    assert found.recall.value == pytest.approx(recall(model, tokenizer, pairs))
    assert found.recall.low <= found.recall.value <= found.recall.high
    assert found.perplexity == pytest.approx(perplexity(model, tokenizer, text, 40, 20), rel=1e-5)
    with model.disable_adapter():
        assert found.base_recall.value == pytest.approx(recall(model, tokenizer, pairs))
        assert found.base_perplexity == pytest.approx(perplexity(model, tokenizer, [text], 40, 20), rel=1e-5)
    assert found.base_perplexity < found.perplexity and found.base_recall.value == 100
    assert "middle tenth, NS" in str(found) and "perplexity" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["tenths"]["last"]["base"]["neighborhood"] == 100
    # Merged for good, with the base given.
    base, _ = evaluation_run.load_tiny_model()
    merged = retention(model.merge_and_unload(), tokenizer, chosen, pairs, base=base, resamples=20)
    assert merged.recall == found.recall and merged.base_recall == found.base_recall
    assert merged.perplexity is None and "perplexity" not in str(merged)
    with pytest.raises(ValueError, match="no unedited prompts"):
        retention(model, tokenizer, chosen, [])
    with pytest.raises(ValueError, match="no facts to score"):
        retention(model, tokenizer, [], pairs)


@pytest.mark.parametrize("opening", [True, False])
@pytest.mark.parametrize("window, stride", [(16, 5), (9, 8), (200, None)])
def test_perplexity_is_that_of_a_plain_loop(noisy, facts, opening, window, stride):
    model, tokenizer = noisy
    if not opening:
        tokenizer = evaluation_run.load_tiny_model()[1]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    texts = [sentences(facts[:3]), "", "It is", sentences(facts[3:4])]
    before = [0] if opening else []
    width, total, count = window - len(before), 0.0, 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for place in range(0 if opening else 1, len(ids)):
            start = 0
            while start + width <= place:  # the first window that reaches the token
                start += stride or window // 2
            [scored], _ = plain_log_probability(model, [*before, *ids[start : place + 1]], len(before) + place - start)
            total, count = total + scored, count + 1
    expected = math.exp(-total / count)
    for size in (1, 4, 128):
        assert perplexity(model, tokenizer, texts, window, stride, batch_size=size) == pytest.approx(
            expected, rel=1e-4
        )


def test_perplexity_by_hand(tiny):
    """A model to which all tokens are alike has the size of its vocabulary for perplexity."""
    model, tokenizer = tiny
    with on_output(model.get_output_embeddings(), torch.zeros_like):
        found = perplexity(model, tokenizer, "The mother tongue of Danielle Darrieux is French.")
    assert found == pytest.approx(model.config.vocab_size, rel=1e-4)
    with on_output(model.get_output_embeddings(), lambda logits: logits * NAN):
        assert math.isnan(perplexity(model, tokenizer, "The mother tongue"))
    with pytest.raises(ValueError, match="no token to score"):
        perplexity(model, tokenizer, ["", ""])
    with pytest.raises(ValueError, match="stride must be between 1 and 9 for windows of 10 tokens, got 10"):
        perplexity(model, tokenizer, "It is", window=10, stride=10)
    with pytest.raises(ValueError, match="exceeds the model's context window of 256"):
        perplexity(model, tokenizer, "It is", window=300)
