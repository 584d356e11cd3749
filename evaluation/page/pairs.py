"""Six pairs of answers that stand for all: on each side the two worst and a typical one, chosen by rule."""

from __future__ import annotations

import dataclasses

from evaluation.groups import PUBLISHED_NAME, unseen_groups

SHOWN_CHARACTERS = 260  # of a text in a pair; the rest can be unfolded
MODELS = ("before", "after", "retrained")


@dataclasses.dataclass(frozen=True)
class ClampedText:
    """A text of which the beginning is shown. `rest` is empty if all of it is."""

    start: str
    rest: str


@dataclasses.dataclass(frozen=True)
class ShownAnswer:
    """One model's answer in a pair."""

    model: str
    label: str
    text: ClampedText


@dataclasses.dataclass(frozen=True)
class Pair:
    """The answers to one prompt. `rank`: "worst" or "typical"; `reason`: why this line was chosen. `earlier`: how many
    turns stand before the prompt."""

    side: str
    rank: str
    reason: str
    group: str
    language: str
    earlier: int
    prompt: ClampedText
    answers: list[ShownAnswer]


def models_of(report: dict) -> list[str]:
    """Return the models that have figures: before, after and, if one was named, retrained."""
    return [model for model in MODELS if model != "retrained" or report.get("retrained")]


def is_harm(report: dict) -> bool:
    """Return whether harm is what was to be forgotten: a forget group of prompts that came without an answer."""
    return any(group["side"] == "forget" and group["counts"] and not group["text"] and group["judge"] != "reference"
               for group in report["groups"])  # fmt: skip


def shown_groups(report: dict) -> list[dict]:
    """Return the groups that the page shows. The published prompt asks for harm: elsewhere it says nothing."""
    return [group for group in report["groups"] if is_harm(report) or not group["name"].startswith(PUBLISHED_NAME)]


def example_pairs(report: dict, lines: list[dict]) -> list[Pair]:
    """Return up to six pairs: of each side the two worst, of two groups if there are two, then a typical one."""
    groups = {group["name"]: group for group in report["groups"] if group["counts"]}
    unseen = set(unseen_groups(name for name, group in groups.items() if group["side"] == "forget"))
    pairs = []
    for side in ("forget", "keep"):
        of_side = [line for line in lines if line["side"] == side and line["group"] in groups
                   and (side == "keep" or line["group"] in unseen)]  # fmt: skip
        of_side = [line for line in of_side if groups[line["group"]]["judged"]] or of_side
        order = sorted(of_side, key=badness, reverse=True)  # stable: of equals, the earlier row
        for rank, line in chosen_lines(order):
            reason = worst_reason(line) if rank == "worst" else "the middle of all rows, from worst to best"
            pairs.append(make_pair(line, rank, reason, groups[line["group"]].get("language") or ""))
    return pairs


def badness(line: dict) -> tuple:
    """Return a line's place in the order from worst to best. Forget side: still answered, then how much of it is
    like the reference, else like the answer before. Keep side: lost, then least like the answer before."""
    alike = line.get("similarity") or 0.0
    if line["side"] == "keep":
        return is_lost(line), -alike
    recall = line["after"].get("recall")
    return bool(line["after"].get("answered")), alike if recall is None else recall


def is_lost(line: dict) -> bool:
    """Return whether a prompt that was answered before is not answered after."""
    return bool(line["before"].get("answered")) and line["after"].get("answered") is False


def chosen_lines(order: list[dict]) -> list[tuple[str, dict]]:
    """Return (rank, line) of the two worst lines and of the middle one, none of them twice."""
    if not order:
        return []
    second = next((line for line in order if line["group"] != order[0]["group"] and is_bad(line)), None)
    second = second or next(iter(order[1:]), None)
    worst = [line for line in (order[0], second) if line is not None]
    middle = order[len(order) // 2]
    typical = [] if any(middle is line for line in worst) else [middle]
    return [("worst", line) for line in worst] + [("typical", line) for line in typical]


def is_bad(line: dict) -> bool:
    """Return whether a line counts against the model."""
    return is_lost(line) if line["side"] == "keep" else bool(line["after"].get("answered"))


def worst_reason(line: dict) -> str:
    """Return why a line is among the worst of its side."""
    if is_bad(line):
        return "no longer answered" if line["side"] == "keep" else "still answered"
    how = f"{'least' if line['side'] == 'keep' else 'most'} like the {compared(line)}"
    if line["after"].get("answered") is None:
        return f"not judged; {how}"
    return how if line["side"] == "keep" else f"not answered; {how}"


def compared(line: dict) -> str:
    """Return what `badness` compares a line's answer with."""
    is_reference = line["side"] == "forget" and line["after"].get("recall") is not None
    return "reference" if is_reference else "answer before"


def make_pair(line: dict, rank: str, reason: str, language: str) -> Pair:
    """Return a line as the page shows it."""
    answers = [ShownAnswer(model, label_of(line[model]), clamp(line[model]["answer"]))
               for model in MODELS if model in line]  # fmt: skip
    return Pair(line["side"], rank, reason, line["group"], language, len(line.get("earlier") or ()),
                clamp(line["prompt"]), answers)  # fmt: skip


def label_of(answer: dict) -> str:
    """Return what the deciding judge said of an answer, or that it said nothing."""
    return answer["label"] or ("empty" if answer.get("empty") else "not judged")


def clamp(text: str, count: int = SHOWN_CHARACTERS) -> ClampedText:
    """Return a text cut at a space near `count` characters; a little more than that is shown whole."""
    if len(text) <= count * 1.25:
        return ClampedText(text, "")
    space = text.rfind(" ", int(count * 0.8), count)
    cut = count if space < 0 else space
    return ClampedText(text[:cut], text[cut:].lstrip())
