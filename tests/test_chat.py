"""Edits in the position that a chat template gives the user's message and the answer."""

import pytest
import torch
from peft import get_peft_model

from peft_edit import EditConfig
from peft_edit.prompts import PromptEncoder, chat_frame


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ 'It was asked. ' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}:{% endif %}"
)


@pytest.fixture
def chatting(tiny):
    model, tokenizer = tiny
    tokenizer.chat_template = TEMPLATE
    return model, tokenizer


PLAIN = "{{ bos_token }}{% for message in messages %}{{ 'Note. ' + message['content'] }}{% endfor %}"


def asked(tokenizer, prompt):
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


def test_rows_are_what_the_template_writes(chatting, facts):
    model, tokenizer = chatting
    encoder = PromptEncoder(tokenizer, model.get_input_embeddings().num_embeddings, chat=True)
    bare, behind = encoder.encode_fact(facts[0], ["It is known. "]).rows
    for row, text in ((bare, facts[0].filled_prompt), (behind, "It is known. " + facts[0].filled_prompt)):
        assert list(row.ids[: row.prompt_length]) == asked(tokenizer, text)[0].tolist()
        assert tokenizer.decode(row.target_ids) == " " + facts[0].target
        until = tokenizer.decode(row.ids[: row.subject_index + 1])
        assert until.endswith(facts[0].subject[-2:])
    ids, target = encoder.continuation_ids(facts[0].filled_prompt, facts[0].target)
    assert (*ids, *target) == bare.ids


def test_an_edit_holds_in_the_chat(chatting, facts, tiny_statistics, tmp_path):
    base, tokenizer = chatting
    tokenizer.chat_template = PLAIN  # the tiny model has never chatted; it can follow this
    model = get_peft_model(base, EditConfig(task_type="CAUSAL_LM", chat_template=True)).eval()
    model.set_statistics(tiny_statistics)
    report = model.edit_facts(facts[:10], tokenizer, progress=False)
    taken = [fact.recalled for fact in report.facts]
    assert sum(taken) >= 7
    model.save_pretrained(tmp_path)
    for fact, good in zip(facts[:10], taken):
        ids = asked(tokenizer, fact.filled_prompt)
        with torch.no_grad():
            written = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
            )
        answer = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert answer.startswith(fact.target) == good
    assert EditConfig.from_pretrained(tmp_path).chat_template


def test_an_answer_on_a_line_of_its_own_has_no_space_before_it(chatting, facts):
    model, tokenizer = chatting
    tokenizer.chat_template = TEMPLATE.replace(":{% endif %}", "{{ '\\nANSWER\\n' }}{% endif %}")
    encoder = PromptEncoder(tokenizer, model.get_input_embeddings().num_embeddings, chat=True)
    row = encoder.encode_fact(facts[0], []).rows[0]
    assert list(row.ids[: row.prompt_length]) == asked(tokenizer, facts[0].filled_prompt)[0].tolist()
    assert tokenizer.decode(row.target_ids) == facts[0].target


def test_a_tokenizer_without_a_template_is_refused(tiny):
    with pytest.raises(ValueError, match="no chat template"):
        chat_frame(tiny[1])


def test_a_template_that_changes_the_message_is_refused(tiny):
    tokenizer = tiny[1]
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] | upper }}{% endfor %}"
    with pytest.raises(ValueError, match="once and as it is"):
        chat_frame(tokenizer)
