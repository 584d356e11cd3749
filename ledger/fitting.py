"""What the next state is fitted to, and from where: worked out from the ledger alone.

A state goes on from the adapter of the one before while requests are only added; the earlier ones are rehearsed in
every step. It is fitted anew, from the first original, when one was withdrawn, when the drift budget is used up, and
after so many additions, since what is piled up is worth less than what is fitted at once.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Optional

from ledger.book import Book, Request
from options import COUNT, POSITIVE, SHARE, WEIGHT, number, option
from utils import UsageError

TOKENS_A_WORD = 1.4  # of English, roughly
Part = number(float, 0, 0.9, above=True)
OptionalWeight = Optional[WEIGHT]  # noqa: UP045 - a check is a function, which knows no |


@dataclasses.dataclass(frozen=True)
class FittingSettings:
    """How states follow each other: the section `states` of a ledger's file of settings."""

    update_share: Part = option(0.3, "steps of a state that goes on, as a part of max_unlearn_steps, at least")
    rehearsed: SHARE = option(0.5, "part of a step's forget rows that is of earlier requests, in a state that goes on")
    visits: POSITIVE = option(4, "times that a row is visited at least: each in a new fit, else the new ones")
    refit_every: COUNT = option(8, "additions after which a state is fitted anew (0: never for that reason)")
    drift_budget: OptionalWeight = option(
        None, "nats; KL from the first original beyond which the next state is fitted anew (none: no such bound)"
    )
    keep: POSITIVE = option(2, "states whose models are kept")


@dataclasses.dataclass(frozen=True)
class Fitting:
    """The next state. requests: ids that it is fitted to, those of destroyed text included; new: those among them that
    the state before was not fitted to; start: the state that it goes on from, None if it is fitted anew; lost: in
    force, and their text is destroyed, so that a state fitted anew is without them."""

    state: int
    requests: tuple[str, ...]
    new: tuple[str, ...]
    start: int | None
    why: str
    lost: tuple[str, ...] = ()

    @property
    def is_original(self) -> bool:
        """Whether nothing is in force: the state is the original itself."""
        return not self.requests


def next_fitting(book: Book, settings: FittingSettings, *, refit: bool = False) -> Fitting | None:
    """Return the next state, or None if the newest one meets every request. refit: fit it anew whatever was asked."""
    if not book.open() and not refit:
        return None
    last = book.state
    standing = [request for request in book.in_force() if not request.lost]
    fitted = set(last["requests"]) if last else set()
    new = tuple(request.id for request in standing if request.id not in fitted)
    number_of_state = last["state"] + 1 if last else 1
    why = _why_anew(book, settings, standing, new, refit=refit)
    if why is None:
        return Fitting(number_of_state, tuple(r.id for r in standing), new, last["state"], "requests were added")
    lost = tuple(request.id for request in standing if request.shredded)
    kept = tuple(request.id for request in standing if not request.shredded)
    return Fitting(number_of_state, kept, new, None, why, lost)


def _why_anew(book: Book, settings: FittingSettings, standing: list[Request], new, *, refit: bool) -> str | None:
    """Return why the next state is fitted anew, or None if it goes on from the last one."""
    last = book.state
    if last is None or not last["requests"]:
        return "there is no state to go on from"
    if refit:
        return "--refit"
    if gone := set(last["requests"]) - {request.id for request in standing}:
        return f"withdrawn: {', '.join(sorted(gone))}"
    if settings.drift_budget is not None and last["drift"] is not None and last["drift"] > settings.drift_budget:
        return f"the drift {last['drift']:.4f} is past states.drift_budget {settings.drift_budget:g}"
    since = 0
    for state in reversed(book.states):
        if state["start"] is None:
            break
        since += len(state["new"])
    if settings.refit_every and since + len(new) > settings.refit_every:
        return f"states.refit_every: {since} requests were added since the last state that was fitted anew"
    return None


def refuse_loss(fitting: Fitting, *, confirmed: bool) -> None:
    """Raise UsageError if requests of destroyed text would be lost, unless that is confirmed."""
    if fitting.lost and not confirmed:
        raise UsageError(f"{len(fitting.lost)} requests would come back, since their text is destroyed and the state "
                         f"is fitted anew ({fitting.why}): {', '.join(fitting.lost)}; add them again first, or pass "
                         "--confirm_loss")  # fmt: skip


def sources_of(book: Book, fitting: Fitting, settings: FittingSettings) -> dict[str, list[str]]:
    """Return {"forget_data", "forget_text", "allowed": files} of a state's run; allowed: rows that requests come with
    and that stay. Sources of a side take turns in a step, so new ones, or earlier ones, are listed as often as gives
    earlier ones about the share `rehearsed`."""
    there = [name for name in fitting.requests if not book.requests[name].shredded]
    earlier = [name for name in there if name not in fitting.new] if fitting.start is not None else []
    new = [name for name in there if name not in earlier]
    times_earlier = times_new = 1
    if earlier and new and settings.rehearsed:
        ratio = len(earlier) * (1 - settings.rehearsed) / (settings.rehearsed * len(new))  # of the new ones' listings
        times_new, times_earlier = max(1, round(ratio)), max(1, round(1 / ratio))
    elif new:
        earlier = []
    listed = earlier * times_earlier + new * times_new
    found = {option_name: [str(book.file_of(n)) for n in listed if book.requests[n].added["is_text"] is is_text]
             for option_name, is_text in (("forget_data", False), ("forget_text", True))}  # fmt: skip
    found["allowed"] = [str(path) for name in there if (path := book.beside(name, "allowed"))]
    return found


def steps_of(
    book: Book, fitting: Fitting, settings: FittingSettings, steps: int, batch_size: int, stride: int
) -> int:  # fmt: skip
    """Return the steps of a state's run, so many that each row which has to be learned is visited `visits` times.

    Sources take turns, so one of many that is listed once has few rows of each step. steps, batch_size, stride (tokens
    from passage to passage): of the recipe.
    """
    files = [file for name in ("forget_data", "forget_text") for file in sources_of(book, fitting, settings)[name]]
    wanted = fitting.new if fitting.start is not None else fitting.requests
    needed = []
    for name in wanted:
        if not book.requests[name].shredded:  # a file that is listed twice is gone through in two orders
            visits = math.ceil(settings.visits / files.count(str(book.file_of(name))))
            needed.append(_visited(book, name, stride) * visits * len(files))
    least = math.ceil(max(needed, default=0) / batch_size)
    return max(1, least, steps if fitting.start is None else math.ceil(settings.update_share * steps))


def _visited(book: Book, name: str, stride: int) -> int:
    """Return how many rows a request has, or about how many passages its texts are cut into."""
    rows = book.rows_of(name)
    if not book.requests[name].added["is_text"]:
        return len(rows)
    return sum(max(1, math.ceil(TOKENS_A_WORD * len(row.response.split()) / stride)) for row in rows)
