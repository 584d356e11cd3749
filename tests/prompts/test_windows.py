"""Passages of text: which tokens stand in which window, how documents are split, and what draws make of passages."""

import dataclasses

import pytest
from conftest import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_module import Shares, read_sides, split_sources, split_text
from method.recipe import read_recipe
from method.sampler import UnlearnBatchSampler
from method.terms import draws_of
from options import UnlearnOptions
from prompts.formatter import PromptFormatter
from prompts.windows import TextCutter, ask_to_go_on, whole, window_spans
from run.parsing import parse_run
from run.texts import refuse_terms_without_prompts
from sources.rows import Row
from utils import UsageError

BOS, EOS = 400, 401
TOKENIZER = make_tokenizer("opt")


def word_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a word: w7 is token 7. It puts no token before a text."""
    words = {f"w{i}": i for i in range(400)} | {"<s>": BOS, "</s>": EOS}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>",
                                   bos_token="<s>" if bos else None)  # fmt: skip


def text(count: int, first: int = 0, **fields) -> Row:
    """A document of `count` words from w<first> on."""
    return Row("", " ".join(f"w{i}" for i in range(first, first + count)), is_text=True, **fields)


def formatter_and_cutter(window: int, stride: int = 0, bos: bool = True, **limits):
    limits = {"max_prompt_tokens": 512, "max_answer_tokens": 2} | limits
    formatter = PromptFormatter(word_tokenizer(bos), "qa", *limits.values())
    return formatter, TextCutter.of(formatter, UnlearnOptions(text_window=window, text_stride=stride))


def tokens(passages):
    return [list(passage.token_ids) for passage in passages]


# ------------------------------------------------------------------------------------------------ windows
@pytest.mark.parametrize(
    ("length", "window", "stride", "expected"),
    [
        (0, 4, 4, []),
        (3, 4, 4, [(0, 3)]),  # a short document is one window
        (4, 4, 4, [(0, 4)]),
        (8, 4, 4, [(0, 4), (4, 8)]),
        (10, 4, 4, [(0, 4), (4, 8), (6, 10)]),  # the last one reaches back
        (10, 4, 2, [(0, 4), (2, 6), (4, 8), (6, 10)]),
        (9, 4, 3, [(0, 4), (3, 7), (5, 9)]),
        (12, 4, 6, [(0, 4), (6, 10), (8, 12)]),
    ],
)
def test_windows_end_where_the_document_ends(length, window, stride, expected):
    assert window_spans(length, window, stride) == expected


def test_a_passage_follows_the_start_of_a_text_and_no_end_of_turn_follows_it():
    """Ten words in windows of four. An answer may have 2 tokens here; a passage is longer and is not cut."""
    formatter, cutter = formatter_and_cutter(4)
    passages = cutter.cut(text(10))
    assert [formatter.prompt_of(passage) for passage in passages] == [[BOS]] * 3
    assert [formatter.answer_of(p, "raw", limit=1) for p in passages] == [[0, 1, 2, 3], [4, 5, 6, 7], [6, 7, 8, 9]]
    assert [passage.key for passage in passages] == ["w0 w1 w2 w3 ", "w4 w5 w6 w7 ", "w6 w7 w8 w9"]


def test_without_a_start_token_each_passage_begins_with_the_last_token_of_the_one_before():
    """Else every fourth word of a book would be a prompt and never be forgotten."""
    formatter, cutter = formatter_and_cutter(4, bos=False)
    passages = cutter.cut(text(10))
    assert [formatter.prompt_of(passage) for passage in passages] == [[0], [3], [6]]
    assert [formatter.answer_of(passage) for passage in passages] == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert cutter.cut(text(1)) == []  # nothing predicts its only token
    with pytest.raises(UsageError, match="--text_window 1"):
        formatter_and_cutter(1, bos=False)


def test_a_passage_has_the_tokens_of_its_document_where_its_own_text_has_others():
    """Windows cut through words: 'lighthouse' cut after 'lighth' has other tokens when it is read alone."""
    tokenizer = make_tokenizer("opt")
    row = Row("", "The lighthouse keeper whistled – a short, unhurried tune of Märchen.", is_text=True)
    expected = tokenizer(row.response, add_special_tokens=False)["input_ids"]
    passages = TextCutter(tokenizer, 5, has_start=True).cut(row)
    assert [i for p in passages[:-1] for i in p.token_ids] == expected[: 5 * (len(passages) - 1)]
    assert list(passages[-1].token_ids) == expected[-5:]
    alone = [tokenizer(p.text, add_special_tokens=False)["input_ids"] for p in passages]
    assert alone != tokens(passages)


@settings(max_examples=60, deadline=None)
@given(document=st.text(min_size=1, max_size=200), window=st.integers(2, 20), data=st.data(), start=st.booleans())
def test_no_token_of_a_forget_text_is_left_out(document, window, data, start):
    """Every token is an answer token of some passage; without a start token, all but the first one."""
    stride = data.draw(st.integers(0, window))
    row = Row("", document, is_text=True)
    cutter = TextCutter(TOKENIZER, window, stride, has_start=start)
    ids = TOKENIZER(document, add_special_tokens=False)["input_ids"]
    answered: dict[int, int] = {}
    for passage in cutter.cut(row):
        prompt, answer = passage.prompt_and_answer(start)
        assert len(passage.token_ids) <= window
        answered |= {passage.start + len(prompt) + i: token for i, token in enumerate(answer)}
    first = 0 if start else 1
    assert [answered.get(i) for i in range(first, len(ids))] == ids[first:]


def test_a_passage_is_asked_for_its_second_half():
    formatter, cutter = formatter_and_cutter(5)
    (passage,) = cutter.cut(text(5))
    asked = ask_to_go_on(passage)
    assert (asked.prompt, asked.response, asked.key) == ("w0 w1 w2", "w3 w4", passage.key)
    assert formatter.prompt_of(asked, "raw") == [BOS, 0, 1, 2]
    assert formatter.answer_of(asked) == [3, 4]
    assert whole(asked) == passage
    prompt = Row("Why?", "So.")
    assert ask_to_go_on(prompt) is prompt is whole(prompt)


# ------------------------------------------------------------------------------------------------ splits
def shares(dev: float, test: float, **more) -> Shares:
    return Shares(seed=8888, dev=dev, test=test, **more)


def test_documents_are_held_out_whole():
    _, cutter = formatter_and_cutter(4)
    parts = split_text([text(9, 10 * i, document=f"{i}.txt") for i in range(20)], shares(0.3, 0.3), cutter)
    found = {split: {passage.document for passage in passages} for split, passages in parts.items()}
    assert all(found.values()) and sum(map(len, found.values())) == 20
    assert {split: len(passages) for split, passages in parts.items()} == {s: 3 * len(d) for s, d in found.items()}


@pytest.mark.parametrize(("stride", "bos"), [(0, True), (2, True), (0, False), (1, False)])
def test_passages_of_one_document_share_no_token_between_splits(stride, bos):
    _, cutter = formatter_and_cutter(4, stride, bos)
    parts = split_text([text(203)], shares(0.2, 0.3), cutter)
    found = {split: {token for passage in passages for token in passage.token_ids} for split, passages in parts.items()}
    assert sum(map(len, found.values())) == 203 and set().union(*found.values()) == set(range(203))
    assert all(len(tokens) >= 4 for tokens in found.values())
    assert len(found["test"]) < len(found["train"])


@pytest.mark.parametrize(
    ("length", "starts"), [(3, [0]), (5, [0]), (6, [0, 4]), (8, [0, 4]), (9, [0, 4]), (10, [0, 4, 8])]
)
def test_blocks_do_not_overlap_and_less_than_half_a_window_joins_the_last_one(length, starts):
    _, cutter = formatter_and_cutter(4)
    blocks = cutter.blocks(text(length))
    assert [block.start for block in blocks] == starts
    assert [token for block in blocks for token in block.token_ids] == list(range(length))


def test_a_forget_text_trains_and_a_few_passages_of_a_normal_one_are_looked_at():
    _, cutter = formatter_and_cutter(4)
    options = UnlearnOptions()
    (forget,) = split_sources([[text(40)]], "forget", options, cutter)
    assert (len(forget["train"]), forget["dev"], forget["test"]) == (10, [], [])
    (normal,) = split_sources([[text(8)]], "normal", options, cutter)
    assert len(normal["train"]) == len(normal["dev"] + normal["test"]) == 1  # two passages: one is held back
    (short,) = split_sources([[text(3)]], "normal", options, cutter)
    assert tokens(short["train"]) == [[0, 1, 2]]


def test_a_passage_that_one_source_trains_on_is_held_out_from_no_other():
    _, cutter = formatter_and_cutter(4)
    options = UnlearnOptions(dev_share=0.3, test_share=0.3)
    alone, among = split_sources([[text(40)], [text(40), text(8, 300), text(8, 350)]], "normal", options, cutter)
    trained = {passage.key for part in (alone, among) for passage in part["train"]}
    held_out = {passage.key for part in (alone, among) for split in ("dev", "test") for passage in part[split]}
    assert trained and not trained & held_out


# ------------------------------------------------------------------------------------------------ draws
def make_sampler(forget, normal, *words):
    options = parse_run(["--batch_size=4", *words])
    recipe = read_recipe(options)
    sampler = UnlearnBatchSampler(forget, normal, draws_of(recipe.terms), seed=1, steps=20, wording=recipe.wording)
    sampler.fill_responses(lambda rows, tokens: rows)
    return options, recipe, sampler


def both_kinds():
    formatter, cutter = formatter_and_cutter(4, max_answer_tokens=8)
    prompts = [Row(f"w{i}", f"w{i} w{i}", true_answers=(f"w{i} w{i}",)) for i in range(100, 130)]
    return formatter, [prompts[:10], cutter.cut(text(40))], [prompts[10:], cutter.cut(text(40, 200))]


@pytest.mark.parametrize("words", [["--set=mismatch.answers=2"], ["--method=selective"]], ids=["yao", "selective"])
def test_passages_are_trained_on_as_they_stand_beside_prompts(words):
    """Every sequence of a passage is [BOS] and its own tokens, whatever the recipe does to the wording of prompts."""
    formatter, forget, normal = both_kinds()
    every = ["--set=wording.paraphrase_fraction=0.5", "--set=wording.template_fraction=0.5",
             "--set=wording.multi_turn_fraction=0.9"]  # fmt: skip
    _, _, sampler = make_sampler(forget, normal, *words, *every)
    seen = {}
    for sequence in (s for step in range(20) for s in sampler.sequences(step, formatter)):
        seen.setdefault(sequence.draw, []).append(sequence)
    passages = {p.token_ids for p in forget[1]} | {p.token_ids for p in normal[1]}
    for draw, text_tokens in (("forget", range(40)), ("retain", range(200, 240))):
        whole_passages = {s.answer_ids for s in seen[draw] if s.prompt_ids == (BOS,)}
        assert whole_passages == {p for p in passages if p[0] in text_tokens}
        assert any(s.prompt_ids != (BOS,) for s in seen[draw])  # prompts take their turns
    others = [s for draw, of_draw in seen.items() for s in of_draw if s.prompt_ids != (BOS,)]
    of_texts = {*range(40), *range(200, 240)}
    assert {draw for draw in seen} >= {"forget", "retain", "stop" if "--method=selective" in words else "mismatch"}
    assert not any(of_texts & {*s.prompt_ids, *s.answer_ids} for s in others)


def test_terms_that_need_a_prompt_are_refused_where_there_is_none():
    _, cutter = formatter_and_cutter(4)
    options, recipe, sampler = make_sampler([cutter.cut(text(40))], both_kinds()[2], "--set=mismatch.answers=2")
    with pytest.raises(UsageError, match=r"the term mismatch of --method yao needs prompts.*--random_weight 0"):
        refuse_terms_without_prompts(recipe.terms, options, sampler.rows)
    options, recipe, sampler = make_sampler([cutter.cut(text(40))], both_kinds()[2], "--method=selective")
    with pytest.raises(UsageError, match=r"the term stop of --method selective needs prompts.*--random_weight 0"):
        refuse_terms_without_prompts(recipe.terms, options, sampler.rows)
    options, recipe, sampler = make_sampler([cutter.cut(text(40))], both_kinds()[2], "--random_weight=0")
    refuse_terms_without_prompts(recipe.terms, options, sampler.rows)
    keys = {p.key for p in sampler.rows["forget"][0]}
    assert sampler.trained_keys(20)["forget"] == keys and len(keys) == 10
    assert dataclasses.replace(sampler.rows["forget"][0][0], shown=2).key in keys


def test_one_file_may_hold_prompts_and_text(tmp_path):
    """Each is a source of its own, so none takes the other's place in the figures."""
    rows, normal = tmp_path / "both.jsonl", tmp_path / "normal.jsonl"
    rows.write_text('{"prompt": "w1", "response": "w2", "text": "w3 w4 w5"}\n')
    normal.write_text('{"prompt": "w6"}\n')
    sides = read_sides(UnlearnOptions(forget_data=[str(rows)], forget_text=[str(rows)], normal_data=[str(normal)]))
    assert [(source.spec, source.rows[0].key) for source in sides.forget] == [
        (str(rows), "w1"), (f"{rows} (text)", "w3 w4 w5")
    ]  # fmt: skip


def test_passages_are_no_replacement_answers():
    with pytest.raises(
        UsageError, match=r"mismatch.answers 5: .* --normal_text has none: name some with --normal_data"
    ):
        make_sampler(both_kinds()[1], both_kinds()[2][1:])
