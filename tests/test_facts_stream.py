"""Facts as a stream: where a bad one stands, what was written before it, and streams that hold nothing."""

import re

import pytest
from peft import get_peft_model

from peft_edit import EditConfig, FactError
from peft_edit.stream import FactStream

from .models import build_model
from .world import texts, town_facts, word_tokenizer


BAD = {"subject": "Ada", "prompt": "no placeholder", "target": "Rome"}


def small():
    config = EditConfig(
        task_type="CAUSAL_LM", layers_to_transform=[0], target_modules=["mlp.down_proj"], num_contexts=1
    )
    model = get_peft_model(build_model("llama"), config).eval()
    model.collect_statistics(texts(), word_tokenizer())
    return model


def edit(model, facts, **options):
    return model.edit_facts(facts, word_tokenizer(), batch_size=2, progress=False, **options)


def test_the_error_says_what_was_edited_and_counts_from_the_beginning():
    model = small()
    with pytest.raises(FactError) as error:
        edit(model, iter([*town_facts(5), BAD]))
    assert len(model.edited_facts()) == 4
    assert str(error.value).startswith(
        "In the facts from 4 on nothing was edited (those before were), 1 bad fact(s): fact 5: the prompt"
    )


def test_a_bad_first_batch_is_as_that_of_a_list():
    messages = []
    for source in ([BAD, *town_facts(1)], iter([BAD, *town_facts(1)])):
        model = small()
        with pytest.raises(FactError) as error:
            edit(model, source)
        assert model.edited_facts() == []
        messages.append(str(error.value))
    assert messages[0] == messages[1] and messages[0].startswith("Nothing was edited, 1 bad fact(s): fact 0: ")


def test_contradictions_and_shared_ids_count_from_the_beginning():
    facts = [{"subject": f"S{n}", "prompt": "{} is", "target": "Rome", "id": str(n)} for n in range(4)]
    for last, said in (
        ({**facts[2], "target": "Oslo"}, "facts 2 and 3 contradict each other"),
        ({**facts[3], "id": "2"}, "facts 2 and 3 share the id '2'"),
    ):
        batches = FactStream(iter([*facts[:3], last]), 2).batches()
        assert len(next(batches)) == 2
        with pytest.raises(FactError, match=re.escape("from 2 on nothing was edited (those before were), " + said)):
            next(batches)


@pytest.mark.parametrize("source", [[], iter([])])
def test_no_facts_are_an_error_in_either_form(source, tmp_path):
    model = small()
    with pytest.raises(FactError, match="Nothing was edited: there are no facts to edit."):
        edit(model, source, output_dir=tmp_path / "run")
    assert model.edited_facts() == [] and not (tmp_path / "run").exists()


def test_an_empty_file_holds_no_facts(tmp_path):
    (tmp_path / "facts.jsonl").write_text("\n")
    with pytest.raises(FactError, match="there are no facts to edit"):
        FactStream(tmp_path / "facts.jsonl", 2)


@pytest.mark.parametrize("form", [list, iter])
def test_a_finished_run_that_is_resumed_has_nothing_left_and_is_fine(tmp_path, form):
    edit(small(), form(town_facts(4)), output_dir=tmp_path)
    report = edit(small(), form(town_facts(4)), output_dir=tmp_path, resume_from_checkpoint=True)
    assert report.facts == [] and report.facts_held == 4


def test_a_bad_fact_among_those_passed_over_edits_nothing(tmp_path):
    edit(small(), iter(town_facts(4)), output_dir=tmp_path)
    with pytest.raises(FactError, match=r"^Nothing was edited, 1 bad fact\(s\): fact 3: "):
        edit(small(), iter([*town_facts(3), BAD]), output_dir=tmp_path, resume_from_checkpoint=True)
