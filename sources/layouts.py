"""Turn records into rows, a method a layout, and count the answers that no row uses."""

from __future__ import annotations

import collections
import dataclasses

from sources.containers import Record
from sources.fields import TALK_FIELDS, normal_name
from sources.plan import Plan, make_plan
from sources.talks import Talk, is_turns, read_turns, split_talk, whole_talk
from sources.types import Row
from sources.values import (
    answers_of,
    category_of,
    choices_of,
    holds_text,
    is_missing,
    listed,
    text_of,
    texts_of,
    truth_of,
)
from utils import UsageError

FORGET_OPTIONS = ("--forget_data", "--unseen_data", "--rows", "--holdout")  # the last two: of a request to forget


class RowMaker:
    """Makes the rows of one source on one side.

    `unused`: field that looks like an answer -> rows that do not use it. `fields`: every field that a record had.
    """

    def __init__(self, source: str, option: str, own: dict[str, list[str]]):
        self.source = source
        self.own = {key: names for key, names in own.items() if key != "text"}
        self.is_forget = option in FORGET_OPTIONS
        self.unused: collections.Counter[str] = collections.Counter()
        self.fields: dict[str, None] = {}
        self._unused_context: collections.Counter[str] = collections.Counter()
        self._plans: dict[tuple, Plan] = {}
        self._categories: dict[str, str] = {}  # one string for each category
        self._other_side = 0  # answers whose label is of the other side
        self._safe: dict[str, str] = {}  # prompt -> its first safe answer
        self._makers = {"plain": self._plain, "talk": self._talk, "preference": self._preference,
                        "pair": self._pair, "choice": self._choice}  # fmt: skip

    def rows(self, record: Record) -> list[Row]:
        """Return the rows of one record, usually one."""
        names = tuple(record.fields)
        plan = self._plans.get(names)
        if plan is None:
            self.fields.update(dict.fromkeys(names))
            plan = make_plan(record, self.own, "--forget_text" if self.is_forget else "--normal_text")
            self._plans[names] = plan
        return self._makers[plan.layout](record, plan)

    def has_field(self, names: list[str]) -> bool:
        """Return whether a record had a field of one of these names."""
        return any(name in (field, normal_name(field)) for name in names for field in self.fields)

    def finish(self, rows: list[Row]) -> list[str]:
        """Give forget rows the safe answers to their prompts, in place; return notes, a line each."""
        if self._safe:
            for i, row in enumerate(rows):
                if row.labelled and row.wanted is None:
                    rows[i] = dataclasses.replace(row, wanted=self._safe.get(_same(row.prompt)))
        notes = []
        if with_others := sum(row.paraphrased is not None or bool(row.perturbed) for row in rows):
            notes.append(f"{with_others} rows have paraphrased or perturbed answers: they are used for the truth ratio "
                         "of an evaluation, and are not trained on")  # fmt: skip
        if self._other_side and self.is_forget:
            answered = [row for row in rows if row.labelled and row.wanted]
            wanted = len({(_same(row.prompt), row.wanted) for row in answered})
            notes.append(f"of {self._other_side} safe answers, {wanted} are the wanted answers of {len(answered)} "
                         f"forget rows and {self._other_side - wanted} are not used on this side")  # fmt: skip
        elif self._other_side:
            notes.append(f"{self._other_side} unsafe answers are not normal rows")
        for name, count in self._unused_context.items():
            notes.append(
                f"field '{name}' of {count} rows is not part of their prompts; --fields context={name} adds it"
            )
        return notes

    # ------------------------------------------------------------------------------------------- layouts
    def _plain(self, record: Record, plan: Plan) -> list[Row]:
        """A prompt and its answer, each in its field, perhaps with a label, safe or unsafe (BeaverTails)."""
        fields = record.fields
        used, answers, turns = None, [], None
        for name in plan.responses:
            value = fields[name]
            if is_turns(value):
                used, turns = name, value
                break
            if answers := self._true_answers(record, plan, name):
                used = name
                break
        prompt_field, prompt = _prompt(record, plan)
        if turns is None and not isinstance(prompt, list):
            talk = Talk((), self._prompt_text(record, plan), answers[0] if answers else None)
        else:
            answer = turns if turns is not None else answers[0] if answers else None
            talk = split_talk(whole_talk(prompt, answer, record, prompt_field, used or ""), record, prompt_field)
            answers = answers or ([talk.answer] if talk.answer else [])
        more = [
            answer for name in plan.true_answers if name != used for answer in self._true_answers(record, plan, name)
        ]
        if more:
            answers = list(dict.fromkeys(answers + more))
        is_safe = None if plan.label is None else truth_of(fields[plan.label], record, plan.label)
        if is_safe is not None and is_safe == self.is_forget:
            self._keep_other_side(talk.prompt, talk.answer)
            return []
        is_begun = used is not None and used == plan.begun
        self._count_unused(record, plan, (used,), bool(talk.answer))
        return [self._row(record, plan, talk, true_answers=() if is_begun else tuple(answers), complete=not is_begun,
                          labelled=is_safe is not None)]  # fmt: skip

    def _talk(self, record: Record, plan: Plan) -> list[Row]:
        """A whole talk in one field (OpenAI's messages, ShareGPT's conversations)."""
        field = next(name for f in TALK_FIELDS if (name := plan.names.get(f)) is not None)
        value = listed(record.fields[field], record, field)
        if plan.prompts and not isinstance(value, list):  # no talk: nothing, or a word such as the kind of a chat
            return self._plain(record, plan)
        talk = split_talk(read_turns(value, record, field), record, field)
        self._count_unused(record, plan, (), bool(talk.answer))
        return [self._row(record, plan, talk, true_answers=(talk.answer,) if talk.answer else ())]

    def _preference(self, record: Record, plan: Plan) -> list[Row]:
        """A chosen and a rejected answer. On the forget side, rejected is what goes and chosen is wanted; on the normal
        side, chosen is the answer."""
        prompt_field, prompt = _prompt(record, plan) if plan.prompts else ("", None)
        if isinstance(prompt, str):
            prompt = self._prompt_text(record, plan)
        talks: dict[str, Talk] = {}
        for field in ("chosen", "rejected"):
            answer = record.fields.get(plan.names.get(field))
            if holds_text(answer):
                turns = whole_talk(prompt, answer, record, prompt_field, field)
                talks[field] = split_talk(turns, record, field)
        side = "rejected" if self.is_forget else "chosen"
        if side in talks:
            talk = talks[side]
        elif not is_missing(prompt):
            talk = split_talk(whole_talk(prompt, None, record, prompt_field, side), record, prompt_field)
        elif talks:
            talk = next(iter(talks.values()))._replace(answer=None)
        else:
            raise UsageError(f"{record}: has neither a prompt nor a chosen or rejected answer")
        if not self.is_forget:
            self._count_unused(record, plan, (plan.names.get("chosen"),), bool(talk.answer))
            return [self._row(record, plan, talk, true_answers=(talk.answer,) if talk.answer else ())]
        self._count_unused(record, plan, (plan.names.get("rejected"), plan.names.get("chosen")), bool(talk.answer))
        return [self._row(record, plan, talk, wanted=talks["chosen"].answer if "chosen" in talks else None)]

    def _choice(self, record: Record, plan: Plan) -> list[Row]:
        """A question with its choices and the index or letter of the right one (MMLU, WMDP)."""
        if is_missing(record.fields[plan.choices]):
            return self._plain(record, plan)
        choices, index = choices_of(record)
        talk = Talk((), self._prompt_text(record, plan), choices[index] or None)
        self._count_unused(record, plan, (plan.index, plan.choices), bool(talk.answer))
        return [self._row(record, plan, talk, true_answers=(talk.answer,) if talk.answer else ())]

    def _pair(self, record: Record, plan: Plan) -> list[Row]:
        """Several answers, each with its label, safe or unsafe (PKU-SafeRLHF)."""
        prompt, rows, wanted, used = self._prompt_text(record, plan), [], None, []
        for number in range(max(plan.pair_numbers[-1], 1) + 1):
            label, response = f"is_response_{number}_safe", f"response_{number}"
            for field in (label, response):
                if field not in plan.names:
                    raise UsageError(f"{record}: is a pair of responses without '{field}'")
            used.append(plan.names[response])
            answers = answers_of(record.fields[plan.names[response]], record, response)
            answer = answers[0] if answers else None
            if truth_of(record.fields[plan.names[label]], record, label) == self.is_forget:
                self._keep_other_side(prompt, answer)
                wanted = wanted or answer
            else:
                rows.append((answer, record.fields.get(plan.names.get(f"response_{number}_harm_category"))))
        self._count_unused(record, plan, used, True)
        return [
            self._row(record, plan, Talk((), prompt, answer), category=category_of(category), labelled=True,
                      wanted=wanted if self.is_forget else None)
            for answer, category in rows
        ]  # fmt: skip

    # --------------------------------------------------------------------------------------------- parts
    def _prompt_text(self, record: Record, plan: Plan) -> str:
        """Return a prompt that is text, with the text that it is about where the layout has one (Alpaca, Dolly)."""
        field, value = _prompt(record, plan)
        prompt = text_of(value, record, field)
        if not prompt:
            raise UsageError(f"{record}: field '{field}' is empty")
        for name in plan.context:
            if name != field and holds_text(record.fields[name]):
                if plan.joins_context:
                    return f"{prompt}\n\n{text_of(record.fields[name], record, name)}"
                self._unused_context[name] += 1
        return prompt

    def _true_answers(self, record: Record, plan: Plan, name: str) -> list[str]:
        """Return the answers in a field; TruthfulQA.csv separates them by semicolons."""
        value = record.fields[name]
        if isinstance(value, str) and name in plan.true_answers:
            value = listed(value, record, name)
            if isinstance(value, str):
                value = value.split(";")
        return answers_of(value, record, name)

    def _earlier(self, record: Record, plan: Plan) -> tuple[tuple[str, str], ...]:
        """Return the system message and the earlier turns that stand in fields of their own."""
        system = next((name for name in plan.systems if holds_text(record.fields[name])), None)
        turns = [] if system is None else [("system", text_of(record.fields[system], record, system))]
        history = listed(record.fields.get(plan.history), record, plan.history)
        if isinstance(history, str) and holds_text(history):
            self._unused_context[plan.history] += 1
        for pair in history if isinstance(history, list) else ():
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise UsageError(f"{record}: field '{plan.history}' must be a list of [question, answer]")
            asked, answered = (text_of(text, record, plan.history) for text in pair)
            turns += [("user", asked), ("assistant", answered)]
        return tuple(turns)

    def _keep_other_side(self, prompt: str, answer: str | None) -> None:
        """Count an answer whose label is of the other side; a safe one may be a forget row's wanted answer."""
        self._other_side += 1
        if self.is_forget and answer:
            self._safe.setdefault(_same(prompt), answer)

    def _count_unused(self, record: Record, plan: Plan, used, has_answer: bool) -> None:
        """Count the fields that look like an answer and are not used."""
        for name in plan.suspects:
            if name not in used and name not in plan.true_answers and holds_text(record.fields[name]):
                self.unused[name] += 1
        if not has_answer:
            for name in plan.others:
                if isinstance(record.fields[name], str | list) and holds_text(record.fields[name]):
                    self.unused[name] += 1

    def _row(self, record: Record, plan: Plan, talk: Talk, category=None, wanted=None, **more) -> Row:
        fields, earlier = record.fields, talk.earlier
        if category is None:
            category = next((c for name in plan.categories if (c := category_of(fields[name]))), "")
        if wanted is None and plan.wanted is not None and not is_missing(fields[plan.wanted]):
            wanted = text_of(fields[plan.wanted], record, plan.wanted) or None
        row_id = fields[plan.id] if plan.id is not None else None
        if plan.paraphrased is not None:
            more["paraphrased"] = next(iter(texts_of(fields[plan.paraphrased], record, plan.paraphrased)), None)
        if plan.perturbed is not None:
            more["perturbed"] = tuple(texts_of(fields[plan.perturbed], record, plan.perturbed))
        if plan.systems or plan.history:
            earlier = self._earlier(record, plan) + earlier
        return Row(talk.prompt, talk.answer, self._categories.setdefault(category, category),
                   "" if is_missing(row_id) else str(row_id), self.source, wanted=wanted, earlier=earlier,
                   **more)  # fmt: skip


def _prompt(record: Record, plan: Plan) -> tuple[str, object]:
    """Return (field, value) of the prompt: the first prompt field that has a value."""
    for name in plan.prompts:
        if not is_missing(value := record.fields[name]):
            return name, value
    return plan.prompts[0], record.fields[plan.prompts[0]]


def _same(prompt: str) -> str:
    """Return a prompt without case and spacing: prompts that agree in it are the same."""
    return " ".join(prompt.casefold().split())
