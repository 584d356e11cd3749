"""Rows, splits, tokens and draws: what each published defect in the data would change."""

import dataclasses
import re

import pytest
from conftest import make_tokenizer
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_module import Shares, make_eot_sequence, split_of, split_rows, split_sources
from engine.tree import padded_batch
from method.recipe import read_recipe
from method.sampler import UnlearnBatchSampler
from method.terms import draws_of
from options import UnlearnOptions
from prompts.formatter import PromptFormatter
from run.parsing import parse_run
from sources.rows import Row
from utils import UsageError


def formatter(kind="opt", template="auto", prompt_tokens=512, answer_tokens=128):
    return PromptFormatter(make_tokenizer(kind), template, prompt_tokens, answer_tokens)


def make_sampler(forget, normal, *words):
    """A sampler of these sources with the draws of a run that was started with these words."""
    options = parse_run(list(words))
    recipe = read_recipe(options)
    draws = draws_of(recipe.terms)
    sampler = UnlearnBatchSampler(
        forget, normal, draws, seed=options.seed, steps=options.max_unlearn_steps, wording=recipe.wording
    )
    return sampler


def filled_sampler(normal=None, *words):
    forget = [Row(f"bad {i}", f"bad answer {i}") for i in range(7)]
    normal = normal or [[Row(f"good {i}", f"fine {i}", true_answers=(f"fine {i}",)) for i in range(9)]]
    sampler = make_sampler([forget], normal, *words)
    sampler.fill_responses(lambda wanted, tokens: wanted)
    return sampler


# ---------------------------------------------------------------------------------------- answer boundary
def test_the_first_answer_token_is_an_answer_token():
    """Published: the answer began one token late for byte-level BPE, and its first word was never trained."""
    e = formatter()
    prompt, answer = e.prompt("Why?"), e.answer("Because of tides.")
    decode = e.tokenizer.decode
    assert decode(prompt) == "</s>### Question: Why?\n ### Answer:"  # with OPT's start token, once
    assert decode(answer) == " Because of tides.</s>"
    # put together they are the template's own text, so that a model meets in training what it meets in use
    assert decode(prompt[1:] + answer[:-1]) == "### Question: Why?\n ### Answer: Because of tides."


def test_every_style_ends_with_the_end_of_turn_token_and_a_cut_answer_does_not():
    e = formatter("chat")
    assert e.style == "chat"
    assert e.tokenizer.decode(e.prompt("Hi")) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    for style in ("chat", "qa", "qa_space", "raw"):
        assert e.answer("Yes.", style)[-1] == e.tokenizer.eos_token_id
        assert e.answer("", style) == [e.tokenizer.eos_token_id]  # an empty answer is the end of turn at once
    assert e.answer("Yes.", complete=False)[-1] != e.tokenizer.eos_token_id
    assert len(formatter("chat", answer_tokens=5).answer("one two three four five six seven eight")) == 5
    # the published prompt as people paste it, its trailing space a part of the prompt
    assert e.tokenizer.decode(e.prompt("Q", "qa_space")).endswith("### Answer: ")
    assert e.tokenizer.decode(e.answer("Yes.", "qa_space")).startswith("Yes")


def test_the_end_of_turn_may_be_a_token_that_was_only_added():
    """Phi-3's <|end|> is special, but none of the tokenizer's named ones: answers would have run on past it."""
    tokenizer = make_tokenizer("chat")
    tokenizer.add_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    )
    e, end = PromptFormatter(tokenizer, "auto", 512, 128), tokenizer.convert_tokens_to_ids("<|end|>")
    assert e.answer("Yes.")[-1] == end
    assert end in e.stop_ids()


@pytest.mark.parametrize(("space", "first"), [("", ["T", "he"]), (" ", ["▁The"])])
def test_an_answer_begins_as_it_would_after_its_prompt(space, first):
    """Tokenizers of Llama's kind put a space before a text that stands alone: after "\\n" no model says "▁The" first.
    Where the template writes a space there (Mistral's), it does."""
    words = ["<unk>", "<s>", "</s>", "\n", "he", "▁T", "▁The", "▁s", "▁sk", "▁sky", *"▁The:skyQ"]
    merges = [("h", "e"), ("▁", "T"), ("▁T", "he"), ("▁", "s"), ("▁s", "k"), ("▁sk", "y")]
    bpe = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    asked, said = "m['content'] + ':" + ("" if space else "\\n") + "'", f"'{space}' + m['content'] + eos_token"
    tokenizer.chat_template = (
        f"{{% for m in messages %}}{{{{ {asked} if m['role'] == 'user' else {said} }}}}{{% endfor %}}"
    )
    e = PromptFormatter(tokenizer, "auto", 512, 128)
    assert tokenizer.convert_ids_to_tokens(e.answer("The sky")) == [*first, "▁sky", "</s>"]
    assert e.answer("") == [tokenizer.eos_token_id]


def test_a_model_that_is_silent_is_not_pushed_away_from_silence():
    """An empty harmful answer is the end of the turn alone; ascent on it would teach the model to speak."""
    forget = [Row("bad 0", ""), Row("bad 1", "take the pick")]
    normal = [[Row(f"good {i}", f"fine {i}", true_answers=(f"fine {i}",)) for i in range(9)]]
    rows, e = make_sampler([forget], normal, "--set=stop.prefill_tokens=3"), formatter("chat")
    rows.fill_responses(lambda wanted, tokens: wanted)
    asked = {"forget": set(), "mismatch": set(), "stop": set(), "retain": set()}
    for s in (s for step in range(4) for s in rows.sequences(step, e)):
        asked[s.draw].add(e.tokenizer.decode(s.prompt_ids).split("\n")[1])
    assert asked["forget"] == {"bad 1<|im_end|>"}
    assert asked["mismatch"] == {"bad 0<|im_end|>", "bad 1<|im_end|>"}
    assert asked["stop"] == {"bad 1<|im_end|>"}


def test_a_prompt_whose_markers_alone_are_too_long_loses_its_beginning_and_is_counted():
    e = formatter(prompt_tokens=6)
    assert (
        e.prompt("one two three four five six seven eight")
        == formatter().prompt("one two three four five six seven eight")[-6:]
    )
    assert len(e.cut) == 1


def test_chat_template_is_refused_where_there_is_none():
    with pytest.raises(UsageError, match="no chat template"):
        formatter("opt", template="chat")


def test_a_template_that_tells_the_date_gives_the_same_prompt_every_day():
    """Llama 3's does: at midnight the cached states of the original would have been those of other prompts."""
    tokenizer = make_tokenizer("chat")
    tokenizer.chat_template = "Today: {{ strftime_now('%d %b %Y') }}\n" + tokenizer.chat_template
    e = PromptFormatter(tokenizer, "auto", 512, 16)
    assert tokenizer.decode(e.prompt("Why?")).startswith("Today: 26 Jul 2024\n<|im_start|>user\nWhy?")


def test_of_several_templates_the_default_one_is_taken():
    tokenizer = make_tokenizer("chat")
    expected = PromptFormatter(tokenizer, "auto", 512, 16).prompt("Why?")
    tokenizer.chat_template = {"tool_use": "TOOLS", "default": tokenizer.chat_template}
    formatter = PromptFormatter(tokenizer, "auto", 512, 16)
    assert (formatter.style, formatter.prompt("Why?")) == ("chat", expected)


# ------------------------------------------------------------------------------------------ splits, draws
def test_splits_are_by_prompt_whatever_file_it_stands_in():
    rows = [Row(f"prompt {i}", f"answer {j}") for i in range(300) for j in range(2)]
    parts = split_rows(rows, Shares(1, 0.1, 0.2))
    prompts = {name: {r.prompt for r in part} for name, part in parts.items()}
    assert not (prompts["train"] & prompts["test"] or prompts["train"] & prompts["dev"])
    assert 0.12 < len(prompts["test"]) / 300 < 0.28
    assert all(split_of(p.upper() + " ", 1, 0.1, 0.2) == "test" for p in prompts["test"])
    assert split_rows(rows, Shares(2, 0.1, 0.2))["test"] != parts["test"]
    assert len(split_rows([Row("one")], Shares(3, 0.45, 0.45))["train"]) == 1  # a single row is trained on
    # and is held out nowhere then, in whichever file it stands
    held = next(row for row in parts["test"] if row.prompt in prompts["test"])
    options = UnlearnOptions(seed=1, dev_share=0.1, test_share=0.2)
    _, many = split_sources([[held], rows], "forget", options)
    assert held.prompt not in {row.prompt for row in many["test"] + many["dev"]}
    assert len(many["test"]) == len(parts["test"]) - 2


def test_each_pass_shuffles_anew_and_leaves_no_row_out():
    """Published: harmful rows were never shuffled, and only the first few hundred were ever used."""
    rows = filled_sampler()
    (draw,) = (draw for draw in rows.draws if draw.name == "forget")
    visited = [e.index for step in range(7) for e in draw.examples(step, rows)]  # 14 visits: two passes over 7 rows
    assert sorted(visited[:7]) == sorted(visited[7:]) == list(range(7))
    assert visited[:7] != visited[7:]


def test_sources_take_turns_on_both_sides():
    """A small source among large ones gets its share: its rows are no fewer in a step than the others'."""
    normal = [[Row(f"a{i}", "x", true_answers=("x", "y", "z", "u", "v")) for i in range(50)], [Row("b", "y")]]
    forget = [[Row(f"bad {i}", "x") for i in range(50)], [Row("rare", "y"), Row("seldom", "z")]]
    rows = make_sampler(forget, normal, "--batch_size=2", "--set=retain.rows=4", "--set=stop.rows=6")
    rows.fill_responses(lambda wanted, tokens: wanted)
    sources = {draw.name: [e.source for e in draw.examples(3, rows)] for draw in rows.draws}
    assert sources["retain"] == [0, 1, 0, 1]
    assert sources["forget"] == sources["mismatch"] == [0, 1]
    assert sources["stop"] == [0, 1, 0, 1, 0, 1]
    e = formatter()
    asked = [
        e.tokenizer.decode(s.prompt_ids) for step in range(4) for s in rows.sequences(step, e) if s.draw == "forget"
    ]
    assert sum("rare" in text for text in asked) == sum("seldom" in text for text in asked) == 2


def test_two_draws_of_one_side_ask_each_its_own_rows(tmp_path):
    """Their rows have the same numbers in the step: one's prompt must not stand before the other's answer."""
    (tmp_path / "r.yaml").write_text(
        "terms:\n- {name: few, draw: retain, loss: kl, rows: 2}\n- {name: many, draw: retain, loss: nll, rows: 5}\n"
    )
    rows, e = filled_sampler(None, f"--method={tmp_path / 'r.yaml'}"), formatter()
    for s in (s for step in range(6) for s in rows.sequences(step, e)):
        asked, answered = e.tokenizer.decode(s.prompt_ids), e.tokenizer.decode(s.answer_ids)
        assert re.search(r"good (\d)", asked)[1] == re.search(r"fine (\d)", answered)[1]


def test_random_answers_depend_on_seed_step_and_row_alone():
    rows, e = filled_sampler(None, "--set=mismatch.answers=3", "--batch_size=4"), formatter()
    answers = {(s, r): rows.replacement_answers(s, r, 3) for s in range(3) for r in range(4)}
    assert len(set(map(tuple, answers.values()))) > 6
    again = filled_sampler(None, "--set=mismatch.answers=3", "--batch_size=4")
    assert {key: again.replacement_answers(*key, 3) for key in reversed(answers)} == answers
    assert all(len(set(drawn)) == 3 for drawn in answers.values())
    # a process's share of a step is a part of the whole step's rows: nothing is drawn from a running generator
    assert rows.sequences(2, e) == again.sequences(2, e)


def test_both_sides_are_put_in_other_words_at_the_share_asked_for():
    """On one side alone, the form of a prompt would tell which side it is."""
    e = formatter("chat")
    forget = [Row(f"How do I break lock {i}?", f"Take pick {i}.") for i in range(7)]
    normal = [
        [Row(f"How do I bake loaf {i}?", f"Take flour {i}.", true_answers=(f"Take flour {i}.",)) for i in range(9)]
    ]
    asked = {}
    for share in (0.0, 0.5):
        rows = make_sampler([list(forget)], [list(normal[0])], f"--set=wording.paraphrase_fraction={share}",
                            "--batch_size=4", "--set=mismatch.answers=2")  # fmt: skip
        rows.fill_responses(lambda wanted, tokens: wanted)
        plain = {tuple(e.prompt(row.prompt)) for row in forget + normal[0]}
        seen = [s for step in range(40) for s in rows.sequences(step, e)]
        for kind, draw in (("forget", "forget"), ("normal", "retain")):
            prompts = [s.prompt_ids in plain for s in seen if s.draw == draw]
            asked[share, kind] = sum(prompts) / len(prompts)
        # a row's random answers follow the very words that its own answer follows
        assert all(len({s.prompt_ids for s in rows.sequences(3, e) if s.draw != "retain" and s.example_id == g}) == 1
                   for g in range(4))  # fmt: skip
        assert rows.sequences(3, e) == rows.sequences(3, e)
    assert asked[0.0, "forget"] == asked[0.0, "normal"] == 1
    assert 0.35 < asked[0.5, "forget"] < 0.65
    assert 0.35 < asked[0.5, "normal"] < 0.65


@pytest.mark.parametrize(("kind", "style"), [("chat", "chat"), ("opt", "qa")])
def test_an_earlier_turn_stands_before_a_share_of_both_sides(kind, style):
    """Its prompt and answer come from either side, so that it tells nothing; the request itself stays whole."""
    rows, e = filled_sampler(None, "--set=wording.multi_turn_fraction=0.25"), formatter(kind)
    plain, seen = {tuple(e.prompt(f"{side} {i}")) for side in ("bad", "good") for i in range(9)}, set()
    counts = {"forget": [0, 0], "retain": [0, 0]}
    for step in range(200):
        for s in rows.sequences(step, e):
            if s.draw != "mismatch":
                counts[s.draw][s.prompt_ids not in plain] += 1
                if s.prompt_ids not in plain:
                    text = e.tokenizer.decode(s.prompt_ids)
                    first, second = (m for m in re.finditer(r"(bad|good) \d\b", text))
                    assert re.search(r"(bad answer|fine) \d", text[first.end() : second.start()])
                    assert tuple(s.prompt_ids[-6:]) in {p[-6:] for p in plain}  # the end of a prompt, as it always is
                    seen.add((s.draw, first.group(1)))
    assert seen == {(kind, side) for kind in counts for side in ("bad", "good")}
    for usual, second_turn in counts.values():
        assert 0.18 < second_turn / (usual + second_turn) < 0.32


def test_answers_are_begun_alike_on_both_sides_and_ended_on_one():
    """A begun answer that only harmful prompts have would teach the model to stop at the words, not at the request."""
    e, tokens = formatter("chat"), 3
    forget = [[Row(f"bad {i}", f"take pick {i} and go") for i in range(7)]]
    normal = [[Row(f"good {i}", f"bake loaf {i} and eat", true_answers=("a",)) for i in range(9)]]
    rows = make_sampler(forget, normal, f"--set=stop.prefill_tokens={tokens}", f"--set=retain.prefill_tokens={tokens}",
                        "--set=stop.rows=4", "--set=retain.first_token_rows=4", "--set=mismatch.answers=1")  # fmt: skip
    rows.fill_responses(lambda wanted, _: wanted)
    (end,) = e.answer("", "chat")
    begun = {"stop": [], "retain": []}
    for step in range(40):
        for s in rows.sequences(step, e):
            whole = s.example_id < 2  # --batch_size rows with their whole answers stand before the further ones
            if s.draw == "stop" and s.targets:
                assert s.targets == (end,) * len(s.answer_ids)  # whatever was begun, the turn ends there
            if not whole and s.answer_ids != (end,):
                assert len(s.answer_ids) == tokens + 1  # the last token of the prefix has something to be followed by
                assert s.answer_ids[-1] == end
                begun[s.draw].append(e.tokenizer.decode(s.answer_ids).split()[0])
                assert (s.targets is None) == (s.draw == "retain")  # the original's own next words are what is held
    for words in begun.values():
        assert len(words) == 40 * 4
        assert 0.1 < sum(word == "take" for word in words) / len(words) < 0.9  # both sides' answers on either side


def test_the_last_word_of_a_prefix_has_a_target():
    """It was read and never followed by one: a model may go on after the last word that it was given."""
    e = formatter("chat")
    (end,) = e.answer("")
    prefix = e.answer("one two three", complete=False)
    for given in (prefix, e.answer("one two three")):  # a beginning, and a whole answer with its end
        sequence = make_eot_sequence("stop", 0, (1, 2), given, end)
        batch = padded_batch([sequence], 0)
        # the targets after the prompt's last token and after each token of the prefix
        assert batch.logit_positions[batch.target_to_logit].tolist() == list(range(1, 2 + len(prefix)))
        assert batch.targets.tolist() == [end] * (1 + len(prefix))
        assert batch.input_ids[0, 2 : 2 + len(prefix)].tolist() == prefix


def test_without_the_kl_the_random_answers_are_still_the_normal_rows_own():
    """The paper's ablation on prompts alone: no normal row is visited, and none would have had an answer."""
    rows = make_sampler([[Row("bad", "no")]], [[Row(f"good {i}") for i in range(50)]], "--normal_weight=0")
    rows.fill_responses(lambda wanted, _: [dataclasses.replace(r, response=r.response or f"own {r.prompt}")
                                           for r in wanted])  # fmt: skip
    assert len(rows.replacement_pool) == 32
    assert {s.draw for s in rows.sequences(0, formatter())} == {"forget", "mismatch"}


def test_the_record_of_a_run_holds_every_prompt_that_stood_in_a_step():
    """Also the prompts of earlier turns; a row that no step came to is not in it."""
    prompts = {side: [f"{side} {i}" for i in range(10, 50)] for side in ("forget", "normal")}
    rows = [[[Row(prompt, "Yes.", true_answers=(prompt,)) for prompt in prompts[side]]] for side in prompts]
    sampler, e = make_sampler(*rows, "--set=wording.multi_turn_fraction=0.5"), formatter("chat")
    sampler.fill_responses(lambda wanted, tokens: wanted)
    for steps in (1, 3):
        sequences = [s for step in range(steps) for s in sampler.sequences(step, e)]
        text = "\n".join(e.tokenizer.decode(s.prompt_ids) for s in sequences)
        shown = {side: {prompt for prompt in prompts[side] if f"\n{prompt}<" in text} for side in prompts}
        assert sampler.trained_keys(steps) == shown
        drawn = {sampler.row(example).prompt for side in shown for example in sampler.examples(side, steps)}
        assert drawn < shown["forget"] | shown["normal"], "some stood in an earlier turn alone"


def own_answers(wanted: list[Row], tokens: int) -> list[Row]:
    """A model whose own answer to every prompt is another one."""
    return [dataclasses.replace(row, response=row.response or f"own {row.prompt}") for row in wanted]


@pytest.mark.parametrize(("words", "normal", "expected"), [
    # 2 steps of 2 normal rows: their 4 answers are one too few, so the rest of the source is answered
    (["--max_unlearn_steps=2"], [Row(f"good {i}") for i in range(14)], 14),
    # a given answer and 4 own ones are enough: no further row is answered
    (["--max_unlearn_steps=2"], [Row(f"good {i}") for i in range(14)] + [Row("q", "a", true_answers=("a",))], None),
    # 40 are needed, and 32 rows are answered at a time
    (["--normal_weight=0", "--set=mismatch.answers=40"], [Row(f"good {i}") for i in range(100)], 64),
])  # fmt: skip
def test_the_pool_holds_what_the_data_can_give_and_not_only_what_a_short_run_visits(words, normal, expected):
    rows = make_sampler([[Row("bad", "no")]], [normal], *words)
    visited = len(rows.answered_rows("normal"))
    rows.fill_responses(own_answers)
    texts = [text for text, _ in rows.replacement_pool]
    assert len(set(texts)) == len(texts)
    assert len(texts) == (expected or visited + 1)


def test_too_few_random_answers_are_refused():
    rows = make_sampler([[Row("bad", "no")]], [[Row(f"good {i}") for i in range(4)]], "--max_unlearn_steps=1")
    with pytest.raises(UsageError, match="holds only 4 different answers"):  # 2 of them to rows that no step visits
        rows.fill_responses(own_answers)
    with pytest.raises(UsageError, match="holds only 1 different answers"):
        filled_sampler([[Row("q", "only", true_answers=("only",))]], "--set=mismatch.answers=5")
