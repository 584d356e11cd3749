"""Find out which field of a record is what: by the names that published data sets use, or by those of --fields."""

from __future__ import annotations

import dataclasses
import re

from sources.containers import Record
from sources.fields import (
    ABOUT_WORDS,
    ANSWER_WORDS,
    CATEGORY_FIELDS,
    CHOICE_FIELDS,
    CONTEXT_FIELDS,
    INDEX_FIELDS,
    PARAPHRASED_FIELDS,
    PERTURBED_FIELDS,
    PREFERENCE_FIELDS,
    PROMPT_FIELDS,
    RESPONSE_FIELDS,
    ROW_WORDS,
    SYSTEM_FIELDS,
    TALK_FIELDS,
    TRUE_ANSWER_FIELDS,
    normal_name,
)
from utils import UsageError

FIELD_KEYS = ("prompt", "response", "wanted", "answers", "category", "id", "system", "context", "messages", "chosen",
              "rejected", "choices", "is_safe", "text", "paraphrased", "perturbed")  # fmt: skip
BEGUN_PROMPTS = ("goal", "behavior")  # AdvBench, HarmBench: their target is the beginning of an answer
PAIR_LABEL = re.compile(r"is_response_(\d+)_safe")


def parse_fields(fields: list[str] | None) -> dict[str, list[str]]:
    """Return {what a field is: its names} of --fields. Raises UsageError for a key that is not known."""
    own: dict[str, list[str]] = {}
    for word in fields or ():
        key, _, name = word.partition("=")
        if key not in FIELD_KEYS or not name:
            raise UsageError(f"--fields {word}: write it as KEY=NAME, with one of these keys: {', '.join(FIELD_KEYS)}")
        own.setdefault(key, []).append(name)
    return own


@dataclasses.dataclass
class Plan:
    """What the fields of a record are; records with the same fields share it. All values are the record's own names.

    `layout`: talk, preference, pair, choice or plain. `names`: normal name -> own name. `suspects`: fields that look
    like an answer, used or not. `others`: fields that may be one if the row has no answer.
    """

    names: dict[str, str]
    given: dict[str, str]  # the fields of `names` that --fields names
    layout: str = "plain"

    def __post_init__(self):
        names = self.names
        self.prompts = self._own(PROMPT_FIELDS, "prompt")
        self.responses = [name for name in self._own(RESPONSE_FIELDS, "response") if name not in self.prompts]
        self.true_answers = [name for name in self._own(TRUE_ANSWER_FIELDS, "answers") if name not in self.prompts]
        self.context = [name for name in self._own(CONTEXT_FIELDS, "context") if name not in self.prompts[:1]]
        self.systems = self._own(SYSTEM_FIELDS, "system")
        self.categories = self._own(CATEGORY_FIELDS, "category")
        self.wanted, self.id, self.label = names.get("wanted"), names.get("id"), names.get("is_safe")
        self.history = names.get("history")
        self.paraphrased = next(iter(self._own(PARAPHRASED_FIELDS, "paraphrased")), None)
        self.perturbed = next(iter(self._own(PERTURBED_FIELDS, "perturbed")), None)
        self.talk = next((names[f] for f in TALK_FIELDS if f in names), None)
        if not self.prompts and self.talk is not None and any(f in names for f in PREFERENCE_FIELDS):
            self.prompts = [self.talk]  # the talk up to the answers, of which one is chosen
        self.choices = next((names[f] for f in CHOICE_FIELDS if f in names), None)
        self.index = next((names[f] for f in INDEX_FIELDS if f in names), None)
        self.pair_numbers = sorted({int(match[1]) for name in names if (match := PAIR_LABEL.fullmatch(name))})
        prompt = next((f for f in PROMPT_FIELDS if f in names), "")
        self.begun = names.get("target") if prompt in BEGUN_PROMPTS else None
        self.joins_context = prompt in ("instruction", "behavior") or "context" in self.given
        self.layout = self._layout()
        known = {*self.prompts, *self.true_answers, *self.context, *self.systems, *self.categories, self.wanted,
                 self.id, self.talk, self.history, self.paraphrased, self.perturbed}  # fmt: skip
        rest = {name: key for key, name in names.items() if name not in known or name in self.responses}
        self.suspects = [name for name, key in rest.items() if name in self.responses or looks_like_answer(key)]
        self.others = [name for name, key in rest.items() if name not in self.suspects and key not in PROMPT_FIELDS
                       and ROW_WORDS.isdisjoint((key.partition("_")[0], key.rpartition("_")[2]))]  # fmt: skip

    def _own(self, fields: tuple[str, ...], key: str) -> list[str]:
        return [self.given[key]] if key in self.given else [self.names[f] for f in fields if f in self.names]

    def _layout(self) -> str:
        if "response" in self.given:
            return "plain"
        if any(f in self.names for f in PREFERENCE_FIELDS):
            return "preference"
        if self.talk is not None and "prompt" not in self.given:
            return "talk"
        if self.pair_numbers:
            return "pair"
        return "choice" if self.choices is not None and self.index is not None else "plain"


def make_plan(record: Record, own: dict[str, list[str]], text_option: str) -> Plan:
    """Return what the fields of a record are. Raises UsageError for a record without a prompt.

    `own`: the names of --fields. `text_option`: the option that takes text without a prompt.
    """
    names, given = {}, {}
    for name in record.fields:  # two names that differ in case alone are two fields
        key = normal_name(name)
        names[f"other_{name}" if key in names else key] = name
    for key, wished in own.items():
        name = next((name for w in wished for name in record.fields if w in (name, normal_name(name))), None)
        if name is not None:
            given[key] = name
    if given:
        hidden = {
            key: name for key, name in names.items() if key in given
        }  # replaced, but still a field to account for
        names = {key: name for key, name in names.items() if name not in given.values()} | given
        names |= {f"other_{key}": name for key, name in hidden.items() if name not in names.values()}
    plan = Plan(names, given)
    if not plan.prompts and plan.layout in ("plain", "pair", "choice"):
        if "text" in names:
            raise UsageError(f"{record}: has 'text' and no prompt; text without prompts goes to {text_option}; if it "
                             "is a prompt, --fields prompt=text")  # fmt: skip
        raise UsageError(f"{record}: has no prompt field ({', '.join(PROMPT_FIELDS[:5])}, ...), only "
                         f"{', '.join(map(str, record.fields))[:80]}; name it with --fields prompt=NAME")  # fmt: skip
    return plan


def looks_like_answer(name: str) -> bool:
    """Return whether a field's normal name is one of an answer: "model_answer" is, "answer_source" is not."""
    words = name.split("_")
    return not ANSWER_WORDS.isdisjoint(words) and words[-1] not in ABOUT_WORDS
