"""Numbers as a reader sees them, and where they lie on a bar."""

from __future__ import annotations

import dataclasses

NO_FIGURE = "-"


def percent(figure: dict | None) -> str:
    """Return a rate with its interval, such as '83 % (71 to 91)', or a dash."""
    if figure is None or figure["value"] is None:
        return NO_FIGURE
    return f"{100 * figure['value']:.0f} %{_interval(figure, lambda x: f'{100 * x:.0f}')}"


def decimal(figure: dict | None, digits: int = 2) -> str:
    """Return a mean with its interval, such as '0.65 (0.61 to 0.70)', or a dash."""
    if figure is None or figure["value"] is None:
        return NO_FIGURE
    return f"{figure['value']:.{digits}f}{_interval(figure, lambda x: f'{x:.{digits}f}')}"


def points(figure: dict | None) -> str:
    """Return a difference of rates in percentage points with its interval, such as '-1.2 points (-3.1 to +0.8)'."""
    if figure is None or figure["value"] is None:
        return NO_FIGURE
    return f"{100 * figure['value']:+.1f} points{_interval(figure, lambda x: f'{100 * x:+.1f}')}"


def short(figure: dict | float | None, form: str = "{:.2f}") -> str:
    """Return a value without its interval, or a dash. figure: an Estimate, or a bare number."""
    value = figure["value"] if isinstance(figure, dict) else figure
    return NO_FIGURE if value is None else form.format(value)


def short_percent(figure: dict | None) -> str:
    """Return a rate without its interval, such as '83 %', or a dash."""
    return NO_FIGURE if figure is None or figure["value"] is None else f"{100 * figure['value']:.0f} %"


def _interval(figure: dict, form) -> str:
    """Return the interval in brackets; nothing for a figure without one."""
    if figure.get("low") is None or figure.get("high") is None:
        return ""
    return f" ({form(figure['low'])} to {form(figure['high'])})"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a figure and its interval lie on a track, in percent of the track's length."""

    at: float
    low: float
    high: float

    @property
    def width(self) -> float:
        """The interval's length."""
        return self.high - self.low


@dataclasses.dataclass(frozen=True)
class Bar:
    """A figure on a track with the bound that it is held against; `allowed_from` to `allowed_to` is the side where
    the bound holds. All in percent of the track's length."""

    figure: Place
    bound: float
    allowed_from: float
    allowed_to: float


def place(figure: dict | None, start: float = 0.0, end: float = 1.0) -> Place | None:
    """Return where a figure lies on a track from `start` to `end`; None if it has no value."""
    if figure is None or figure["value"] is None:
        return None
    value = figure["value"]
    low, high = (value if figure.get(name) is None else figure[name] for name in ("low", "high"))
    return Place(*(_share(x, start, end) for x in (value, low, high)))


def bar(check: dict) -> Bar | None:
    """Return the bar of a verdict's check; None if nothing was measured. The track is 0 to 1 where all of it lies
    there, else it is as long as the numbers need."""
    if check["value"] is None:
        return None
    numbers = [x for x in (check["value"], check["low"], check["high"], check["bound"]) if x is not None]
    start, end = min(0.0, *numbers), max(0.0, *numbers)
    if start == 0 and end <= 1:
        end = 1.0
    else:
        margin = (end - start) * 0.1 or 1.0
        start, end = start - margin * (start < 0), end + margin
    bound = _share(check["bound"], start, end)
    allowed = {"<": (0.0, bound), ">": (bound, 100.0)}.get(check["sign"][0], (bound, bound))
    return Bar(place(check, start, end), bound, *allowed)


def _share(value: float, start: float, end: float) -> float:
    """Return a number's place on a track, in percent, held within it."""
    return round(100 * min(1.0, max(0.0, (value - start) / (end - start))), 2)
