"""The options of the commands of unlearn_requests.py."""

import dataclasses
from typing import Literal, Optional

from ledger.book import KINDS
from options import COUNT, POSITIVE, option

OptionalText = Optional[str]  # noqa: UP045


@dataclasses.dataclass
class LedgerOptions:
    """Options of every command that works on a ledger."""

    ledger: str = option("ledger", "folder of the ledger, its requests and its models")


@dataclasses.dataclass
class InitOptions(LedgerOptions):
    """Begin a ledger."""

    config: str = option(
        "recipes/consent/ledger.yaml", "YAML file with the sections run (options of unlearn_harm.py), evaluation (of "
        "evaluate_unlearning.py) and states"
    )  # fmt: skip


@dataclasses.dataclass
class AddOptions(LedgerOptions):
    """Note a request, and keep what it asks."""

    id: str = option("", "id of the request; it stays in the ledger for ever, so it must not name anybody")
    kind: Literal[KINDS] = option("person", "what is to be forgotten")
    rows: OptionalText = option(None, "file of rows to forget, in the forms of --forget_data")
    text: OptionalText = option(None, "file of text to forget, in place of --rows")
    fields: list[str] = option([], "names of fields in --rows, as prompt=frage response=antwort")
    holdout: OptionalText = option(
        None, "file of rows that are to be forgotten as well, asked of every state and never trained on, such as the "
        "same questions in other words"
    )  # fmt: skip
    allowed: OptionalText = option(None, "file of rows beside the border, which stay as they are")
    subject: str = option("", "who or what it is about; kept with the rows, the ledger has a salted hash")
    note: str = option("", "a free note; kept with the rows, the ledger has a salted hash")
    received: str = option("", "date on which it came, as 2026-11-27; it stays in the ledger, as do the three below")
    due: str = option("", "date by which it must be met")
    basis: str = option("", "its legal basis, such as: GDPR, article 17 (1) b")
    approved_by: str = option("", "who approved it")


@dataclasses.dataclass
class WithdrawOptions(LedgerOptions):
    """Note that a request falls: the next state is fitted without it."""

    id: str = option("", "id of the request")
    why: str = option("", "why it falls; it stays in the ledger for ever")


@dataclasses.dataclass
class ApplyOptions(LedgerOptions):
    """Take what is open to a new state of the model, and measure it."""

    dry_run: bool = option(False, "print what would be done, and stop")
    refit: bool = option(False, "fit the state anew from the first original, whatever was asked")
    shred: list[str] = option([], "ids of requests whose text is destroyed once they are met; all: every such one")
    confirm_loss: bool = option(False, "fit anew although the text of requests in force is destroyed: they come back")


@dataclasses.dataclass
class SyncOptions(LedgerOptions):
    """Make the ledger follow a policy file: new rules are added, gone ones withdrawn, changed ones replaced."""

    policy: str = option("policy.yaml", "YAML file with the rules, as recipes/policy/policy.yaml")
    rephrase: COUNT = option(0, "further wordings of each example, by rules for English, on both sides alike")
    day: OptionalText = option(None, "the day whose rules hold, as 2026-11-27 (if unset: today)")
    seed: COUNT = option(0, "seed of the further wordings")
    dry_run: bool = option(False, "print what would change, with every example, and stop")


@dataclasses.dataclass
class ExamplesOptions(LedgerOptions):
    """Let the model write further examples of a policy's rules, on both sides alike, for a person to read and edit."""

    policy: str = option("policy.yaml", "YAML file with the rules, as recipes/policy/policy.yaml")
    to: str = option("policy_more.yaml", "policy file to write, with these examples after the rule's own")
    count: POSITIVE = option(5, "further examples of each side of a rule, at most")
    seed: COUNT = option(0, "seed of the model's words")


@dataclasses.dataclass
class StatusOptions(LedgerOptions):
    """Print the requests, the state that meets them, and what it measured."""


@dataclasses.dataclass
class VerifyOptions(LedgerOptions):
    """Check the ledger, the texts, and the newest model against what was noted."""

    export: OptionalText = option(
        None, "JSON file of an export: it finds missing last entries, and a chain that was written anew from the start"
    )


@dataclasses.dataclass
class ExportOptions(LedgerOptions):
    """Write what an auditor may see as a page and as JSON: no text of a request is in it."""

    to: str = option("export", "folder of export.html and export.json")


@dataclasses.dataclass
class FindOptions:
    """List the rows that name a person or quote a text."""

    found: OptionalText = option(None, "also write the rows that were found to this file, as a request takes them")
    rest: OptionalText = option(None, "also write the other rows to this file")
    near: bool = option(False, "write near findings to --found as well, not to --rest")
