"""Free generation up to the natural stop, fluency and consistency: against plain loops and sums done by hand."""

import math
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model

from peft_edit import EditConfig, Fact
from peft_edit.evaluation import generation
from peft_edit.evaluation.fluency import (
    TfIdf,
    _SeededTopK,
    consistency,
    entropy_words,
    fluency_scores,
    ngram_entropy,
    write_texts,
)
from peft_edit.evaluation.generation import (
    QA_TEMPLATE,
    Answer,
    answer_words,
    contains_answer,
    find_stop,
    generate_answers,
    generate_until_stop,
    generation_scores,
    normalise_answer,
)
from peft_edit.hooks import on_output
from peft_edit.prompts import PromptEncoder

from .models import build_model
from .world import NAMES, OTHERS, word_tokenizer


def always(model, token, unless=None, other=None):
    """The model says one token whatever it reads; `other` where it reads `unless`."""
    seen = {}

    def remember(_module, args, kwargs):
        seen["ids"] = kwargs["input_ids"] if "input_ids" in kwargs else args[0]

    def say(logits):
        forced = torch.full_like(logits, -50.0)
        forced[..., token] = 50.0
        if unless is not None:
            place = seen["ids"][:, -logits.shape[1] :] == unless
            forced[place] = -50.0
            forced[..., other][place] = 50.0
        return forced

    handle = model.register_forward_pre_hook(remember, with_kwargs=True)
    replaced = on_output(model.get_output_embeddings(), say)
    replaced.__enter__()
    return lambda: (replaced.__exit__(None, None, None), handle.remove())


def word_token(model, tokenizer, word):
    """The token of a word that is one token after a space."""
    ids = PromptEncoder(tokenizer, model.config.vocab_size).continuation_ids("It is", word)[1]
    assert len(ids) == 1
    return ids[0]


def plain_answer(model, tokenizer, prompt, max_new_tokens, stop):
    """One prompt, no padding, no cache, whole sequence at every step."""
    ids = PromptEncoder(tokenizer, model.config.vocab_size).continuation_ids(prompt, "a")[0]
    start = len(ids)
    stopped = False
    for _ in range(max_new_tokens):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            stopped = True
            break
        ids.append(token)
    text = tokenizer.decode(ids[start:], skip_special_tokens=True)
    place = find_stop(text, stop)
    return Answer(text[:place].strip(), stopped or place is not None)


# --- text ---


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The  Beatles!", ["beatles"]),
        ("U.S. Army", ["us", "army"]),
        ("Jean-Paul Sartre’s", ["jean", "paul", "sartres"]),
        ("1,000 or 3.5", ["1000", "or", "3", "5"]),
        ("The A", ["the", "a"]),
        ("ﬁlm ＡＢ", ["film", "ab"]),
        ("東京", ["東", "京"]),
        (" ?! ", []),
    ],
)
def test_words_of_an_answer(text, words):
    assert answer_words(text) == words
    assert normalise_answer(text) == " ".join(words)


def test_contained_means_whole_words_in_order():
    assert contains_answer("He was born in New York City", "New York")
    assert contains_answer("答えは東京です", "東京")
    assert not contains_answer("a Roman road", "Rome") and not contains_answer("manrome", "Rome")
    assert not contains_answer("York is new", "New York")
    assert not contains_answer("anything", "?") and not contains_answer("", "Rome")


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        (" Paris. It is", "sentence", " Paris"),
        (" Paris.", "sentence", " Paris"),
        (" J. K. Rowling wrote", "sentence", None),
        (" St. Louis! Yes", "sentence", " St. Louis"),
        (" 3.5 metres? No", "sentence", " 3.5 metres"),
        (' he said "no." Then', "sentence", ' he said "no'),
        (" 東京。それは", "sentence", " 東京"),
        ("\n\n Paris\nQ: What", "sentence", "\n\n Paris"),
        (" Dr. No\n", "newline", " Dr. No"),
        (" Paris. It is", "newline", None),
        (" Paris. \n", "eos", None),
        (" 3.5 metres", (".", "\n"), " 3"),
        (" a ### b", ["###"], " a "),
    ],
)
def test_where_an_answer_stops(text, stop, kept):
    place = find_stop(text, stop)
    assert (None if place is None else text[:place]) == kept


def test_a_mark_at_the_end_is_undecided_while_the_model_writes():
    assert find_stop(" 3.", complete=False) is None and find_stop(" 3.", complete=True) == 2
    assert find_stop(" 東京。", complete=False) == 3


@pytest.mark.parametrize("stop", ["paragraph", (), ("",), (1,)])
def test_unknown_stops_are_refused(stop):
    with pytest.raises(ValueError, match="stop must"):
        find_stop("x", stop)


# --- generation ---


@pytest.mark.parametrize("stop", ["sentence", "eos"])
def test_like_one_prompt_at_a_time_whatever_the_batch(tiny, facts, stop):
    model, tokenizer = tiny
    prompts = [prompt for fact in facts[:8] for prompt in (fact.filled_prompt, "So. " * 9 + fact.filled_prompt)]
    wanted = [plain_answer(model, tokenizer, prompt, 7, stop) for prompt in prompts]
    for batch_size in (1, 5, 64):
        assert generate_until_stop(model, tokenizer, prompts, 7, stop, batch_size) == wanted
    assert {answer.stopped for answer in wanted} == ({True} if stop == "sentence" else {False})


@pytest.mark.parametrize("family", ["gpt2", "bloom", "opt", "gpt_neox", "llama"])
def test_positions_are_right_behind_padding_without_a_padding_token(family):
    tokenizer = word_tokenizer()
    model = build_model(family, seed=3, vocab_size=len(tokenizer), pad_token_id=None, initializer_range=0.5)
    prompts = [f"The town of {NAMES[place]} " + " ".join(OTHERS[: 5 * place]) + " is" for place in range(5)]
    wanted = [plain_answer(model, tokenizer, prompt, 8, "eos") for prompt in prompts]
    tokenizer.pad_token = None
    assert generate_until_stop(model, tokenizer, prompts, 8, "eos", batch_size=5) == wanted
    assert len({answer.text for answer in wanted}) == 5


def test_the_end_token_stops_and_what_follows_in_the_batch_is_not_read(tiny):
    model, tokenizer = tiny
    rome, end = word_token(model, tokenizer, "Rome"), tokenizer.eos_token_id
    undo = always(model, rome, unless=rome, other=end)
    try:
        # The first prompt ends with "Rome", so that its answer is empty; the second says "Rome" first.
        answers = generate_until_stop(model, tokenizer, ["Not in Rome", "It is in"], 5, "eos")
        assert answers == [Answer("", True), Answer("Rome", True)]
        model.generation_config.eos_token_id = tokenizer.eos_token = None
        cut = generate_until_stop(model, tokenizer, ["It is in"], 3, "eos")
        assert cut[0].stopped is False and cut[0].text.startswith("Rome")
    finally:
        undo()


def test_the_models_own_generation_settings_are_left_aside_and_kept(tiny, facts):
    model, tokenizer = tiny
    prompts = [fact.filled_prompt for fact in facts[:6]]
    wanted = generate_answers(model, tokenizer, prompts, 10, "eos")
    config = model.generation_config
    config.do_sample, config.repetition_penalty, config.max_length, config.no_repeat_ngram_size = True, 9.0, 5, 1
    model.train()
    assert generate_answers(model, tokenizer, prompts, 10, "eos") == wanted
    assert model.generation_config is config and config.repetition_penalty == 9.0 and model.training


def test_adapters_answer_the_same_merged_and_not(tiny, tiny_statistics, facts):
    base, tokenizer = tiny
    model = get_peft_model(base, EditConfig(task_type="CAUSAL_LM", num_contexts=1, search_steps=10))
    model.edit_facts(facts[:3], tokenizer, statistics=tiny_statistics, progress=False)
    scores = generation_scores(model, tokenizer, facts[:3])
    assert scores.contained == 100.0
    model.merge_adapter()
    assert generation_scores(model, tokenizer, facts[:3]).answers == scores.answers
    model.unmerge_adapter()
    with model.disable_adapter():
        before = generation_scores(model, tokenizer, facts[:3])
    assert before.answers == [[fact.target_true] for fact in facts[:3]] and before.contained == 0.0


def test_answers_do_not_depend_on_how_processes_share_the_prompts(tiny, facts, monkeypatch):
    model, tokenizer = tiny
    prompts = [fact.filled_prompt for fact in facts[:7]]
    alone = generate_answers(model, tokenizer, prompts), write_texts(model, tokenizer, prompts, 24)

    def shared(model, things, work):
        rows = [work(things[rank::3])[0] for rank in range(3)]
        back = torch.cat([torch.arange(len(things))[rank::3] for rank in range(3)]).argsort()
        return [torch.cat(rows)[back]]

    monkeypatch.setattr(generation, "split_over_processes", shared)
    assert (generate_answers(model, tokenizer, prompts), write_texts(model, tokenizer, prompts, 24)) == alone


def test_templates_and_settings_out_of_range(tiny):
    model, tokenizer = tiny
    framed = generate_answers(model, tokenizer, ["Is {} so?"], 4, template=QA_TEMPLATE)
    assert framed == generate_answers(model, tokenizer, ["Question: Is {} so?\nAnswer:"], 4)
    assert generate_answers(model, tokenizer, []) == []
    with pytest.raises(ValueError, match="no {} for the prompt"):
        generate_answers(model, tokenizer, ["x"], template="Question:")
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        generate_answers(model, tokenizer, ["x"], 0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        generate_answers(model, tokenizer, ["x"], batch_size=0)
    with pytest.raises(ValueError, match="context window of 256"):
        generate_answers(model, tokenizer, ["word " * 120 + "is"], 200)


# --- scores ---


def test_scores_by_hand(tiny):
    model, tokenizer = tiny
    undo = always(model, word_token(model, tokenizer, "Rome"))
    facts = [
        Fact("Ada", "{} lives in", "Rome Rome", target_true="Rome", paraphrases=("{} is in", "Ada's home:")),
        Fact("Ben", "{} lives in", "the Rome", neighborhood=("Dan lives in",), target_true="Paris"),
        Fact("Cleo", "{} lives in", "Oslo", paraphrases=("{} is in",)),
    ]
    try:
        # Two tokens are allowed: "Rome Rome", never stopped.
        scores = generation_scores(model, tokenizer, facts, max_new_tokens=2)
        assert scores.answers == [["Rome Rome"], ["Rome Rome"], ["Rome Rome"]]
        assert scores.per_fact["exact_match"] == [100.0, 0.0, 0.0] and scores.per_fact["contained"] == [100, 100, 0]
        assert scores.exact_match == pytest.approx(100 / 3) and scores.contained == pytest.approx(200 / 3)
        assert scores.stopped == 0.0 and scores.facts == 3
        # The second fact has no paraphrase and does not count.
        other = generation_scores(model, tokenizer, facts, "paraphrase", max_new_tokens=2)
        assert other.exact_match == 50.0 and math.isnan(other.per_fact["exact_match"][1])
        assert [len(said) for said in other.answers] == [2, 0, 1]
        near = generation_scores(model, tokenizer, facts, "neighborhood", max_new_tokens=2)
        assert near.contained == 0.0
        assert "answers" in scores.to_dict(per_fact=True) and "answers" not in scores.to_dict()
        assert str(scores) == "free generation, 3 facts: exact match 33.3  contained 66.7  stopped 0.0"
    finally:
        undo()


def test_what_the_tiny_model_knows_it_says_and_stops(tiny, facts):
    known = [replace(fact, target=fact.target_true) for fact in facts[:60]]
    scores = generation_scores(*tiny, known)
    assert scores.exact_match == scores.contained == scores.stopped == 100.0
    assert generation_scores(*tiny, facts[:60]).contained == 0.0
    assert generation_scores(*tiny, known, max_new_tokens=60, stop="eos").exact_match == 0.0


def test_scores_that_cannot_be_measured_are_refused(tiny):
    bare = Fact("Ada", "{} lives in", "Rome", neighborhood=("Dan lives in",))
    with pytest.raises(ValueError, match="kind must be one of efficacy, paraphrase, neighborhood"):
        generation_scores(*tiny, [bare], "rewrite")
    with pytest.raises(ValueError, match="None of the 1 facts has a prompt of the kind paraphrase"):
        generation_scores(*tiny, [bare], "paraphrase")
    with pytest.raises(ValueError, match="'Ada lives in' has no target_true"):
        generation_scores(*tiny, [bare], "neighborhood")


def test_a_model_that_says_one_word_has_no_fluency_and_no_answers(tiny, facts):
    model, tokenizer = tiny
    prompts = [[fact.filled_prompt] for fact in facts[:4]]
    references = [[f"{fact.target_true} is where many people live."] for fact in facts[:4]]
    healthy = fluency_scores(model, tokenizer, prompts, references)
    undo = always(model, word_token(model, tokenizer, "Rome"))
    try:
        broken = fluency_scores(model, tokenizer, prompts, references)
        scores = generation_scores(model, tokenizer, facts[:40])
    finally:
        undo()
    assert healthy.entropy > 4.5 and broken.entropy < 0.7
    assert broken.consistency < healthy.consistency
    for (text,), (prompt,) in zip(broken.texts, prompts):
        assert set(text.removeprefix(prompt).split()) == {"Rome"} and ngram_entropy(text.removeprefix(prompt)) == 0.0
    assert scores.exact_match == 0.0 and scores.stopped == 0.0
    assert scores.contained == pytest.approx(100 * sum(fact.target == "Rome" for fact in facts[:40]) / 40)


# --- fluency ---


def test_entropy_by_hand():
    assert entropy_words("It's 3.5, 東京!") == ["It's", "3", ".", "5", ",", "東", "京", "!"]
    assert ngram_entropy("no no no no") == 0.0 and ngram_entropy("") == 0.0 == ngram_entropy("word")
    # a b a b a: bigrams ab ab ba ba, 1 bit; trigrams aba bab aba, log2(3) - 2/3.
    trigrams = math.log2(3) - 2 / 3
    assert ngram_entropy("a b a b a") == pytest.approx((2 / 3 * 1 + 4 / 3 * trigrams) / 2)
    assert ngram_entropy(["a", "b", "a", "b", "a"], {3: 1.0}) == pytest.approx(trigrams)
    # n different words: log2(n - 1) and log2(n - 2).
    text = " ".join(OTHERS[:18])
    assert ngram_entropy(text) == pytest.approx(math.log2(17) / 3 + 2 * math.log2(16) / 3)
    with pytest.raises(ValueError, match="weights must map"):
        ngram_entropy("a", {})


def test_tf_idf_by_hand():
    index = TfIdf(["Rome is old", "Paris is big", "Oslo IS cold"])
    rare, common = math.log(4 / 2) + 1, math.log(4 / 4) + 1
    assert index.idf["rome"] == pytest.approx(rare) and index.idf["is"] == pytest.approx(common)
    assert index.vector("Rome, Rome is new") == pytest.approx({"rome": 2 * rare, "is": common})
    wanted = 2 * rare * rare / (math.hypot(2 * rare, common) * math.hypot(rare, rare))
    assert index.cosine("Rome, Rome is new", "Rome old") == pytest.approx(wanted)
    assert index.cosine("unknown words", "Rome") == 0.0
    assert index.cosine("Paris is big", "PARIS is: big!") == pytest.approx(1.0)
    assert consistency(["Rome,", "Rome is new"], ["Rome", "old"], index) == pytest.approx(wanted)
    with pytest.raises(ValueError, match="at least one text"):
        TfIdf([])


def test_texts_are_as_long_as_asked_seeded_and_free_of_the_batch(tiny, facts):
    model, tokenizer = tiny
    prompts = [fact.filled_prompt for fact in facts[:5]]
    state = torch.get_rng_state()
    texts = write_texts(model, tokenizer, prompts, length=40, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert texts == write_texts(model, tokenizer, prompts, length=40, seed=1, batch_size=2)
    assert texts != write_texts(model, tokenizer, prompts, length=40, seed=2)
    for text, prompt in zip(texts, prompts):
        assert text.startswith(prompt) and len(tokenizer(text)["input_ids"]) == 40
    greedy = write_texts(model, tokenizer, prompts[:1], length=20, top_k=1)
    with torch.no_grad():
        ids = model.generate(**tokenizer(prompts[0], return_tensors="pt"), max_length=20, do_sample=False)
    assert greedy == [tokenizer.decode(ids[0], skip_special_tokens=True)]


def test_the_sampler_draws_from_the_most_probable_tokens():
    logits = torch.tensor([0.0, 2.0, 1.0, 5.0, 0.5, 9.0]).repeat(4000, 1)
    sampler = _SeededTopK(2, 0, [3], 5, range(4000))  # token 3 banned, token 5 not in the tokenizer: 1 and 2 are left
    drawn = torch.bincount(sampler(None, logits).argmax(-1), minlength=6) / 4000
    assert drawn[[0, 3, 4, 5]].sum() == 0
    assert float(drawn[1]) == pytest.approx(1 / (1 + math.exp(-1)), abs=0.02)


def test_fluency_of_facts(tiny, facts):
    prompts = [[facts[0].filled_prompt, facts[1].filled_prompt], [], [facts[2].filled_prompt]]
    references = [["Hamburg is a port."], ["Unused."], []]
    scores = fluency_scores(*tiny, prompts, references, length=30)
    assert [len(texts) for texts in scores.texts] == [2, 0, 1]
    by_hand = [sum(map(ngram_entropy, scores.texts[0])) / 2, ngram_entropy(scores.texts[2][0])]
    assert scores.entropy == pytest.approx(sum(by_hand) / 2) and math.isnan(scores.per_fact["entropy"][1])
    index = TfIdf(["Hamburg is a port.", "Unused."])
    assert scores.consistency == pytest.approx(index.cosine(" ".join(scores.texts[0]), references[0][0]))
    assert math.isnan(scores.per_fact["consistency"][2])
    without = fluency_scores(*tiny, prompts, length=30)
    assert without.entropy == scores.entropy and math.isnan(without.consistency)
    assert str(without) == f"fluency, 3 facts: entropy {scores.entropy:.2f} bits"


def test_fluency_settings_out_of_range(tiny):
    with pytest.raises(ValueError, match="prompts of 1 facts but references of 2"):
        fluency_scores(*tiny, [["x"]], [["a"], ["b"]])
    with pytest.raises(ValueError, match="no generation prompts"):
        fluency_scores(*tiny, [[], []])
    with pytest.raises(ValueError, match="raise length"):
        write_texts(*tiny, ["It is in Rome"], length=3)
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        write_texts(*tiny, ["It is"], top_k=0)
