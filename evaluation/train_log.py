"""Read the log of a run, for the curves on the page: which terms it minimised, and their values at every step."""

from __future__ import annotations

import dataclasses

from utils import UsageError, read_json_lines


@dataclasses.dataclass(frozen=True)
class LoggedTerm:
    """One term of a run's objective, as its "objective" event describes it.

    field: of the `step` events that holds its value. measure: what the value is, such as "nll" or "kl".
    better: which way it goes if the run succeeds, such as "rises"; "" if the log does not say.
    """

    name: str
    field: str
    measure: str
    better: str = ""


# Logs without an "objective" event come from runs of these three terms.
TERMS_WITHOUT_EVENT = (LoggedTerm("forget", "bad_loss", "nll", "rises"), LoggedTerm("mismatch", "random_loss", "nll"),
                       LoggedTerm("retain", "normal_loss", "kl"))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TrainLog:
    """The terms of a run and its `step` and `eval` events; all empty if no log is named."""

    terms: list[LoggedTerm] = dataclasses.field(default_factory=list)
    steps: list[dict] = dataclasses.field(default_factory=list)
    evals: list[dict] = dataclasses.field(default_factory=list)


def read_train_log(path: str | None) -> TrainLog:
    """Return the JSON-lines log of a run; an empty one if `path` is None. Raises UsageError if it is not such a log."""
    if not path:
        return TrainLog()
    try:
        events = read_json_lines(path)
        steps, evals = ([event for event in events if event["event"] == kind] for kind in ("step", "eval"))
        terms = read_terms(events)
        for event in steps:
            check_step(event, terms or TERMS_WITHOUT_EVENT, fields_may_lack=bool(terms))
        return TrainLog(terms or list(TERMS_WITHOUT_EVENT), steps, evals)
    except OSError as error:
        raise UsageError(f"--train_log {path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"--train_log {path}: is not the log in JSON lines, x.jsonl ({error})") from error


def read_terms(events: list[dict]) -> list[LoggedTerm]:
    """Return the terms of the "objective" event, one per field; a resumed run wrote the event again, and the later one
    counts. Raises KeyError or TypeError for an event of another form."""
    terms = {}
    for event in events:
        for term in event["terms"] if event["event"] == "objective" else ():
            terms[term["field"]] = LoggedTerm(term["name"], term["field"], term["measure"], term.get("better") or "")
    return list(terms.values())


def check_step(event: dict, terms, *, fields_may_lack: bool) -> None:
    """Check that a `step` event has a number and that its terms are numbers; null stands for nothing measured."""
    if not isinstance(event["step"], int):
        raise TypeError(f"step {event['step']!r} is no number")
    for term in terms:
        value = event.get(term.field) if fields_may_lack else event[term.field]
        if value is not None and not isinstance(value, int | float):
            raise TypeError(f"{term.field} {value!r} is no number")
