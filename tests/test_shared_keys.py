"""Facts that share a key: written in turns, each searched together with those that are there already."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model

from peft_edit import EditConfig, Fact
from peft_edit.evaluation import recall
from peft_edit.methods import METHODS
from peft_edit.prompts import PromptEncoder
from peft_edit.search import SearchSettings, search_groups
from peft_edit.shared_keys import MOST_COMPANIONS, in_turns, text_up_to_subject, with_companions
from peft_edit.tiny import load_tiny_model


RELATIONS = {
    "{} is located in": ("Asia", "France", "Canada"),
    "{} plays as": ("goaltender", "midfielder", "quarterback"),
    "{}, developed by": ("Microsoft", "Nokia", "Google"),
}


@pytest.fixture
def wrap(tiny_statistics):
    def make(**settings):
        base, tokenizer = load_tiny_model()
        model = get_peft_model(base, EditConfig(task_type="CAUSAL_LM", num_contexts=2, **settings)).eval()
        model.set_statistics(tiny_statistics)
        return model, tokenizer

    return make


def several(facts, subjects):
    """Facts about the same subjects, each prompt beginning with the subject."""
    names = [fact.subject for fact in facts if fact.prompt.startswith("{}")][:subjects]
    return [
        Fact(name, prompt, targets[place % 3])
        for place, name in enumerate(names)
        for prompt, targets in RELATIONS.items()
    ]


def answered(model, tokenizer, facts):
    return recall(model, tokenizer, [(fact.filled_prompt, fact.target) for fact in facts])


def delta(model):
    (layer,) = model.edit_layers().values()
    return layer.get_delta("default").clone()


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["", "In ", "At "]), st.sampled_from("xyz"))))
def test_no_two_facts_of_a_turn_share_a_key(parts):
    facts = [Fact(subject, f"{before}{{}} is {after}", "t") for subject, before, after in parts]
    turns = in_turns(facts)
    assert sorted(place for turn in turns for place in turn) == list(range(len(facts)))
    texts = [text_up_to_subject(fact) for fact in facts]
    for turn in turns:
        assert len({texts[place] for place in turn}) == len(turn)
    for text in set(texts):  # in the order given
        order = [place for turn in turns for place in turn if texts[place] == text]
        assert order == sorted(order)
        assert len(order) <= len(turns)


def test_companions_follow_a_fact_s_own_rows():
    _, tokenizer = load_tiny_model()
    encoder = PromptEncoder(tokenizer, len(tokenizer))
    contexts = ("It was late. ",)
    own, other, far = (
        encoder.encode_fact(Fact(subject, prompt, "Asia"), contexts)
        for subject, prompt in (("Rome", "{} is in"), ("Rome", "{} is located in"), ("Rome", "The city of {} is in"))
    )
    joined = with_companions(own, [other, far])
    assert joined.rows == own.rows + other.rows and joined.essence == own.essence
    assert with_companions(own, [far]).rows == own.rows
    assert len(with_companions(own, [other] * 20).rows) == 2 * (1 + MOST_COMPANIONS)
    # The facts of a search group have the same number of rows.
    assert search_groups([own, joined, own, joined], SearchSettings()) == [[0, 2], [1, 3]]


def test_several_facts_about_a_subject_hold_together(wrap, facts):
    shared = several(facts, 8)
    model, tokenizer = wrap()
    report = model.edit_facts(shared, tokenizer, progress=False)
    assert [each.prompt for each in report.facts] == [fact.prompt for fact in shared] and report.written == 24
    assert [record.batch for record in model.edited_facts()] == [1] * 8 + [2] * 8 + [3] * 8
    apart, _ = wrap(joint_search=False)
    apart.edit_facts(shared, tokenizer, progress=False)
    together, alone = answered(model, tokenizer, shared), answered(apart, tokenizer, shared)
    assert together >= 60 and together >= alone + 25
    others = facts[1000:1100]
    assert recall(model, tokenizer, [(fact.filled_prompt, fact.target_true) for fact in others]) >= 95


def test_a_later_fact_about_a_subject_spares_the_earlier_one(wrap, facts):
    shared = several(facts, 8)
    first, second = shared[0::3], shared[1::3]
    kept = {}
    for joint in (True, False):
        model, tokenizer = wrap(joint_search=joint)
        model.edit_facts(first, tokenizer, progress=False)
        before = answered(model, tokenizer, first)
        model.edit_facts(second, tokenizer, progress=False)
        kept[joint] = answered(model, tokenizer, first)
        assert before >= 80
    assert kept[True] >= 75 and kept[True] > kept[False]


def test_facts_with_keys_of_their_own_are_edited_as_ever(wrap, facts):
    found = []
    for joint in (True, False):
        model, tokenizer = wrap(joint_search=joint)
        model.edit_facts(facts[:6], tokenizer, batch_size=3, progress=False)
        found.append(delta(model))
    assert torch.equal(*found)


def test_removing_a_fact_names_those_that_were_found_on_top_of_it(wrap, facts):
    shared = several(facts, 2)
    model, tokenizer = wrap()
    model.edit_facts(shared, tokenizer, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.remove_facts(shared[2])  # the last of its key
    with pytest.warns(UserWarning, match=r"1 fact\(s\), first .*plays as', were written on top of a removed one"):
        model.remove_facts(shared[0])


def test_the_peers_search_each_fact_by_itself():
    assert all(EditConfig.from_method(name).joint_search == (name == "encore") for name in METHODS)
