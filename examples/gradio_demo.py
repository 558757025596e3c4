"""A page on which to edit a model: type a fact, see its answers before and after, undo it.

    pip install gradio matplotlib
    python examples/gradio_demo.py                      # the bundled tiny model, offline
    python examples/gradio_demo.py --model <name or path> --statistics <name or path>

Without `--statistics` a model's own samples stand in for them, which is fit for trying only.
"""

from __future__ import annotations

import argparse
import threading
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model

from peft_edit import EditConfig, EditRecord, Fact, FactError, KeyStatistics
from peft_edit.analysis import plot_norms
from peft_edit.tiny import load_tiny_facts, load_tiny_model


EXAMPLE = ("Sven Wollter", "{}, who has a citizenship from", "Norway")
HEADER = ("id", "prompt", "new answer", "before")


@dataclass(frozen=True)
class Outcome:
    """What the page shows after an action.

    Args:
        message (`str`): What happened.
        before (`str`): The unedited model's answer.
        after (`str`): The model's answer now.
    """

    message: str
    before: str = ""
    after: str = ""


class EditingDesk:
    """One model that is edited, and the history of its norms. Requests are served one at a time.

    Args:
        model: A PEFT model with an `EditConfig` adapter.
        tokenizer: Its tokenizer.
        answer_tokens (`int`): Tokens that are generated for an answer.
    """

    def __init__(self, model: Any, tokenizer: Any, answer_tokens: int = 8) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.answer_tokens = answer_tokens
        self.norms: list[dict[str, float]] = []
        self.answers_before: dict[str, str] = {}
        self.lock = threading.Lock()

    def ask(self, subject: str, prompt: str) -> Outcome:
        """The answers of the unedited and of the edited model."""
        try:
            fact = checked_fact(subject, prompt, "?")
        except FactError as error:
            return Outcome(str(error))
        with self.lock:
            return Outcome("", self._answer_before(fact.filled_prompt), self._answer(fact.filled_prompt))

    def edit(self, subject: str, prompt: str, target: str) -> Outcome:
        """Writes one fact."""
        with self.lock:
            try:
                fact = checked_fact(subject, prompt, target)
                before = self._answer_before(fact.filled_prompt)
                report = self.model.edit_facts([fact], self.tokenizer, progress=False)
            except (FactError, ValueError, RuntimeError) as error:
                return Outcome(f"Nothing was changed. {error}")
            (done,) = report.facts
            self.answers_before[done.id] = before
            self.norms += report.norms
            message = f"Written in {done.steps} steps; P({done.target.strip()}) is {done.probability:.2f} now."
            if not done.written:
                message = "Not written: the search found no way to this answer."
            elif not done.recalled:
                message += " The model still prefers another answer."
            return Outcome(message, before, self._answer(fact.filled_prompt))

    def undo(self, fact_id: str) -> Outcome:
        """Takes one fact out again; by default the newest."""
        with self.lock:
            held = self.model.edited_facts()
            if not held:
                return Outcome("There is no edit to undo.")
            chosen = fact_id.strip() or held[-1].id
            try:
                (record,) = self.model.remove_facts(chosen)
            except KeyError as error:
                return Outcome(f"Nothing was changed. {error.args[0]}")
            self.norms.append(self._shares())
            prompt = Fact(record.subject, record.prompt, record.target).filled_prompt
            message = f"Undone: {prompt} … {record.target.strip()}. {len(held) - 1} edits left."
            return Outcome(message, self._answer_before(prompt), self._answer(prompt))

    def table(self) -> list[list[str]]:
        """A row of `HEADER` for each fact that the adapter holds, the newest first."""
        return [self._row(record) for record in reversed(self.model.edited_facts())]

    def figure(self) -> Any:
        """The norms after each action, or None before the first."""
        if not self.norms:
            return None
        figure = plot_norms(self.norms, budget=self.model.active_peft_config.norm_budget)
        figure.axes[0].set_xlabel("edits and undos")
        return figure

    def _row(self, record: EditRecord) -> list[str]:
        prompt = Fact(record.subject, record.prompt, record.target).filled_prompt
        return [record.id, prompt, record.target.strip(), self.answers_before.get(record.id, "")]

    def _shares(self) -> dict[str, float]:
        adapter = self.model.active_adapter
        layers = self.model.base_model.edit_layers(adapter)
        return {name: float(layer.get_delta(adapter).norm()) / layer.base_norm() for name, layer in layers.items()}

    def _answer_before(self, prompt: str) -> str:
        with self.model.disable_adapter():
            return self._answer(prompt)

    def _answer(self, prompt: str) -> str:
        """The greedy continuation, up to the end of the sentence."""
        ids = self.tokenizer(prompt, return_tensors="pt").to(self.model.device)
        with torch.no_grad():
            written = self.model.generate(**ids, max_new_tokens=self.answer_tokens, do_sample=False)
        new = written[0, ids["input_ids"].shape[1] :]
        return self.tokenizer.decode(new, skip_special_tokens=True).split(".")[0].strip()


def checked_fact(subject: str, prompt: str, target: str) -> Fact:
    """A fact from what was typed.

    Raises:
        FactError: if a field is empty, or the prompt does not say where the subject stands.
    """
    for name, value in (("subject", subject), ("prompt", prompt), ("new answer", target)):
        if not value.strip():
            raise FactError(f"The {name} is empty: fill it in.")
    subject, prompt, target = subject.strip(), prompt.strip(), target.strip()
    if "{}" not in prompt and prompt.count(subject) == 1:
        prompt = prompt.replace(subject, "{}")
    if prompt.count("{}") != 1:
        raise FactError("Put {} once into the prompt, where the subject stands.")
    return Fact(subject, prompt, target)


def build_page(desk: EditingDesk, title: str) -> Any:
    """The page, a `gradio.Blocks`.

    Raises:
        SystemExit: if gradio is not installed.
    """
    try:
        import gradio
    except ImportError as error:
        raise SystemExit("This demo needs gradio and matplotlib: pip install gradio matplotlib") from error

    def shown(outcome: Outcome) -> tuple[Any, ...]:
        return outcome.message, outcome.before, outcome.after, desk.table(), desk.figure()

    with gradio.Blocks(title="peft-edit") as page:
        gradio.Markdown(f"## Edit a fact\n{title}. Edits are kept until the page's server stops.")
        with gradio.Row():
            with gradio.Column():
                subject = gradio.Textbox(EXAMPLE[0], label="Subject")
                prompt = gradio.Textbox(
                    EXAMPLE[1], label="Prompt, with {} for the subject; ends where the answer begins"
                )
                target = gradio.Textbox(EXAMPLE[2], label="New answer")
                with gradio.Row():
                    ask, edit = gradio.Button("Ask"), gradio.Button("Edit", variant="primary")
            with gradio.Column():
                before = gradio.Textbox(label="Answer of the unedited model", interactive=False)
                after = gradio.Textbox(label="Answer now", interactive=False)
                message = gradio.Textbox(label="What happened", interactive=False)
        widths = ["15%", "45%", "20%", "20%"]
        table = gradio.Dataframe(
            headers=list(HEADER), label="Facts held", interactive=False, wrap=True, column_widths=widths
        )
        with gradio.Row():
            with gradio.Column():
                chosen = gradio.Textbox(label="Id to undo (empty: the newest)")
                undo = gradio.Button("Undo")
            plot = gradio.Plot(label="Norm of the edits", show_label=False)
        outputs = [message, before, after, table, plot]
        ask.click(lambda *typed: shown(desk.ask(*typed)), [subject, prompt], outputs, api_name="ask")
        edit.click(lambda *typed: shown(desk.edit(*typed)), [subject, prompt, target], outputs, api_name="edit")
        undo.click(lambda typed: shown(desk.undo(typed)), [chosen], outputs, api_name="undo")
        page.load(lambda: shown(Outcome("")), None, outputs, api_name="state")
    return page


def load_desk(name: str | None, statistics: str | None, norm_budget: float | None) -> EditingDesk:
    """The model to edit, with key statistics.

    Args:
        name (`str`, *optional*): Name or path of a model; by default the bundled one.
        statistics (`str`, *optional*): Name or path of its key statistics.
        norm_budget (`float`, *optional*): Largest ||Delta||_F / ||W0||_F.
    """
    if name is None:
        base, tokenizer = load_tiny_model()
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        base = AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
        tokenizer = AutoTokenizer.from_pretrained(name)
        if torch.cuda.is_available():
            base = base.to("cuda")
    model = get_peft_model(base, EditConfig(task_type="CAUSAL_LM", norm_budget=norm_budget)).eval()
    if statistics is not None:
        model.set_statistics(KeyStatistics.from_pretrained(statistics))
    elif name is None:
        texts = [f"{fact.filled_prompt} {fact.target_true}." for fact in load_tiny_facts()]
        model.collect_statistics(texts, tokenizer)
    return EditingDesk(model, tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or path of a causal language model; the bundled tiny one by default")
    parser.add_argument("--statistics", help="name or path of the model's key statistics")
    parser.add_argument("--norm-budget", type=float, help="largest norm of the edits, as a share of the weight's")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args()
    desk = load_desk(args.model, args.statistics, args.norm_budget)
    page = build_page(desk, args.model or "The bundled tiny model")
    page.launch(server_port=args.port)


if __name__ == "__main__":
    main()
