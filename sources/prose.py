"""Tell a text of prose from a list of prompts, by what its lines begin and end with."""

from __future__ import annotations

import re
from collections.abc import Callable

LINES_LOOKED_AT = 2000
# Words that a request begins with, politeness and framing before them left out.
_REQUEST = re.compile(
    r"\W*(?:(?:please|kindly|now|then|hi|hello|hey|ok|okay|so|and)\W+)*(?:"
    r"who|whom|whose|what|whats|when|where|which|why|how|is|are|am|was|were|do|does|did|can|could|will|would|should|may|"
    r"might|must|have|has|had|i|i'm|i've|i'd|im|my|we|you|your|"
    r"give|provide|write|create|generate|develop|devise|describe|explain|outline|list|show|tell|teach|make|produce|draft|"
    r"compose|design|share|suggest|offer|prepare|propose|name|find|identify|summari[sz]e|translate|compare|discuss|help|"
    r"recommend|define|calculate|compute|solve|convert|rewrite|edit|complete|classify|analy[sz]e|plan|invent|imagine|"
    r"pretend|act|answer|choose|pick|say|think|consider|add|count|sort|rank|estimate|predict|evaluate|review|check|use|"
    r"construct|formulate|demonstrate|instruct|guide|argue|convince|persuade|come|build|set|turn|let|let's|don't|do)\b",
    re.IGNORECASE,
)  # fmt: skip
_SENTENCE_END = (".", "!", '."', ".”", "!”", '!"', ".'", ".’", "。")


def is_prose(lines: list[str]) -> bool:
    """Return whether lines look like running text: few of them ask for something, and they go on from line to line or
    hold several sentences.

    Of lists of prompts, 80 to 100 % of the lines ask; of books, articles and licences, at most 25 % do.
    """
    lines = lines[:LINES_LOOKED_AT]
    asks = _share(lines, lambda line: "?" in line or "？" in line or _REQUEST.match(line))
    goes_on = _share(lines, lambda line: line[:1].islower())  # a sentence that the line before began
    has_sentences = _share(lines, lambda line: line.count(". ") >= 2)
    ends = _share(lines, lambda line: line.endswith(_SENTENCE_END))
    return (asks < 0.5 and (goes_on > 0.15 or has_sentences > 0.3)) or (asks < 0.1 and ends > 0.5 and len(lines) > 4)


def _share(lines: list[str], is_such: Callable[[str], object]) -> float:
    return sum(bool(is_such(line)) for line in lines) / len(lines)
