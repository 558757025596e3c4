"""Completion scripts, made from the parser: what it knows, the shells know."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """An option of a command.

    Args:
        flags (`tuple[str, ...]`): Such as `-o`, `--output`.
        help (`str`): What it does.
        takes_value (`bool`): Whether a value follows.
        choices (`tuple[str, ...]`): Values that it may have; empty: any, so files are offered.
    """

    flags: tuple[str, ...]
    help: str
    takes_value: bool
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Command:
    """A command: its name, what it does, its options, and values of its positional arguments where they are known."""

    name: str
    help: str
    options: tuple[Option, ...]
    words: tuple[str, ...]


def commands(parser: argparse.ArgumentParser) -> list[Command]:
    """The commands of a parser with subparsers."""
    (choices,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    helps = {action.dest: action.help or "" for action in choices._choices_actions}
    return [_command(name, helps[name], sub) for name, sub in choices.choices.items()]


def _command(name: str, help_: str, parser: argparse.ArgumentParser) -> Command:
    options: list[Option] = []
    words: list[str] = []
    for action in parser._actions:
        known = tuple(str(choice) for choice in action.choices or ())
        if action.option_strings:
            takes_value = action.nargs != 0
            options.append(Option(tuple(action.option_strings), action.help or "", takes_value, known))
        else:
            words += known
    return Command(name, help_, tuple(options), tuple(words))


def _flags(command: Command) -> list[str]:
    return [flag for option in command.options for flag in option.flags]


# --- bash --------------------------------------------------------------------------------------------------------


def bash(parser: argparse.ArgumentParser) -> str:
    """For `eval "$(peft-edit completion bash)"`."""
    found = commands(parser)
    cases = []
    for command in found:
        values = [
            f"          {'|'.join(option.flags)}) words={_quoted(' '.join(option.choices))}; files= ;;"
            for option in command.options
            if option.choices
        ]
        values += [
            f"          {'|'.join(option.flags)}) words=; files=yes ;;"
            for option in command.options
            if option.takes_value and not option.choices
        ]
        cases.append(
            f"    {command.name})\n"
            f"      words={_quoted(' '.join([*command.words, *_flags(command)]))}\n"
            f"      files={'' if command.words else 'yes'}\n"
            + ("      case $before in\n" + "\n".join(values) + "\n      esac\n" if values else "")
            + "      ;;"
        )
    names = " ".join(command.name for command in found)
    return "\n".join(
        [
            "_peft_edit() {",
            "  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} words= files=",
            "  COMPREPLY=()",
            "  if [ $COMP_CWORD -eq 1 ]; then",
            f'    COMPREPLY=($(compgen -W {_quoted(names + " --help --version")} -- "$word"))',
            "    return",
            "  fi",
            "  case ${COMP_WORDS[1]} in",
            *cases,
            "  esac",
            '  if [ -n "$words" ]; then COMPREPLY=($(compgen -W "$words" -- "$word")); fi',
            '  if [ -n "$files" ] && [ "${word#-}" = "$word" ]; then',
            "    local IFS=$'\\n'",
            '    COMPREPLY+=($(compgen -f -- "$word"))',
            "    compopt -o filenames 2>/dev/null",
            "  fi",
            "}",
            "complete -F _peft_edit peft-edit",
        ]
    )


# --- zsh ---------------------------------------------------------------------------------------------------------


def zsh(parser: argparse.ArgumentParser) -> str:
    """For `eval "$(peft-edit completion zsh)"`, after `compinit`; or as a file `_peft-edit` in `$fpath`."""
    found = commands(parser)
    described = [f"    {_quoted(f'{command.name}:{_colons(command.help)}')}" for command in found]
    cases = []
    for command in found:
        lines = [_zsh_option(option) for option in command.options]
        rest = f"*:word:({' '.join(command.words)})" if command.words else "*:file:_files"
        lines.append(f"        {_quoted(rest)}")
        cases.append(f"    {command.name})\n      _arguments \\\n" + " \\\n".join(lines) + "\n      ;;")
    return "\n".join(
        [
            "#compdef peft-edit",
            "_peft_edit() {",
            "  local -a commands",
            "  commands=(",
            *described,
            "  )",
            "  if (( CURRENT == 2 )); then",
            "    _describe command commands",
            "    return",
            "  fi",
            "  local command=${words[2]}",
            '  words=("${words[1]}" "${(@)words[3,-1]}")',
            "  (( CURRENT-- ))",
            "  case $command in",
            *cases,
            "  esac",
            "}",
            'if [ "$funcstack[1]" = "_peft_edit" ] || [ "$funcstack[1]" = "_peft-edit" ]; then',
            '  _peft_edit "$@"',
            "else",
            "  compdef _peft_edit peft-edit",
            "fi",
        ]
    )


def _zsh_option(option: Option) -> str:
    value = ""
    if option.choices:
        value = f":value:({' '.join(option.choices)})"
    elif option.takes_value:
        value = ":value:_files"
    text = option.help.replace("[", "(").replace("]", ")").replace(":", "\\:")
    flags = [f"        {_quoted(f'*{flag}[{text}]{value}')}" for flag in option.flags]
    return " \\\n".join(flags)


def _colons(text: str) -> str:
    return text.replace(":", "\\:")


# --- fish --------------------------------------------------------------------------------------------------------


def fish(parser: argparse.ArgumentParser) -> str:
    """For `peft-edit completion fish | source`."""
    found = commands(parser)
    lines = [
        f"complete -c peft-edit -f -n __fish_use_subcommand -a {command.name} -d {_fish_quoted(command.help)}"
        for command in found
    ]
    for command in found:
        start = f"complete -c peft-edit -n '__fish_seen_subcommand_from {command.name}'"
        if command.words:
            lines.append(f"{start} -f -a {_fish_quoted(' '.join(command.words))}")
        for option in command.options:
            parts = [start]
            for flag in option.flags:
                parts.append(f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}")
            if option.choices:
                parts.append(f"-x -a {_fish_quoted(' '.join(option.choices))}")
            elif option.takes_value:
                parts.append("-r -F")
            lines.append(" ".join([*parts, f"-d {_fish_quoted(option.help)}"]))
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SHELLS: dict[str, Callable[[argparse.ArgumentParser], str]] = {"bash": bash, "fish": fish, "zsh": zsh}
