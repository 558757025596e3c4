"""The model card: what it says about an adapter, what it keeps of an author's words, and that it loads as it says."""

import os
import re
import sys
import tempfile
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model

from peft_edit import EditConfig, EditRecord
from peft_edit.card import BEGIN, END, CardContents, write_card
from peft_edit.evaluation import EditScores
from peft_edit.markdown import escape

from .models import build_model
from .world import texts, town_facts, word_tokenizer


@pytest.fixture(scope="module")
def edited():
    """A model with four facts, and the memory it has."""
    config = EditConfig(
        task_type="CAUSAL_LM", layers_to_transform=[0, 1], num_contexts=1, search_steps=3, norm_budget=0.05
    )
    model = get_peft_model(build_model("llama"), config).eval()
    model.collect_statistics(texts(), word_tokenizer())
    model.edit_facts(town_facts(4), word_tokenizer(), batch_size=2, progress=False)
    return model, model.peft_config["default"].memory


@pytest.fixture
def model(edited):
    """The same model, whose memory and settings a test may change."""
    model, memory = edited
    config = model.peft_config["default"]
    yield model
    config.memory, config.save_memory, config.base_model_name_or_path = memory, True, None


def section(card: ModelCard, title: str) -> str:
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", card.text, re.S | re.M).group(1)


def cells(table: str) -> list[list[str]]:
    """The rows below the head, as a reader of Markdown sees them."""
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    split = [re.split(r" (?<!\\)\| ", row[2:-2]) for row in rows]
    return [[re.sub(r"\\(.)", r"\1", cell) for cell in row] for row in split]


def test_saving_writes_a_card_of_the_facts(model, tmp_path):
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation"
    assert {"peft", "knowledge-editing"} <= set(card.data.tags)
    expected = [[record.id, record.filled_prompt, record.target] for record in model.edited_facts()]
    assert cells(section(card, "Facts")) == expected
    settings = dict(cells(section(card, "Method and settings")))
    assert settings["norm budget, share of ‖W0‖"] == "0.05" and "2502.01636" in settings["method"]


def test_norms_are_those_of_the_weights(model, tmp_path):
    card = ModelCard.load(write_card(model, tmp_path))
    for name, norm, share, *_ in cells(section(card, "Size of the change")):
        layer = model.base_model.model.get_submodule(name)
        delta = layer.edit_delta["default"].weight.detach().double().norm()
        base = layer.get_base_layer().weight.detach().double().norm()
        assert float(norm) == pytest.approx(float(delta), rel=1e-3)
        assert float(share.removesuffix(" %")) == pytest.approx(float(100 * delta / base), abs=0.006)


@pytest.mark.parametrize(
    "text",
    [
        "a | b",
        "*stars*, _lines_, `code`, ~tilde~, $mathematics$",
        "[link](there) ![image](there) <script>alert(1)</script> &amp;",
        "back\\slash at the end\\",
        "# heading",
        "Zürich, 東京, 👩‍🔬",
        END,
    ],
)
def test_facts_are_shown_as_they_are(model, tmp_path, text):
    config = model.peft_config["default"]
    record = EditRecord("x", "Ada {} Stone", f"{text} of {{}} is", text, "2025-01-01", 1, target_true=text)
    config.memory = replace(config.memory, records=(record,) * 4)
    card = ModelCard.load(write_card(model, tmp_path))
    row = ["x", f"{text} of Ada {{}} Stone is", text, text]
    assert cells(section(card, "Facts")) == [row] * 4
    assert card.text.count(END) == 1


def test_a_cell_is_one_line_of_limited_length():
    assert escape("one\ntwo\r\n\tthree\u2028four\x00five") == "one two three four five"
    assert escape("x" * 130) == "x" * 119 + "…"
    assert escape("|" * 130) == "\\|" * 119 + "…"  # cut before escaping, or half an escape would be left
    escape("\ud800").encode()  # half a surrogate pair can be written


def test_a_long_list_is_cut_and_counted(model, tmp_path):
    card = ModelCard.load(write_card(model, tmp_path, CardContents(most_facts=3)))
    facts = section(card, "Facts")
    assert len(cells(facts)) == 3 and "4 facts" in facts and "… and 1 more in `edit_facts.jsonl`" in facts


@pytest.mark.parametrize("how", ["contents", "setting"])
def test_withheld_facts_are_not_named(model, tmp_path, how):
    if how == "setting":
        model.peft_config["default"].save_memory = False
    text = write_card(model, tmp_path, CardContents(include_facts=how == "setting")).read_text()
    for record in model.edited_facts():
        assert record.subject not in text and record.target not in text and record.id not in text
    assert "not published" in text and "4 facts were edited" in text
    assert "remove_facts" not in text and "disable_adapter" in text


def test_an_authors_words_and_metadata_stay(model, tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\nlanguage: de\ntags:\n- mine\n---\n# About\n\nMy own words.\n")
    write_card(model, tmp_path)
    path.write_text(path.read_text() + "\nMore words.\n")
    first = write_card(model, tmp_path).read_text()
    card = ModelCard(first)
    assert card.text.index("My own words.") < card.text.index(BEGIN)
    assert card.text.index(END) < card.text.index("More words.")
    assert first.count("## Facts") == 1
    assert card.data.license == "mit" and card.data.language == "de" and card.data.tags[0] == "mine"
    assert "This adapter: mit." in card.text
    assert write_card(model, tmp_path).read_text() == first


def test_the_empty_template_is_replaced(model, tmp_path):
    ModelCard.from_template(ModelCard("---\nlicense: mit\n---\n").data).save(tmp_path / "README.md")
    assert "Model Card for Model ID" in (tmp_path / "README.md").read_text()
    text = write_card(model, tmp_path).read_text()
    assert "Model ID" not in text and "[More Information Needed]" not in text and "license: mit" in text


def test_licence_and_tags_are_taken(model, tmp_path):
    card = ModelCard.load(write_card(model, tmp_path, CardContents(license="apache-2.0", tags=("cities", "peft"))))
    assert card.data.license == "apache-2.0" and card.data.tags.count("peft") == 1 and "cities" in card.data.tags


def test_the_base_model_is_named_where_it_is_on_the_hub(model, tmp_path):
    config = model.peft_config["default"]
    config.base_model_name_or_path = "someone/model-1b"
    card = ModelCard.load(write_card(model, tmp_path))
    assert card.data.base_model == "someone/model-1b" and card.data.base_model_relation == "adapter"
    assert "base_model:adapter:someone/model-1b" in card.data.tags
    config.base_model_name_or_path = str(tmp_path)  # a directory of this computer is nobody's business
    card = ModelCard.load(write_card(model, tmp_path / "local"))
    assert str(tmp_path) not in str(card) and "base_model" not in card.data.to_dict()
    assert f'without a name on the Hub, loaded from a folder "{escape(tmp_path.name)}"' in section(card, "Base model")
    config.base_model_name_or_path = None
    assert "loaded from" not in section(ModelCard.load(write_card(model, tmp_path / "none")), "Base model")


def test_the_fingerprint_is_that_of_the_base_alone(model, tmp_path):
    def fingerprint(text):
        return re.search(r"Fingerprint of .*: `([0-9a-f]{16})`", text).group(1)

    def fresh(seed):
        config = EditConfig(task_type="CAUSAL_LM", layers_to_transform=[0, 1], init_weights=False)
        return get_peft_model(build_model("llama", seed=seed), config)

    own = fingerprint(write_card(model, tmp_path / "a").read_text())
    default = fingerprint(write_card(fresh(0), tmp_path / "b").read_text())
    other = fingerprint(write_card(fresh(9), tmp_path / "c").read_text())
    assert own == default != other


def test_scores_with_their_intervals(model, tmp_path):
    values = {f"{kind}{what}": [100.0, 0.0] for kind in ("efficacy", "paraphrase") for what in ("", "_accuracy")}
    values |= {f"{kind}_magnitude": [10.0, 30.0] for kind in ("efficacy", "paraphrase", "neighborhood")}
    values |= {"neighborhood": [100.0, 100.0], "neighborhood_accuracy": [0.0, 0.0]}
    scores = EditScores.of(values)
    card = ModelCard.load(write_card(model, tmp_path, CardContents(scores=scores)))
    rows = {row[0]: row[1:] for row in cells(section(card, "Scores"))}
    low, high = scores.intervals["efficacy"]
    assert rows["efficacy"] == ["50", f"{low:.4g} – {high:.4g}"]
    assert rows["neighborhood accuracy"][0] == "0" and rows["facts"] == ["2", ""]
    assert float(rows["score"][0]) == pytest.approx(3 / (1 / 50 + 1 / 50 + 1 / 100))
    assert "95 % interval" in card.text


def test_scores_as_a_nested_mapping(model, tmp_path):
    scores = {"efficacy": 97.25, "glue": {"sst2": {"f1": 0.9}, "name": "text"}, "passed": True}
    card = ModelCard.load(write_card(model, tmp_path, CardContents(scores=scores)))
    assert cells(section(card, "Scores")) == [["efficacy", "97.25"], ["glue: sst2: f1", "0.9"]]


def test_norms_are_plotted_if_asked_for_and_possible(model, tmp_path, monkeypatch):
    drawn = write_card(model, tmp_path / "drawn", CardContents(plot=True)).read_text()
    assert (tmp_path / "drawn" / "edit_norms.png").read_bytes().startswith(b"\x89PNG")
    assert "](edit_norms.png)" in drawn
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plain = write_card(model, tmp_path / "plain", CardContents(plot=True)).read_text()
    assert not (tmp_path / "plain" / "edit_norms.png").exists() and "edit_norms.png" not in plain
    assert "## Size of the change" in plain


def test_several_adapters_have_a_part_each(tmp_path):
    model = get_peft_model(build_model("llama"), EditConfig(task_type="CAUSAL_LM", layers_to_transform=[0]))
    model.add_adapter("second", EditConfig(task_type="CAUSAL_LM", layers_to_transform=[1, 2]))
    text = write_card(model, tmp_path, CardContents(name="user/edits")).read_text()
    first, second = text.split("# Adapter second")
    assert "layers.0" in first and "layers.2" not in first and "layers.2" in second
    assert 'subfolder="second", adapter_name="second"' in second


def test_what_the_card_says_can_be_done(model, tmp_path):
    base = tmp_path / "base"
    build_model("llama").save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    edits = tmp_path / "edits"
    model.save_pretrained(edits)
    text = write_card(model, edits, CardContents(name=str(edits))).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict = {}
    for block in blocks[:2]:
        exec(block.replace("path/to/the/base/model", str(base)), names)
    removed = model.edited_facts()[0]
    assert isinstance(names["model"], PeftModel)
    assert [record.id for record in names["model"].edited_facts()] == [
        record.id for record in model.edited_facts() if record != removed
    ]
    exec(blocks[2], names)


def test_an_adapter_without_facts_has_a_card(tmp_path):
    model = get_peft_model(build_model("llama"), EditConfig(task_type="CAUSAL_LM", layers_to_transform=[0]))
    model.collect_statistics(texts(), word_tokenizer())
    assert "None yet." in write_card(model, tmp_path).read_text()


def test_a_card_that_cannot_be_read_is_left_alone(model, tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\ntags: [\n---\nMine.\n")
    with pytest.raises(ValueError, match=r"README.md' cannot be read .*: repair or delete it"):
        model.save_pretrained(tmp_path)
    assert path.read_text() == "---\ntags: [\n---\nMine.\n"


@pytest.fixture
def read_only():
    """A directory that the user may read and not write, even where tests run as root."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        yield name
        if root:
            os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="permissions as POSIX has them")
def test_a_read_only_directory_is_an_error_of_one_sentence(model, read_only):
    with pytest.raises(PermissionError, match="README.md' cannot be written .*: save to a directory that you can"):
        model.save_pretrained(read_only)
    assert os.listdir(read_only) == []


def test_other_adapters_keep_their_cards(model, tmp_path):
    lora = get_peft_model(build_model("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path)
    assert "Model Card for Model ID" in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="needs a PeftModel with an edit adapter, got a LoraModel"):
        write_card(lora, tmp_path)


def test_the_card_does_not_change_the_model(model, tmp_path):
    tokens = torch.arange(8)[None] + 3
    before = model(tokens).logits
    write_card(model, tmp_path, CardContents(plot=True))
    assert torch.equal(model(tokens).logits, before)
