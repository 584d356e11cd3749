"""Command lines and YAML files: how words become options, and how --help shows these. It knows no single option."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import re
import sys
import textwrap
from pathlib import Path

import yaml
from transformers.hf_argparser import HfArgumentParser

from options import GROUPS, in_groups
from utils import UsageError

NO_DEFAULT = (None, [], "")  # what --help need not say
PLACEHOLDERS = {"integer": "N", "number": "X"}  # JSON type of a check -> what --help shows in a value's place


class HelpFormatter(argparse.HelpFormatter):
    """Shows an option as it is typed, once, and its default behind its text if it has one."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        if action.nargs in (0, "?"):  # a switch: its name alone means true
            return action.option_strings[-1] if action.nargs == 0 else action.option_strings[0]
        value = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else self._placeholder(action)
        return f"{action.option_strings[0]} {value}{' ...' if action.nargs == '+' else ''}"

    def _placeholder(self, action: argparse.Action) -> str:
        return PLACEHOLDERS.get(getattr(action.type, "schema", {}).get("type"), "TEXT")

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = action.default is not argparse.SUPPRESS and action.default not in NO_DEFAULT
        if not shown or (action.default is False and action.nargs == "?"):
            return action.help
        return action.help + " (default: " + str(" ".join(action.default) if isinstance(action.default, list)
                                                 else action.default).replace("%", "%%") + ")"  # fmt: skip


class OneLineParser(HfArgumentParser):
    """A parser of a dataclass's options. It reports an error in one line, without the usage text, and exits with 2; its
    help has the options by group, then the dataclass's EXAMPLES, {what for: command}."""

    def __init__(self, kind: type | None = None, **settings):
        settings = {"usage": "%(prog)s [--OPTION VALUE ...]", "allow_abbrev": False,
                    "formatter_class": HelpFormatter} | settings  # fmt: skip
        if kind is not None:
            settings.setdefault("description", kind.__doc__)
        super().__init__(kind, **settings)

    def _parse_dataclass_field(self, parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
        plain = copy.copy(field)
        plain.metadata = {"help": field.metadata["help"]}  # the rest is none of argparse's arguments
        super()._parse_dataclass_field(parser, plain)

    def format_help(self) -> str:
        """Return the help: usage, description, the options of each group, examples."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text(self.description)
        if any(action.nargs == "?" for action in self._actions):
            formatter.add_text("An option without a value (TEXT, N, X) is a switch: its name alone turns it on.")
        grouped = [(GROUPS.get(group), [self._option_string_actions[f"--{field.name}"] for field in fields])
                   for kind in self.dataclass_types for group, fields in in_groups(kind).items()]  # fmt: skip
        known = {action for _, actions in grouped for action in actions}
        others = [action for action in self._actions if action not in known]
        sections = [(title, actions) for title, actions in grouped if title]
        ungrouped = [action for title, actions in grouped if not title for action in actions]
        for title, actions in [*sections, ("options", ungrouped + others)]:
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help() + self._examples(formatter._width)

    def _examples(self, width: int) -> str:
        """Return the examples as they can be pasted into a shell."""
        shown = []
        for kind in self.dataclass_types:
            for what, command in getattr(kind, "EXAMPLES", {}).items():
                together = re.sub(r" (?!--)", "\xa0", command)  # lines end before an option, not inside one
                lines = textwrap.wrap(together, width - 6, subsequent_indent="    ", break_long_words=False,
                                      break_on_hyphens=False)  # fmt: skip
                shown.append(f"  {what}:\n    " + " \\\n    ".join(lines).replace("\xa0", " ") + "\n")
        return "\nexamples:\n" + "\n".join(shown) if shown else ""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}{self._nearest(message)} (--help lists every option)\n")

    def _nearest(self, message: str) -> str:
        """Return the question whether the option that is nearest to an unknown one was meant; "" if none is near."""
        unknown = re.match(r"unrecognized arguments: --(\w+)", message)
        names = [name[2:] for name in self._option_string_actions if name.startswith("--") and name[:5] != "--no_"]
        near = nearest(unknown[1], names) if unknown else None
        return f"; did you mean --{near}?" if near else ""


def nearest(name: str, names: list[str]) -> str | None:
    """Return the name that was probably meant: spelled nearly so, or the only one in which all parts begin words."""
    if close := difflib.get_close_matches(name, names, n=1, cutoff=0.8):
        return close[0]
    parts = name.split("_")
    holding = [
        other for other in names if all(any(word.startswith(part) for word in other.split("_")) for part in parts)
    ]
    return holding[0] if len(holding) == 1 else None


def parse(options_class: type, argv: list[str] | None = None):
    """Read the options from a YAML file (`--config`) and the command line, which overrides the file.

    The file's options are put before the real arguments, so both pass the same checks. This also reads `1e-5`, which
    is text in YAML, as a number. run/parsing.py adds the recipe of a run.
    """
    argv = underscored(sys.argv[1:] if argv is None else argv)
    parser = OneLineParser(options_class)
    arguments = config_words(options_class, argv) + argv
    return options_class(**vars(parser.parse_args(arguments)))


def underscored(argv: list[str]) -> list[str]:
    """Return the arguments with option names as they are spelled here: --use-lora=no as --use_lora=no."""
    parts = [word.partition("=") if word.startswith("--") else ("", "", word) for word in argv]
    return [name.replace("-", "_").replace("__", "--", 1) + sign + value for name, sign, value in parts]


def config_words(options_class: type, argv: list[str], also: frozenset[str] = frozenset()) -> list[str]:
    """Return the options in the `--config` file as arguments; `also`: names allowed beside the options."""
    path = peek(argv, "config")
    known = {f.name for f in dataclasses.fields(options_class) if f.init} - {"config"} | also
    return _yaml_words(path, known) if path else []


def peek(argv: list[str], name: str, kind=str, const=None):
    """Return one option's value before the others are read: None if it is not given, `const` if it has no value."""
    parser = OneLineParser(add_help=False)
    parser.add_argument(f"--{name}", nargs="?", type=kind, const=const)
    return getattr(parser.parse_known_args(argv)[0], name)


def words_of(content: dict) -> list[str]:
    """Return options and their values as command-line arguments; None and empty lists are left out."""
    arguments = []
    for key, value in content.items():
        values = value if isinstance(value, list) else [value]
        if value is not None and values:
            arguments += [f"--{key}", *(str(v) for v in values)]
    return arguments


def read_yaml(path: str | Path, option: str) -> dict:
    """Read a YAML file of 'name: value' lines. Raises UsageError, with `option`."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--{option} {path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise UsageError(f"--{option} {path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UsageError(f"--{option} {path}: must hold one 'name: value' a line")
    return content


def _yaml_words(path: str, known: set[str]) -> list[str]:
    """Return the options in a YAML file as arguments. Raises UsageError for a name that is not in `known`."""
    content = read_yaml(path, "config")
    for key, value in content.items():
        if key not in known:
            raise UsageError(f"--config {path}: unknown option {key!r}")
        if any(isinstance(v, dict | list) for v in (value if isinstance(value, list) else [value])):
            raise UsageError(f"--config {path}: option {key!r} must be a value or a list of values")
    return words_of(content)
