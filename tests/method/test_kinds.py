"""Draws of some kinds: rows of other categories give them no sequence, and nothing is asked about those."""

import dataclasses

import pytest
from conftest import make_tokenizer

from method.draw import RunSizes
from method.draws import Answer, Counterfactual, ShortContext, Stop
from method.recipe import read_recipe
from method.sampler import UnlearnBatchSampler
from prompts.formatter import PromptFormatter
from run.alternatives import with_alternatives
from run.asked import _change_rows
from run.parsing import parse_run
from run.texts import refuse_terms_without_prompts
from sources.rows import Row
from utils import UsageError

PERSON = [Row(f"Where does Ann Lee live in {i}?", f"In house {i}.", category="person") for i in range(3)]
RULE = [Row(f"How do I open lock {i}?", f"With pick {i}.", category="policy") for i in range(3)]
TEXT = [Row("", f"A long and quiet story of {i} ships.", is_text=True) for i in range(3)]
SIZES = RunSizes(batch_size=6, max_answer_tokens=16)


def sampler_of(*draws) -> UnlearnBatchSampler:
    return UnlearnBatchSampler([PERSON, RULE, TEXT], [[Row("Hi", "Hello.")]], list(draws), seed=1, steps=4)


@pytest.mark.parametrize(("draw", "wanted"), [
    (Answer("a", SIZES), {"person", "policy", "text"}),
    (Answer("a", SIZES, kinds=("person",)), {"person"}),
    (Answer("a", SIZES, kinds=("person", "text")), {"person", "text"}),
    (ShortContext("a", SIZES, kinds=("text",)), {"text"}),
    (Stop("a", SIZES, rows=6, kinds=("policy",)), {"policy"}),
    (Counterfactual("a", SIZES, kinds=("text",)), set()),  # it needs a prompt
])  # fmt: skip
def test_a_draw_takes_rows_of_its_kinds(draw, wanted):
    sampler = sampler_of(draw)
    visited = {"text" if row.is_text else row.category for step in range(4)
               for row in map(sampler.row, draw.examples(step, sampler))}  # fmt: skip
    assert visited == wanted
    if isinstance(draw, Answer | ShortContext):
        formatter = PromptFormatter(make_tokenizer("chat"), "auto", 64, 16)
        steps = [draw.sequences(step, sampler, formatter) for step in range(4)]
        assert sum(map(len, steps)) == 4 * 2 * len(wanted), "two rows a step of each of three sources"


def test_the_end_of_the_turn_is_taught_after_no_row_that_has_a_sentence_to_say():
    """Otherwise a rule with an answer of its own would be taught silence and the answer, each against the other."""
    spoken = [dataclasses.replace(row, wanted="I don't help with that.") for row in RULE[:2]]
    silence = Stop("stop", SIZES, rows=6, unless_wanted=True)
    sampler = UnlearnBatchSampler([[*spoken, RULE[2]]], [[Row("Hi", "Hello.")]], [silence], seed=1, steps=4)
    visited = {sampler.row(example).prompt for step in range(4) for example in silence.examples(step, sampler)}
    assert visited == {RULE[2].prompt}
    terms = {term.name: term.draw for term in read_recipe(parse_run(["--method=consent"])).terms}
    assert terms["stop"].unless_wanted and terms["say"].kinds == terms["stop"].kinds


def test_what_is_asked_of_the_original_is_asked_of_a_draws_rows_alone():
    """A row that is left out leaves its place; rows of other kinds stay as they are, and sources in their order."""
    sampler = sampler_of()
    asked = []

    def change(rows):
        asked.extend(row.prompt for row in rows)
        return [dataclasses.replace(row, wanted="Nobody knows.") for row in rows[1:]]

    _change_rows(sampler, [Answer("a", SIZES, kinds=("person",))], change)
    assert asked == [row.prompt for row in PERSON]
    people, rules, texts = sampler.rows["forget"]
    assert (rules, texts) == (RULE, TEXT)
    assert people == [dataclasses.replace(row, wanted="Nobody knows.") for row in PERSON[1:]]
    _change_rows(sampler, [Answer("a", SIZES, kinds=("person",))], lambda rows: [])
    assert sampler.rows["forget"] == [RULE, TEXT]


def test_the_recipe_of_a_ledger_has_terms_for_every_kind():
    from ledger.book import KINDS

    taken = {kind for term in read_recipe(parse_run(["--method=consent"])).terms
             for kind in getattr(term.draw, "kinds", ())}  # fmt: skip
    assert taken == {*KINDS}


def test_terms_of_other_kinds_neither_refuse_a_run_nor_ask_for_names():
    """A ledger's recipe has terms for people and rules, whatever is asked: texts alone, or a fact that names nobody."""
    options = parse_run(["--method=consent"])
    terms = read_recipe(options).terms
    refuse_terms_without_prompts(terms, options, {"forget": [TEXT], "normal": []})
    plain = parse_run(["--method=selective"])
    of_plain = read_recipe(plain).terms
    with pytest.raises(UsageError, match="needs prompts, and text has none"):
        refuse_terms_without_prompts(of_plain, plain, {"forget": [TEXT], "normal": []})
    fact = [Row("when was the factory closed?", "in May.", category="fact")]
    assert with_alternatives(fact, [], 2, 1, None, required=False) == fact
    with pytest.raises(UsageError, match="no forget prompt holds a name"):
        with_alternatives(fact, [], 2, 1, None)
