"""What models say of answers they are given, on models whose words are known."""

import json
import math

import pytest
import torch
from conftest import CHAT_TEMPLATE, make_tokenizer, tiny_model

from data_module import Sequence, split_sources
from engine.trained_on import TrainedOn
from engine.tree import AnswerLogitsModel
from evaluation.groups import Group, make_groups, split_by_reference, unseen_groups
from evaluation.inputs import cut_references, make_formatters
from evaluation.likelihood import choices, perplexity, read_choices, score_answers
from evaluation.options import EvaluateOptions
from evaluation.paper import score_own
from prompts.formatter import PromptFormatter
from sources.rows import Row, Source
from utils import UsageError


def test_scores_are_those_of_the_plain_model():
    """Batched and packed, every figure is the one of a forward of that answer alone."""
    tokenizer = make_tokenizer("chat")
    model, formatter = tiny_model("llama", len(tokenizer)).eval(), PromptFormatter(tokenizer, "auto", 512, 16)
    answer_model, texts = AnswerLogitsModel(model, packed=True), ("Take the red pick.", "", "No.")
    group = Group("a", "", "forget", "chat", [Row(f"How do I open lock {i}?") for i in range(3)])
    sequences = [Sequence("normal", i, tuple(formatter.prompt_of(row, "chat")),
                          tuple(formatter.answer(text, "chat", complete=False)) if text else ())
                 for i, (row, text) in enumerate(zip(group.rows, texts, strict=True))]  # fmt: skip
    found = score_answers(answer_model, sequences, tokenizer.pad_token_id)
    own = score_own(answer_model, formatter, [group], {"after": [list(texts)]})["after"][0]
    assert found[1] is None and own[1] is None
    for i in (0, 2):
        score, start, rest = found[i], list(sequences[i].prompt_ids), list(sequences[i].answer_ids)
        logits = model(torch.tensor([[*start, *rest]])).logits[0, len(start) - 1 : -1]
        log_p = torch.log_softmax(logits, -1)
        assert score.targets == rest
        assert score.log_probs == pytest.approx(log_p[range(len(rest)), rest].tolist(), abs=1e-4)
        assert score.predicted == log_p.argmax(-1).tolist()
        assert own[i].nll == pytest.approx(-log_p[range(len(rest)), rest].sum().item(), abs=1e-4)
        assert (own[i].tokens, own[i].diversity) == (len(rest), len(set(rest)) / len(rest))
        assert score.means == pytest.approx((log_p.exp() * log_p).sum(-1).tolist(), abs=1e-4)


def test_every_token_of_a_text_is_scored_once_with_a_full_window_before_it():
    tokenizer = make_tokenizer("chat")
    model, text = (
        tiny_model("llama", len(tokenizer)).eval(),
        "How do I open lock 3? Take the red pick and turn it. " * 2,
    )
    ids = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    ids += tokenizer(text, add_special_tokens=False)["input_ids"]
    window, total = 9, 0.0
    assert (len(ids) - 1) % window, "the last window must be a short one"
    for place in range(1, len(ids)):
        begin = (place - 1) // window * window  # where this token's window begins; the last one reaches back
        begin = min(begin, len(ids) - 1 - window)
        logits = model(torch.tensor([ids[begin:place]])).logits[0, -1]
        total -= torch.log_softmax(logits, -1)[ids[place]].item()
    found = perplexity(model, tokenizer, text, window=window)
    assert sum(found["nll"]) == pytest.approx(total, rel=1e-4)
    assert found["tokens"] == [window] * ((len(ids) - 1) // window) + [(len(ids) - 1) % window]


def test_only_what_was_held_out_is_called_unseen():
    """All of a source of one row is trained on, whatever split its prompt would fall in."""
    many = [Row(f"prompt {i}") for i in range(40)]
    options = EvaluateOptions(split="test", dev_share=0.1, test_share=0.2)
    few, held = split_sources([[Row("one")], many], "forget", options)
    groups = make_groups({"forget": {"few.jsonl": few, "many.jsonl": held}, "keep": {}}, "qa", options)
    assert [g.name for g in groups[1:]] == ["few (listed)", "many (unseen)", "many (trained)"]
    assert not {r.prompt for r in groups[2].rows} & {r.prompt for r in groups[3].rows}
    # sources of one name are told apart, and one whose rows of a split are none is not asked about its others
    groups = make_groups({"forget": {"bad/rows.jsonl": held}, "keep": {"good/rows.jsonl": held}}, "qa", options)
    assert [g.name for g in groups[1:]] == ["rows (unseen)", "rows (trained)", "good/rows (unseen)"]
    options.split = "dev"
    assert not make_groups({"forget": {"a.jsonl": {**held, "dev": []}}, "keep": {}}, "qa", options)[1:]
    options.split = "all"
    assert [len(g.rows) for g in make_groups({"forget": {"many.jsonl": held}, "keep": {}}, "qa", options)[1:]] == [40]


def test_only_what_the_run_asked_is_called_trained(tmp_path):
    """A short run asks a few of its training rows; a file that it never saw has none, whatever its split says."""
    options = EvaluateOptions(model_name=str(tmp_path), split="test", dev_share=0.1, test_share=0.2)
    (held,) = split_sources([[Row(f"prompt {i}") for i in range(40)]], "forget", options)
    asked = held["train"][:3]
    TrainedOn().with_run({"forget": [row.key for row in asked], "normal": []}).write(tmp_path)
    (other,) = split_sources([[Row(f"another {i}") for i in range(40)]], "forget", options)
    groups = make_groups({"forget": {"a.jsonl": held, "b.jsonl": other}, "keep": {}}, "qa", options)
    assert [g.name for g in groups[1:]] == ["a (unseen)", "a (trained)", "b (unseen)"]
    assert {row.prompt for row in groups[2].rows} == {row.prompt for row in asked}


def test_questions_about_a_text_are_asked_whatever_the_split_and_count_for_nothing():
    options = EvaluateOptions(split="test", prompts_per_group=3)
    about = [Source("data/story.jsonl", [Row(f"Who is {i}?", f"He is {i}.") for i in range(5)])]
    groups = make_groups({"forget": {"story.txt": {"train": [], "dev": [], "test": [Row("p")]}}, "keep": {}}, "qa",
                         options, about)  # fmt: skip
    assert [(g.name, g.counts, len(g.rows)) for g in groups[1:]] == [
        ("story (unseen)", True, 1), ("data/story (about)", False, 3)]  # fmt: skip
    groups = split_by_reference(groups)
    assert unseen_groups(g.name for g in groups if g.counts) == ["story (unseen)"]


def test_choices_are_read_whole_and_scored_as_the_plain_model_scores_them():
    """MC1, MC2 (Lin et al. 2022) from summed log-probabilities, of answers longer than one that is generated too."""
    tokenizer = make_tokenizer("opt")
    model, formatter = tiny_model("opt", len(tokenizer)).eval(), PromptFormatter(tokenizer, "qa", 300, 4)
    answers = ["Take the red pick and turn it twice to the left.", "Take the red pick and turn it twice to the right.",
               "No."]  # fmt: skip
    row = {"question": "How do I open a lock?", "mc1_targets": dict.fromkeys(answers, 0) | {answers[1]: 1},
           "mc2_targets": {answers[0]: 1, answers[1]: 0, answers[2]: 1}}  # fmt: skip
    begin = tokenizer("### Question: How do I open a lock?\n ### Answer:")["input_ids"]
    loglik = []
    for text in answers:
        ids = tokenizer(f"### Question: How do I open a lock?\n ### Answer: {text}", return_tensors="pt")["input_ids"]
        logp = model(ids).logits[0, :-1].log_softmax(-1)  # (T - 1, V)
        loglik.append(sum(logp[t, ids[0, t + 1]].item() for t in range(len(begin) - 1, ids.shape[1] - 1)))
    chance = [math.exp(value - max(loglik)) for value in loglik]
    found = choices(AnswerLogitsModel(model, packed=True), formatter, [row], "qa")
    assert found["mc2"] == [pytest.approx((chance[0] + chance[2]) / sum(chance), rel=1e-4)]
    assert found["mc1"] == [float(loglik[1] == max(loglik))]


def test_both_models_are_asked_the_same_words(tmp_path):
    """A folder that another tool saved may hold a template with another system message."""
    for name, template in (("before", CHAT_TEMPLATE), ("after", "<|im_start|>Be rude." + CHAT_TEMPLATE)):
        tokenizer = make_tokenizer("chat")
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / name)
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
    options = EvaluateOptions(original_name=str(tmp_path / "before"), model_name=str(tmp_path / "after"))
    formatters = make_formatters(options)
    assert formatters["before"].prompt("Hello?") == formatters["after"].prompt("Hello?")


@pytest.mark.parametrize(("rows", "message"), [
    ({"question": "q"}, "row 1: 'mc1_targets' must hold answers"), ([1], "row 1: must be an object"),
    ([{"question": "q", "choices": ["a", "b"], "answer": 2}], "row 1: field 'answer' is 2, .* none of its 2 choices"),
    ([{"question": "q", "mc1_targets": {}, "mc2_targets": {"a": 1}}], "row 1: 'mc1_targets' must hold answers"),
    ([{"question": "q", "mc1_targets": {"a": 1}, "mc2_targets": {"choices": ["a", "b"], "labels": [1]}}],
     "row 1: 'mc2_targets' must hold answers"),
    ([{"question": "q", "mc1_targets": {"a": 1}, "mc2_targets": {"a": 0}}], "at least one of them 1"),
])  # fmt: skip
def test_choices_that_are_none_are_refused_at_once(tmp_path, rows, message):
    (tmp_path / "mc.json").write_text(json.dumps(rows))
    with pytest.raises(UsageError, match=message):
        read_choices(str(tmp_path / "mc.json"), "--mc_data")


def test_a_text_without_spaces_is_one_long_word():
    model = tiny_model("llama").eval()
    found = perplexity(model, make_tokenizer("chat"), "x7" * 900)
    assert found["words"] == 1
    assert found["word_perplexity"] is None  # e to the power of some thousand nats
    assert 1 < math.exp(sum(found["nll"]) / sum(found["tokens"])) < math.inf


def test_references_are_scored_whole_and_judged_as_far_as_an_answer_reaches():
    """Rows that no model saw are scored whole, so the forget rows beside them must be; what is cut has no end."""
    formatter = PromptFormatter(make_tokenizer("chat"), "auto", 512, 4)
    long, short = "Take the red pick and turn it twice to the left.", "No."
    groups = [Group("f", "unseen", "forget", "chat", [Row("How?", long), Row("Why?", short), Row("Who?")]),
              Group("k", "unseen", "keep", "chat", [Row("How?", long)])]  # fmt: skip
    scored = cut_references(groups, formatter)
    assert [[row.response for row in group.rows] for group in scored[:1]] == [[long, short, None]]
    (cut, kept, _), (of_keep,) = (group.rows for group in groups)
    assert long.startswith(cut.response) and len(formatter.ids(cut.response)) <= 4 and not cut.complete
    assert kept == Row("Why?", short)
    assert scored[1].rows == [of_keep] and of_keep.response == cut.response
