"""Quickstart: 500 real facts written into the bundled tiny model in batches of 50, scored, undone, saved, merged.

    python examples/quickstart.py

Runs offline on a CPU in under two minutes. Writes the adapter, a plot and the scores to `quickstart_output/`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model

from peft_edit import EditConfig, Fact
from peft_edit.evaluation import recall, score_edits
from peft_edit.tiny import load_tiny_facts, load_tiny_model


def complete(model, tokenizer, prompt: str, tokens: int = 4) -> str:
    """The model's greedy continuation, up to the end of the sentence."""
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        written = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).split(".")[0].strip()


def answers(model, tokenizer, facts: list[Fact]) -> list[str]:
    """Completions of the facts' prompts."""
    return [complete(model, tokenizer, fact.filled_prompt) for fact in facts]


def plot_norms(norms: list[dict[str, float]], budget: float, batch_size: int, path: Path) -> None:
    """||Δ||_F of each module after each batch, against the budget."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    edits = [batch_size * (index + 1) for index in range(len(norms))]
    for name in norms[0]:
        axes.plot(edits, [100 * norm[name] for norm in norms], marker="o", markersize=3, label=name)
    axes.axhline(100 * budget, color="black", linestyle="--", linewidth=1, label="budget")
    axes.set(xlabel="facts edited", ylabel=r"$\|\Delta\|_F$ in % of $\|W_0\|_F$", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def check_in_fresh_process(folder: Path) -> list[str]:
    """Loads the saved adapter in another Python process and returns its completions there."""
    command = [sys.executable, __file__, "--answer-from", str(folder)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def answer_from(folder: Path) -> None:
    """What the fresh process does: base model, adapter, completions."""
    model, tokenizer = load_tiny_model()
    model = PeftModel.from_pretrained(model, folder).eval()
    asked = [Fact(record.subject, record.prompt, record.target) for record in model.edited_facts()[:8]]
    print(json.dumps(answers(model, tokenizer, asked)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--norm-budget", type=float, default=1.2, help="largest ||Δ||_F / ||W0||_F")
    parser.add_argument("--output", type=Path, default=Path("quickstart_output"))
    parser.add_argument("--answer-from", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.answer_from:
        answer_from(args.answer_from)
        return

    start = time.time()
    args.output.mkdir(parents=True, exist_ok=True)
    base, tokenizer = load_tiny_model()
    known = load_tiny_facts()
    facts, kept = known[: args.facts], known[args.facts :]
    unedited = [(fact.filled_prompt, fact.target_true) for fact in kept]

    model = get_peft_model(base, EditConfig(task_type="CAUSAL_LM", norm_budget=args.norm_budget)).eval()
    # Key statistics need ordinary text; this model's world is sentences like these.
    model.collect_statistics((f"{fact.filled_prompt} {fact.target_true}." for fact in kept), tokenizer)

    before = answers(model, tokenizer, facts[:8])
    scores = {"base": score_edits(model, tokenizer, facts)}
    kept_before = recall(model, tokenizer, unedited)

    report = model.edit_facts(facts, tokenizer, batch_size=args.batch_size)
    print(report, "\n")

    after = answers(model, tokenizer, facts[:8])
    scores["edited"] = score_edits(model, tokenizer, facts)
    for fact, old, new in zip(facts, before, after):
        print(f"  {fact.filled_prompt} … {old}  ->  {new}   (wanted: {fact.target})")
    print(f"\nbase    {scores['base']}\nedited  {scores['edited']}")
    print(
        f"recall of {len(unedited)} unedited facts: {kept_before:.1f} % -> {recall(model, tokenizer, unedited):.1f} %"
    )
    plot_norms(report.norms, args.norm_budget, args.batch_size, args.output / "norms.png")

    (removed,) = model.remove_facts(facts[-1])
    print(f"undone: {facts[-1].filled_prompt} … {complete(model, tokenizer, facts[-1].filled_prompt)}")
    print(
        f"        (was edited to {removed.target}, true is {facts[-1].target_true}; "
        f"{len(model.edited_facts())} facts left)"
    )

    adapter = args.output / "adapter"
    model.save_pretrained(adapter)
    elsewhere = check_in_fresh_process(adapter)
    here = answers(model, tokenizer, facts[:8])
    merged = model.merge_and_unload()
    merged_answers = answers(merged, tokenizer, facts[:8])
    print(f"same answers in a fresh process: {elsewhere == here}; after merging: {merged_answers == here}")
    if not elsewhere == here == merged_answers:
        raise SystemExit("The saved or merged model answers differently.")

    summary = {name: score.to_dict() for name, score in scores.items()} | {"norms": report.norms}
    (args.output / "scores.json").write_text(json.dumps(summary, indent=2))
    print(f"wrote {args.output}/ in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
