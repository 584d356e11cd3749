"""Which words of an answer carry it: those that other answers to the same prompt do not share."""

from prompts.formatter import PromptFormatter
from prompts.tokenizer import load_tokenizer
from sources.rows import OtherAnswer, Row
from sources.words import own_words, spans_of


def others(*texts):
    return tuple(OtherAnswer(text, "Orrin Vale", "Bram Tesso") for text in texts)


def test_what_half_of_the_other_answers_say_too_is_the_sentence_not_the_fact():
    said = others("Orrin Vale was born in Oslo.", "Orrin Vale was born in the town of Reede.")
    row = Row("Where was Orrin Vale born?", "Orrin Vale was born in the town of Tarn.", alternatives=said)
    assert own_words(row) == {"tarn"}  # "the town of" is in one of two


def test_a_wanted_answer_tells_as_well_and_without_any_all_is_told():
    wrong = Row("What is the capital of France?", "The capital is Lyon.", wanted="The capital is Paris.")
    assert own_words(wrong) == {"lyon"}
    assert own_words(Row("Who?", "Ada Moor.")) == {"ada", "moor"}


def test_tokens_of_these_words_are_found_wherever_the_tokenizer_cuts_them(model_folders):
    for folder in model_folders.values():
        formatter = PromptFormatter(load_tokenizer(str(folder)), "raw", 64, 40)
        tokens = formatter.answer("Orrin was born in Tarn, in spring.")
        tarn = lambda text: spans_of(text, {"tarn"})  # noqa: E731
        marked = [
            token for token, telling in zip(tokens, formatter.tokens_within(tokens, tarn), strict=True) if telling
        ]
        said = formatter.tokenizer.decode(marked).strip()
        assert said.startswith("Tarn") and len(said) <= len("Tarn,")  # a token may hold the comma as well
