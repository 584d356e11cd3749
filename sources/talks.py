"""Read talks: OpenAI's messages, ShareGPT's conversations, TRL's lists of turns, Anthropic's text of two speakers."""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

from sources.containers import Record
from sources.values import is_missing, listed, text_of
from utils import UsageError

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "ai": "assistant",
}  # fmt: skip
SPOKEN_IN_TURN = ("conversations", "conversation", "dialogue", "dialog")  # LIMA's hold texts alone, user and model
Turns = list[tuple[str, str]]  # (system, user or assistant; text)
_SPOKEN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


class Talk(NamedTuple):
    """A talk: its last user turn is the prompt, the assistant's turn after it the answer."""

    earlier: tuple[tuple[str, str], ...]
    prompt: str
    answer: str | None


def read_turns(value, record: Record, field: str) -> Turns:
    """Return the turns of a talk. Raises UsageError for what is no list of turns and for roles that are not known."""
    value = listed(value, record, field)
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, str) and len(spoken := _SPOKEN.split(value)) > 1 and not spoken[0].strip():
        speakers, texts = spoken[1::2], spoken[2::2]
        return [(ROLES[name.lower()], text_of(text, record, field)) for name, text in zip(speakers, texts, strict=True)]
    if field.lower() in SPOKEN_IN_TURN and isinstance(value, list) and all(isinstance(turn, str) for turn in value):
        roles = itertools.cycle(("user", "assistant"))
        return [(role, text_of(text, record, field)) for role, text in zip(roles, value, strict=False)]
    if not isinstance(value, list | tuple) or not all(isinstance(turn, dict) for turn in value):
        raise UsageError(f"{record}: field '{field}' must be a list of turns, each with role and content")
    turns = []
    for number, turn in enumerate(value, 1):
        name = turn.get("role") or turn.get("from") or turn.get("speaker")
        role = ROLES.get(str(name).strip().lower())
        if role is None:
            raise UsageError(f"{record}: turn {number} of '{field}' has the role {name!r:.40}; only system, user and "
                             "assistant are read")  # fmt: skip
        content = next((turn[key] for key in ("content", "value", "text") if turn.get(key) is not None), "")
        turns.append((role, _content(content, record, f"{field}, turn {number}")))
    return turns


def _content(value, record: Record, field: str) -> str:
    """Return a turn's text, which may stand in parts: [{"type": "text", "text": ...}]."""
    if not isinstance(value, list):
        return text_of(value, record, field)
    parts = [part.get("text") if isinstance(part, dict) else part for part in value]
    if not all(isinstance(part, str) for part in parts):
        raise UsageError(f"{record}: field '{field}' holds a part that is no text")
    return text_of("".join(parts), record, field)


def is_turns(value) -> bool:
    """Return whether a value is a list of turns."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and bool(
        value[0].keys() & {"role", "from", "speaker"})  # fmt: skip


def whole_talk(prompt, answer, record: Record, prompt_field: str, answer_field: str) -> Turns:
    """Return the turns of a prompt and its answer. Each is text or a list of turns; the answer's may repeat the
    prompt's."""
    turns = [] if is_missing(prompt) else (
        [("user", text_of(prompt, record, prompt_field))] if isinstance(prompt, str)
        else read_turns(prompt, record, prompt_field))  # fmt: skip
    if is_missing(answer):
        return turns
    if isinstance(answer, str) and turns:
        return [*turns, ("assistant", text_of(answer, record, answer_field))]
    added = read_turns(answer, record, answer_field)
    if any(role == "user" for role, _ in added):
        has_system = any(role == "system" for role, _ in added)
        turns = [] if has_system else [turn for turn in turns if turn[0] == "system"]
    return turns + added


def split_talk(turns: Turns, record: Record, field: str) -> Talk:
    """Return a talk's prompt, its answer if it has one, and the turns before. Turns of one role in a row are one."""
    merged: Turns = []
    for role, text in turns:
        if merged and merged[-1][0] == role:
            merged[-1] = (role, "\n\n".join(filter(None, (merged[-1][1], text))))
        else:
            merged.append((role, text))
    place = max((i for i, (role, _) in enumerate(merged) if role == "user"), default=None)
    if place is None or not merged[place][1]:
        raise UsageError(f"{record}: field '{field}' has no user turn with text")
    after = merged[place + 1 :]
    earlier = [turn for turn in merged[:place] + [turn for turn in after if turn[0] == "system"] if turn[1]]
    answer = "\n\n".join(text for role, text in after if role == "assistant")
    return Talk(tuple(earlier), merged[place][1], answer or None)
