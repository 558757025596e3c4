"""Do edits survive fine-tuning? A LoRA is trained on a model that carries edits, and the edits are scored on the way.

    python benchmarks/fine_tuning.py --text wikitext2.txt --output fine_tuning.json

Edits `--facts` facts into the bundled tiny model, then trains a LoRA on the same model, the edits frozen under it:

- on "known facts": true sentences of facts that were not edited, which the model knows already;
- on "new facts": the same sentences with false ends, all of which are news to it;
- on "text": the lines of a file, cut into pieces of `--length` tokens (left out without `--text`).

Each is done with a LoRA on the attention's q_proj and v_proj, and with one on all linear modules but those that are
edited. The edits are scored after each of `--steps`; then all facts are edited once more on top of the LoRA. The other
order is measured too: the LoRA first, merged, and then the edits. Prints a table and writes JSON. On the CPU.
"""

from __future__ import annotations

import sys
from pathlib import Path


sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder's statistics.py would hide Python's own

import argparse
import json
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_edit import EditConfig, Fact
from peft_edit.evaluation import recall, score_edits
from peft_edit.tiny import load_tiny_facts, load_tiny_model


MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = {"attention": ["q_proj", "v_proj"], "all linear": list(MODULES)}


def sentences(facts: Sequence[Fact], new: bool) -> list[str]:
    """Each fact as a sentence with its true or its new target."""
    return [f"{fact.filled_prompt} {fact.target.strip() if new else fact.target_true}." for fact in facts]


def pieces(path: Path, tokenizer: Any, length: int) -> list[str]:
    """A text file cut into pieces of `length` tokens."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if len(line.split()) > 10]
    ids = tokenizer("\n".join(lines), add_special_tokens=False, verbose=False)["input_ids"]
    return [tokenizer.decode(ids[start : start + length]) for start in range(0, len(ids) - length, length)]


def batches(tokenizer: Any, texts: Sequence[str], size: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of a text collection without end, shuffled anew each time round; padding is not trained on."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(texts), generator=generator).tolist()
        for start in range(0, len(order) - size + 1, size):
            encoded = tokenizer([texts[i] for i in order[start : start + size]], return_tensors="pt", padding=True)
            labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
            yield {**encoded, "labels": labels}


def add_lora(model: Any, targets: Sequence[str], edited: Sequence[str], rank: int, seed: int) -> PeftModel:
    """A LoRA on a transformers model that may carry edits, away from the edited modules."""
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(targets),
        exclude_modules=list(edited),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT says that there is an adapter already
        return get_peft_model(model, config, adapter_name="lora")


def train(model: PeftModel, data: Iterator[dict[str, torch.Tensor]], steps: int, optimizer: Any) -> float:
    """Trains for some steps; the mean loss of the last ten, in nats per token."""
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(**next(data)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return sum(losses[-10:]) / len(losses[-10:])


class Trial:
    """What is the same in all rows: facts, statistics, scores."""

    def __init__(self, args: argparse.Namespace) -> None:
        known = load_tiny_facts()
        self.args = args
        self.facts, rest = known[: args.facts], known[args.facts :]
        self.kept, self.trained = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        self.texts = sentences(rest, new=False)

    def wrapped(self, base: Any, tokenizer: Any) -> PeftModel:
        """The model with an empty edit adapter that has its key statistics."""
        model = get_peft_model(base, EditConfig(task_type="CAUSAL_LM"), adapter_name="edits").eval()
        model.collect_statistics(self.texts, tokenizer)
        return model

    def edit(self, model: PeftModel, tokenizer: Any) -> None:
        """Writes the facts into the edit adapter."""
        model.edit_facts(self.facts, tokenizer, batch_size=self.args.batch_size, adapter_name="edits", progress=False)

    def scores(self, model: Any, tokenizer: Any) -> dict[str, float]:
        """Scores of the edits, and recall of facts that were neither edited nor trained on."""
        scores = score_edits(model, tokenizer, self.facts)
        asked = [(fact.filled_prompt, fact.target_true) for fact in self.kept]
        return {
            "efficacy": scores.efficacy,
            "paraphrase": scores.paraphrase,
            "neighborhood": scores.neighborhood,
            "score": scores.score,
            "greedy": scores.efficacy_accuracy,
            "unedited_recall": recall(model, tokenizer, asked),
        }

    def edit_then_train(self, texts: Sequence[str], targets: Sequence[str]) -> Iterator[tuple[str, dict[str, float]]]:
        """Scores after so many steps of fine-tuning, and after editing once more."""
        base, tokenizer = load_tiny_model()
        edits = self.wrapped(base, tokenizer)
        self.edit(edits, tokenizer)
        before = {name: layer.get_delta("edits").clone() for name, layer in edits.base_model.edit_layers().items()}
        model = add_lora(edits.get_base_model(), targets, list(before), self.args.rank, self.args.seed)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=self.args.lr)
        data = batches(tokenizer, texts, self.args.train_batch_size, self.args.seed)
        done = 0
        for steps in self.args.steps:
            loss = train(model, data, steps - done, optimizer) if steps > done else float("nan")
            done = steps
            yield f"{steps} steps", {**self.scores(model, tokenizer), "training_loss": loss}
        layers = edits.base_model.edit_layers()
        assert all(torch.equal(layers[name].get_delta("edits"), delta) for name, delta in before.items())
        self.edit(edits, tokenizer)
        yield "edited again", {**self.scores(model, tokenizer), "training_loss": float("nan")}

    def train_then_edit(self, texts: Sequence[str], targets: Sequence[str]) -> Iterator[tuple[str, dict[str, float]]]:
        """Scores of edits into a model that was fine-tuned before."""
        base, tokenizer = load_tiny_model()
        edited = list(self.wrapped(load_tiny_model()[0], tokenizer).base_model.edit_layers())
        model = add_lora(base, targets, edited, self.args.rank, self.args.seed)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=self.args.lr)
        data = batches(tokenizer, texts, self.args.train_batch_size, self.args.seed)
        loss = train(model, data, self.args.steps[-1], optimizer)
        edits = self.wrapped(model.merge_and_unload(), tokenizer)
        self.edit(edits, tokenizer)
        yield "trained first", {**self.scores(edits, tokenizer), "training_loss": loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=10, help="facts solved for together")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 10, 50, 100, 200, 400])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--train-batch-size", type=int, default=16)
    parser.add_argument("--text", type=Path, help="file for the fine-tuning on text")
    parser.add_argument("--length", type=int, default=64, help="tokens in a piece of text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("fine_tuning.json"))
    args = parser.parse_args()
    if args.steps != sorted(args.steps):
        parser.error("--steps must rise")

    trial = Trial(args)
    kinds = {"known facts": sentences(trial.trained, new=False), "new facts": sentences(trial.trained, new=True)}
    if args.text is not None:
        kinds["text"] = pieces(args.text, load_tiny_model()[1], args.length)
    rows = []
    for kind, texts in kinds.items():
        for where, targets in TARGETS.items():
            for order in (trial.edit_then_train, trial.train_then_edit):
                for when, row in order(texts, targets):
                    rows.append({"data": kind, "lora": where, "when": when, **row})
                    print(
                        f"{kind:12s} {where:11s} {when:14s} ES {row['efficacy']:5.1f}  PS {row['paraphrase']:5.1f}  "
                        f"NS {row['neighborhood']:5.1f}  S {row['score']:5.1f}  greedy {row['greedy']:5.1f}  "
                        f"unedited {row['unedited_recall']:5.1f} %  training loss {row['training_loss']:.2f}",
                        flush=True,
                    )
    about = {**vars(args), "text": str(args.text), "output": str(args.output), "torch": torch.__version__}
    args.output.write_text(json.dumps({"settings": about, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
