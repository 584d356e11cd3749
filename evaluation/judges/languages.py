"""Which language a group of texts is in, told by byte n-grams (py3langid, BSD-3) over the group's texts together."""

from __future__ import annotations

import functools
import re

from py3langid.langid import MODEL_FILE, LanguageIdentifier

SURE = 0.75  # probability from which a language counts as told; English prompts taken for another stay below .6
FEWEST_BYTES = 20  # of letters; a single shorter prompt is often taken for another language
TEXT_CHARACTERS = 400  # of each text, so that no long one speaks for the others
MIXED = "mul"  # ISO 639-2: several languages
ODD_ONES = 0.2  # share of the texts in other languages from which a group is in no one language
NO_LANGUAGE = re.compile(r"```.*?(?:```|$)|`[^`\n]*`|https?://\S+|\S+@\S+|[\w./\\-]*[_/\\.(){}\[\]=<>]\w*", re.DOTALL)


@functools.cache
def _identifier() -> LanguageIdentifier:
    """Return the identifier, read once: it takes half a second."""
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _told(text: str) -> str | None:
    """Return the language of one text, or None if it is too short or not sure."""
    if len("".join(filter(str.isalpha, text)).encode()) < FEWEST_BYTES:
        return None
    language, probability = _identifier().classify(text)
    language = "en" if language == "pcm" else language  # Nigerian Pidgin: short English commands look like it
    return language if probability >= SURE and language != "zxx" else None  # zxx: no language, such as code


def language_of(texts: list[str]) -> str | None:
    """Return the language that a group of texts is in, by its ISO 639-1 code ("en", "zh"); MIXED if more than a fifth
    of those that are long enough are in other languages; None if it cannot be told, all texts together being too short.

    Code, addresses and all but the first 400 characters of a text are left out.
    """
    texts = [" ".join(NO_LANGUAGE.sub(" ", text[:TEXT_CHARACTERS]).split()) for text in texts]
    language = _told("\n".join(texts))
    one_by_one = [found for text in texts if (found := _told(text))]
    others = sum(found != language for found in one_by_one)
    return MIXED if others > ODD_ONES * len(one_by_one) else language
