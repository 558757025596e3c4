"""Fine-tuning a model that carries edits: a LoRA is trained, the edits stay as they are, bit for bit."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from peft_edit import EditConfig
from peft_edit.tiny import load_tiny_model, tiny_model_path


EDITED = {"target_modules": ["mlp.down_proj"], "layers_to_transform": [0, 1]}
PROMPT = "The mother tongue of Danielle Darrieux is"


@pytest.fixture(scope="module")
def saved_edits(tiny_statistics, facts, tmp_path_factory):
    """Directory of an edit adapter with facts and memory."""
    base, tokenizer = load_tiny_model()
    model = get_peft_model(base, EditConfig(task_type="CAUSAL_LM", num_contexts=1, **EDITED)).eval()
    model.set_statistics(tiny_statistics)
    model.edit_facts(facts[:10], tokenizer, progress=False)
    folder = tmp_path_factory.mktemp("edits")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def edits(saved_edits):
    """A fresh model with the edit adapter, under a name that no trainer takes for its own."""
    return PeftModel.from_pretrained(load_tiny_model()[0], saved_edits, adapter_name="edits").eval()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tiny_model()[1]


def test_a_lora_around_edited_modules_changes_no_names(edits, saved_edits, facts, tokenizer, tmp_path):
    """It wraps them: PEFT calls the edited module `base_layer` then."""
    names = list(edits.base_model.edit_layers())
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["down_proj"], r=2)
    model = get_peft_model(edits.get_base_model(), lora, adapter_name="lora").eval()
    assert list(edits.base_model.edit_layers()) == names
    edits.base_model.remove_facts(facts[0])
    edits.base_model.edit_facts(facts[10:12], tokenizer, progress=False)
    edits.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "edits" / "adapter_model.safetensors")) == set(
        load_file(saved_edits / "adapter_model.safetensors")
    )
    again = PeftModel.from_pretrained(load_tiny_model()[0], tmp_path / "edits", adapter_name="edits")
    for name, layer in again.base_model.edit_layers().items():
        assert torch.equal(layer.get_delta("edits"), edits.base_model.edit_layers()[name].get_delta("edits"))
    assert any("lora" in name for name, _ in model.named_parameters())


class Sentences(Dataset):
    """Token ids of true sentences, one length, as the trainer takes them."""

    def __init__(self, tokenizer, facts):
        texts = [f"{fact.filled_prompt} {fact.target_true}." for fact in facts]
        self.ids = [tokenizer(text)["input_ids"][:8] for text in texts]
        self.ids = [ids for ids in self.ids if len(ids) == 8]

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": torch.tensor(self.ids[index]), "labels": torch.tensor(self.ids[index])}


def stack(edits, **changes) -> PeftModel:
    """The way that docs/training.md shows: a LoRA on the model underneath, whose edits stay in place."""
    settings = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"], **changes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT says that there is an adapter already
        return get_peft_model(edits.get_base_model(), LoraConfig(**settings))


def arguments(folder, **changes) -> dict:
    """What is common to the arguments of both trainers."""
    settings = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 3}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "seed": 0}
    return {"output_dir": str(folder), **settings, **quiet, **changes}


def deltas(edits) -> dict[str, torch.Tensor]:
    return {name: layer.get_delta("edits").clone() for name, layer in edits.base_model.edit_layers("edits").items()}


def lora_tensors(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" in name}


@torch.no_grad()
def logits(model, tokenizer) -> torch.Tensor:
    training = model.training
    result = model.eval()(**tokenizer(PROMPT, return_tensors="pt")).logits.clone()
    model.train(training)
    return result


def check_trained(edits, model, before, lora_before) -> None:
    """The LoRA has changed, every delta and the memory have not."""
    after, memory = deltas(edits), edits.peft_config["edits"].memory
    assert after.keys() == before["deltas"].keys()
    assert all(torch.equal(after[name], delta) for name, delta in before["deltas"].items())
    assert memory is before["memory"] and edits.edited_facts() == before["facts"]
    lora_after = lora_tensors(model)
    assert all(not torch.equal(lora_after[name], tensor) for name, tensor in lora_before.items())


@pytest.fixture
def before(edits):
    return {
        "deltas": deltas(edits),
        "memory": edits.peft_config["edits"].memory,
        "facts": edits.edited_facts(),
    }


# --- the stack ---------------------------------------------------------------------------------------------------


def test_only_the_lora_is_trainable_and_both_act(edits, tokenizer):
    edited = logits(edits, tokenizer)
    model = stack(edits)
    torch.testing.assert_close(logits(model, tokenizer), edited)  # a new LoRA is zero
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable and all("lora_" in name and ".default." in name for name in trainable)
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            tensor.data.normal_(std=0.05)
    both = logits(model, tokenizer)
    assert not torch.allclose(both, edited)
    with model.disable_adapter():  # switches off both
        assert torch.equal(logits(model, tokenizer), logits(load_tiny_model()[0], tokenizer))
    assert torch.equal(logits(model, tokenizer), both)


def test_transformers_own_loading_gives_the_same_stack(edits, saved_edits, tokenizer):
    native = AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype=torch.float32)
    native.load_adapter(str(saved_edits), adapter_name="edits")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = get_peft_model(native, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert torch.equal(logits(model, tokenizer), logits(edits, tokenizer))
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "edit_" in name)


# --- trainers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", (False, True))
def test_trainer(edits, before, tokenizer, facts, tmp_path, checkpointing):
    model = stack(edits)
    lora_before, start = lora_tensors(model), logits(model, tokenizer)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments(tmp_path, gradient_checkpointing=checkpointing)),
        train_dataset=Sentences(tokenizer, facts[100:200]),
    )
    trainer.train()
    check_trained(edits, model, before, lora_before)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(loss > 0 for loss in losses)
    assert not torch.allclose(logits(model, tokenizer), start)


def test_a_checkpoint_holds_both_and_the_edits_can_be_loaded_alone(
    edits, before, saved_edits, tokenizer, facts, tmp_path
):
    model = stack(edits)
    data = Sentences(tokenizer, facts[100:200])
    Trainer(model=model, args=TrainingArguments(**arguments(tmp_path)), train_dataset=data).train()
    expected = logits(model, tokenizer)
    checkpoint = tmp_path / "checkpoint-3"
    assert all("lora_" in key for key in load_file(checkpoint / "adapter_model.safetensors"))
    assert all("edit_delta" in key for key in load_file(checkpoint / "edits" / "adapter_model.safetensors"))
    assert json.loads((checkpoint / "adapter_config.json").read_text())["peft_type"] == "LORA"

    for folder in (saved_edits, checkpoint / "edits"):
        again = PeftModel.from_pretrained(load_tiny_model()[0], folder, adapter_name="edits")
        assert again.edited_facts() == before["facts"]
        assert all(torch.equal(deltas(again)[name], delta) for name, delta in before["deltas"].items())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            both = PeftModel.from_pretrained(again.get_base_model(), checkpoint)
        assert torch.equal(logits(both, tokenizer), expected)

    # Undo still works under the LoRA, and gives what it gives without one.
    alone = PeftModel.from_pretrained(load_tiny_model()[0], saved_edits, adapter_name="edits")
    alone.remove_facts(alone.edited_facts()[:3])
    edits.remove_facts(edits.edited_facts()[:3])
    assert len(edits.edited_facts()) == len(before["facts"]) - 3
    for name, delta in deltas(alone).items():
        torch.testing.assert_close(deltas(edits)[name], delta, atol=1e-5, rtol=1e-4)
        assert not torch.equal(delta, before["deltas"][name])


def test_sft_trainer_of_trl(edits, before, tokenizer, facts, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset as Table

    texts = [f"{fact.filled_prompt} {fact.target_true}." for fact in facts[100:140]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trainer = trl.SFTTrainer(
            model=edits.get_base_model(),
            args=trl.SFTConfig(**arguments(tmp_path, max_length=32, bf16=False)),
            train_dataset=Table.from_dict({"text": texts}),
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]),
        )
    lora_before = lora_tensors(trainer.model)
    assert lora_before
    trainer.train()
    check_trained(edits, trainer.model, before, lora_before)
    assert all("lora_" in key for key in load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors"))


# --- merging the stack -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", (["q_proj", "v_proj"], ["q_proj", "down_proj"]))
def test_merging_both(edits, tokenizer, targets):
    """Edits first: where the LoRA is around an edited module, PEFT would leave the edit out otherwise."""
    model = stack(edits, target_modules=targets, init_lora_weights=False)
    expected = logits(model, tokenizer)
    edits.merge_adapter()
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, tokenizer), expected, atol=1e-4, rtol=1e-4)
    assert {type(block.mlp.down_proj) for block in merged.model.layers} == {torch.nn.Linear}


def test_a_lora_of_the_same_name_is_what_docs_warn_of(saved_edits, tokenizer):
    """PEFT keeps the configs of one model in one place: the second of a name takes the place of the first."""
    edits = PeftModel.from_pretrained(load_tiny_model()[0], saved_edits)
    held = edits.peft_config["default"]
    stack(edits)
    assert edits.peft_config["default"] is not held
