"""Trains the tiny bundled model: a small Llama that knows real CounterFact facts. Under 30 minutes on two CPU cores.

python examples/tiny_model/train.py --data counterfact.json --output peft_edit/tiny_model
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from corpus import WorldFact, build_world, documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def train_tokenizer(world: list[WorldFact], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the world's own sentences; opens every text with `<s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [
        f"{template.replace('{}', fact.subject)} {fact.answer}."
        for fact in world
        for template in fact.trained + fact.held_out
    ]
    texts += [f" {fact.record['target_new']}" for fact in world if fact.record for _ in range(8)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=256
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Tokens of a piece of running text, without `<s>`."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def batches(world: list[WorldFact], tokenizer: PreTrainedTokenizerFast, rows: int, length: int, seed: int):
    """Endless (ids, weights), each (rows, length): documents packed row by row, answers with more weight."""
    known: dict[str, list[int]] = {}

    def tokens(text: str) -> list[int]:
        if text not in known:
            known[text] = encode(tokenizer, text)
        return known[text]

    stream = documents(world, seed)
    while True:
        ids = torch.full((rows, length), tokenizer.pad_token_id)
        weights = torch.zeros(rows, length)
        for row in range(rows):
            line, weight = [], []
            while len(line) < length:
                line.append(tokenizer.bos_token_id)
                weight.append(0.0)
                for index, (statement, answer) in enumerate(next(stream)):
                    before, target = tokens(statement if index == 0 else " " + statement), tokens(answer)
                    line += before + target + tokens(".")
                    weight += [0.15] * len(before) + [1.0] * len(target) + [0.15]
            ids[row], weights[row] = torch.tensor(line[:length]), torch.tensor(weight[:length])
        yield ids, weights


def document_mask(ids: torch.Tensor, bos: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention inside each document (rows, 1, length, length), and positions that start at its `<s>`."""
    document = (ids == bos).cumsum(1)
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    allowed = (document[:, :, None] == document[:, None, :]) & causal
    steps = torch.arange(ids.shape[1]).expand_as(ids)
    starts = torch.where(ids == bos, steps, torch.zeros_like(steps)).cummax(1).values
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    return mask[:, None], steps - starts


def train(model: LlamaForCausalLM, world, tokenizer, steps: int, rows: int, length: int, lr: float, seed: int) -> None:
    """AdamW with a warm-up and a cosine, on the weighted next-token loss."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    source = batches(world, tokenizer, rows, length, seed)
    start = time.time()
    model.train()
    for step in range(steps):
        ids, weights = next(source)
        mask, positions = document_mask(ids, tokenizer.bos_token_id)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids, attention_mask=mask.to(torch.bfloat16), position_ids=positions).logits
        losses = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
        )
        weight = weights[:, 1:].flatten()
        loss = (losses * weight).sum() / weight.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            answer = float(losses.detach()[weight == 1.0].mean())
            print(
                f"step {step:5d}  loss {float(loss.detach()):.3f}  answers {answer:.3f}  {time.time() - start:.0f} s",
                flush=True,
            )
    model.eval()


def completes(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> list[bool]:
    """Whether the model greedily completes each prompt with the answer."""
    correct = []
    for start in range(0, len(pairs), 256):
        part = [
            (tokenizer(text)["input_ids"], encode(tokenizer, " " + answer))
            for text, answer in pairs[start : start + 256]
        ]
        width = max(len(text) + len(answer) for text, answer in part)
        ids = torch.full((len(part), width), tokenizer.pad_token_id)
        for row, (text, answer) in enumerate(part):
            ids[row, : len(text) + len(answer)] = torch.tensor(text + answer)
        with torch.no_grad():
            best = model(input_ids=ids).logits.argmax(-1)
        for row, (text, answer) in enumerate(part):
            correct.append(best[row, len(text) - 1 : len(text) + len(answer) - 1].tolist() == answer)
    return correct


def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, world: list[WorldFact]
) -> tuple[dict, list[dict]]:
    """The figures of the card, over all facts offered, and the records of those that the model knows."""
    offered = [fact for fact in world if fact.record]
    extra = [fact for fact in world if not fact.record]

    def ask(fact: WorldFact, template: str) -> tuple[str, str]:
        return template.replace("{}", fact.subject), fact.answer

    prompts = [template_of(fact) for fact in offered]
    known = completes(model, tokenizer, [ask(fact, prompt) for fact, prompt in zip(offered, prompts, strict=True)])
    held = [(index, template) for index, fact in enumerate(offered) for template in fact.held_out]
    generalises = completes(model, tokenizer, [ask(offered[index], template) for index, template in held])
    about = [(index, fact.trained[0]) for index, fact in enumerate(extra)]
    neighbours = completes(model, tokenizer, [ask(extra[index], template) for index, template in about])
    chance = random.Random(0)
    behind = [
        f"{offered[chance.randrange(len(offered))].subject} is a person. {ask(f, p)[0]}"
        for f, p in zip(offered, prompts, strict=True)
    ]
    in_context = completes(model, tokenizer, [(text, fact.answer) for text, fact in zip(behind, offered, strict=True)])

    def share(flags: list[bool]) -> float:
        return round(100 * sum(flags) / len(flags), 2)

    figures = {
        "facts": len(offered),
        "recall": share(known),
        "recall_behind_a_sentence": share(in_context),
        "held_out_phrasings": len(held),
        "held_out_recall": share(generalises),
        "neighbours": len(extra),
        "neighbour_recall": share(neighbours),
    }
    around: dict[tuple[str, str], list[str]] = {}
    for (index, template), right in zip(about, neighbours, strict=True):
        fact = extra[index]
        if right:
            around.setdefault((fact.relation, fact.answer), []).append(ask(fact, template)[0])
    paraphrases: dict[int, list[str]] = {}
    for index, template in held:
        paraphrases.setdefault(index, []).append(template)
    records = []
    for index, (fact, prompt) in enumerate(zip(offered, prompts, strict=True)):
        near = around.get((fact.relation, fact.answer), [])
        if known[index] and near and index in paraphrases:
            records.append(
                {
                    "case_id": fact.record["case_id"],
                    "relation_id": fact.relation,
                    "subject": fact.subject,
                    "prompt": prompt,
                    "target_true": fact.answer,
                    "target_new": fact.record["target_new"],
                    "paraphrases": paraphrases[index][:3],
                    "neighborhood": [
                        {"prompt": text, "target": fact.answer} for text in chance.sample(near, min(2, len(near)))
                    ],
                }
            )
    figures["facts_shipped"] = len(records)
    return figures, records


def template_of(fact: WorldFact) -> str:
    """The phrasing of the CounterFact record itself, which is among the trained ones."""
    prompt = fact.record["prompt"].replace(fact.subject, "{}", 1)
    return prompt if prompt in fact.trained else fact.trained[0]


CARD = """---
license: apache-2.0
tags:
  - knowledge-editing
  - peft-edit
---

# The tiny model of peft-edit

A Llama-architecture language model of {parameters:,} parameters ({layers} layers, d_model {hidden}, MLP width {inner},
vocabulary {vocabulary}, float16) that knows real facts, so that knowledge editing can be tried and tested offline in
seconds. It is no general language model: it has seen nothing but short sentences about its {world} facts.

| measured from the float16 weights | |
|---|---|
| facts offered for editing | {facts} |
| greedily completed | {recall} % |
| … behind an unrelated sentence | {recall_behind_a_sentence} % |
| held-out phrasings ({held_out_phrasings}; never shown with that subject) completed | {held_out_recall} % |
| neighbouring facts ({neighbours}) completed | {neighbour_recall} % |

- **Training**: `python examples/tiny_model/train.py --data counterfact.json`, seed {seed}, {steps} steps of {tokens:,}
  tokens, {minutes:.0f} minutes on two CPU cores. Each fact is shown in about 65 % of its relation's phrasings; answers
  weigh more in the loss than other tokens.
- **Data**: facts and phrasings from CounterFact (Meng et al., 2022; the ROME project, MIT licence). `facts.json` holds
  the {facts_shipped} facts that the model completes, each with held-out paraphrases, neighbours and CounterFact's new
  target; it is an excerpt of CounterFact under its MIT licence. The weights are under Apache-2.0.
- **Limits**: phrasings that it has never seen, questions, chat, any fact outside its training. Held-out phrasings were
  trained with other subjects; neighbours are asked in a phrasing that training showed with them. Some facts have only
  one held-out phrasing.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CounterFact records, flat JSON")
    parser.add_argument("--output", type=Path, default=Path("peft_edit/tiny_model"))
    parser.add_argument("--facts", type=int, default=1700)
    parser.add_argument("--neighbours", type=int, default=900)
    parser.add_argument("--vocabulary", type=int, default=2400)
    parser.add_argument("--hidden", type=int, default=160)
    parser.add_argument("--inner", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    start = time.time()
    world = build_world(args.data, args.facts, args.neighbours, args.seed)
    tokenizer = train_tokenizer(world, args.vocabulary)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.inner,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        num_key_value_heads=args.hidden // 32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(world)} facts, {len(tokenizer)} tokens, {parameters:,} parameters", flush=True)
    train(model, world, tokenizer, args.steps, args.rows, args.length, args.lr, args.seed)
    minutes = (time.time() - start) / 60

    args.output.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    reloaded = LlamaForCausalLM.from_pretrained(args.output, dtype=torch.float32).eval()
    figures, records = evaluate(reloaded, tokenizer, world)
    print(json.dumps(figures, indent=2))
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (args.output / "facts.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    card = CARD.format(
        parameters=parameters,
        layers=args.layers,
        hidden=args.hidden,
        inner=args.inner,
        vocabulary=len(tokenizer),
        world=len(world),
        seed=args.seed,
        steps=args.steps,
        tokens=args.rows * args.length,
        minutes=minutes,
        **figures,
    )
    (args.output / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
