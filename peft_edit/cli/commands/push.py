"""Push an adapter and its card to the Hub."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..adapters import AdapterFiles
from ..arguments import add_model_options
from ..errors import CliError
from ..models import adapter_folder, load_adapter
from ..output import Output, Result
from ..sources import is_repository
from .evaluate import NAMES as SCORES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `peft-edit push`."""
    parser.add_argument("adapter", help="the adapter's directory")
    parser.add_argument("repository", help="such as user/edits; made if it is not there")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--branch", help="branch of the repository; made if it is not there")
    parser.add_argument("--pull-request", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--no-facts", action="store_true", help="withhold the facts: such an adapter only infers")
    parser.add_argument("--scores", type=Path, metavar="FILE", help="what `peft-edit eval --json` wrote, for the card")
    parser.add_argument("--license", help="the adapter's licence, by its identifier on the Hub")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--token", help="by default that of `hf auth login` or HF_TOKEN")
    add_model_options(parser)


def run(args: argparse.Namespace, out: Output) -> Result:
    """Loads the adapter on its base, which the card is about, and pushes it."""
    from ...hub import push_edits

    if not is_repository(args.repository):
        raise CliError(f"'{args.repository}' is no repository's name: write it as user/edits.")
    scores = None if args.scores is None else read_scores(args.scores)
    folder = adapter_folder(args.adapter)
    records = AdapterFiles.read(folder).records
    model, _ = load_adapter(folder, args)
    out.note(f"Pushing to '{args.repository}'.")
    commit = push_edits(
        model,
        args.repository,
        include_facts=not args.no_facts,
        scores=scores,
        license=args.license,
        commit_message=args.message,
        private=args.private,
        token=args.token,
        revision=args.branch,
        create_pr=args.pull_request,
    )
    facts = 0 if args.no_facts or records is None else len(records)
    document = {
        "repository": args.repository,
        "url": str(commit.commit_url),
        "pull_request": getattr(commit, "pr_url", None),
        "facts_included": facts,
    }
    return Result(document, [f"Pushed to {commit.commit_url} ({facts} facts listed)."])


def read_scores(path: Path) -> dict[str, dict[str, float]]:
    """ES, PS, NS and S of the edited model and of its base, from a file of `peft-edit eval --json`.

    Raises:
        CliError: if the file is not there, or holds something else.
    """
    if not path.is_file():
        raise CliError(f"There is no file of scores '{path}': `peft-edit eval --json > {path}` writes one.")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return {
            side: {letters: document[side][name] for name, letters in SCORES if document[side][name] is not None}
            for side in ("base", "edited")
        }
    except (ValueError, KeyError, TypeError) as error:
        raise CliError(f"'{path}' is not what `peft-edit eval --json` writes ({error!r}).") from error
