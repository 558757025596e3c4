"""Prompts: where the subject ends, what the target's tokens are, what does not fit."""

import random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peft_edit import Fact, FactError
from peft_edit.prompts import PromptEncoder, generate_contexts, join
from peft_edit.tiny import load_tiny_model


MODEL, TOKENIZER = load_tiny_model()
ENCODER = PromptEncoder(TOKENIZER, MODEL.config.vocab_size, 256)

SUBJECTS = ["Paris", "L'Oréal", "東京タワー", "🦊🔥", "e\u0301toile", "U.S. {x}", "Mary-Jane O’Neil III", "x"]


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("prompt", ["{} is in", "The home of {}, in", "「{}」は", "Is {}'s home in"])
@pytest.mark.parametrize("prefix", ["", "Some say so. "])
def test_subject_ends_where_the_text_says(subject, prompt, prefix):
    row = ENCODER.encode(Fact(subject, prompt, "Rome"), prompt, prefix, "Rome")
    # Everything up to the subject's last token holds the whole subject; without that token it does not.
    upto = TOKENIZER.decode(row.ids[: row.subject_index + 1], skip_special_tokens=True)
    before = TOKENIZER.decode(row.ids[: row.subject_index], skip_special_tokens=True)
    head = prefix + prompt.split("{}")[0] + subject
    assert upto.startswith(head) and not before.startswith(head)


@given(subject=st.text(alphabet=st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12))
@example(subject="a{}b")
@settings(derandomize=True, max_examples=150, deadline=None)
def test_any_subject_is_found_and_any_target_is_continued(subject):
    if not subject.strip():
        return
    fact = Fact(subject, "The home of {} is", "Rome")
    row = ENCODER.encode_fact(fact, ["So. "]).rows[1]
    text = TOKENIZER.decode(row.ids[: row.prompt_length], skip_special_tokens=True)
    assert text == "So. " + fact.filled_prompt
    assert TOKENIZER.decode(row.target_ids) == " Rome"
    assert row.ids[0] == TOKENIZER.bos_token_id and row.subject_index < row.prompt_length


@pytest.mark.parametrize(
    ("prompt", "target", "joined"),
    [
        ("He lives in", "Rome", ("He lives in", " Rome")),
        ("He lives in ", "Rome", ("He lives in", " Rome")),
        ("He lives in", " Rome", ("He lives in", " Rome")),
        ("He lives in", "\nRome", ("He lives in", "\nRome")),
        ("He lives in Rome", ", Italy", ("He lives in Rome", ", Italy")),
        ("It is Tom", "'s", ("It is Tom", "'s")),
        ("首都は", "東京", ("首都は", "東京")),
        ("首都は", "Rome", ("首都は", " Rome")),
    ],
)
def test_seam_of_prompt_and_target(prompt, target, joined):
    assert join(prompt, target) == joined


def test_target_of_forty_tokens_and_too_long_a_prompt():
    long_target = " ".join(["Rome"] * 40)
    row = ENCODER.encode_fact(Fact("Paris", "{} is in", long_target), []).rows[0]
    assert len(row.target_ids) >= 40
    with pytest.raises(FactError, match="context window of 256"):
        ENCODER.encode_fact(Fact("Paris", "word " * 300 + "{} is in", "Rome"), [])


def test_wrong_and_slow_tokenizers_are_refused():
    with pytest.raises(ValueError, match="not the tokenizer of this model"):
        PromptEncoder(TOKENIZER, 50).encode_fact(Fact("Paris", "{} is in", "Rome"), [])

    class Slow:
        is_fast = False

        def __call__(self, text):
            return {}

    with pytest.raises(ValueError, match="Slow gives no character offsets"):
        PromptEncoder(Slow(), 50)
    with pytest.raises(ValueError, match="needs the model's tokenizer"):
        PromptEncoder(None, 50)


def test_tokenizer_without_bos_and_pad():
    bare = load_tiny_model()[1]
    bare.backend_tokenizer.post_processor = None
    bare.bos_token = bare.pad_token = None
    row = PromptEncoder(bare, MODEL.config.vocab_size).encode_fact(Fact("Paris", "{} is in", "Rome"), []).rows[0]
    assert bare.decode(row.ids) == "Paris is in Rome"


def test_contexts_are_seeded_and_leave_the_global_state_alone():
    torch.manual_seed(7)
    random.seed(7)
    state = torch.get_rng_state()
    first = generate_contexts(MODEL, TOKENIZER, 5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == generate_contexts(MODEL, TOKENIZER, 5, seed=1) != generate_contexts(MODEL, TOKENIZER, 5, seed=2)
    assert len(set(first)) == 5 and all(text.endswith(". ") for text in first)
