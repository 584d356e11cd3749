"""What the original says of an invented name stands for what it says of the row's own, token by token."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from data_module import Counterpart, Sequence
from engine.layout import padded_batch
from engine.reference import ReferenceCache
from engine.tree import AnswerLogitsModel
from method.draw import RunSizes
from method.draws import Counterfactual, ShortContext, same_places
from method.recipe import build_terms
from method.sampler import UnlearnBatchSampler
from method.terms import count_draws, plan_losses, sequences_needing_reference
from prompts.formatter import PromptFormatter
from prompts.tokenizer import load_tokenizer
from prompts.windows import Passage
from sources.rows import OtherAnswer, Row

OWN = Sequence("unknown", 0, (5, 6), (21, 40, 41), counterparts=(Counterpart((5, 8, 9), (22, 23, 40, 41), (-1, 2, 3)),))
PLAIN = Sequence("retain", 0, (5, 6), (30, 31))


def test_names_are_not_compared_and_the_words_around_them_are():
    """Tokens of the names are -1 and -2: "NAME was born in 9 end" beside a name of three tokens."""
    assert same_places([-1, -1, 20, 21, 9, 1], [-2, -2, -2, 20, 21, 9, 1]) == (-1, -1, 3, 4, 5, 6)
    assert same_places([5, -1, 20], [5, -2, 6, 20]) == (0, -1, 3)


@pytest.mark.parametrize("packed", [True, False])
def test_the_original_is_read_at_the_counterpart_s_places(model_folders, packed):
    """The states of a cached sequence, and a second model that runs on demand, for models without packing."""
    model = AutoModelForCausalLM.from_pretrained(model_folders["llama"]).eval()
    reference = ReferenceCache(AnswerLogitsModel(model, packed=packed), [PLAIN, OWN], 64, 0)
    with torch.no_grad():
        plain = model(torch.tensor([[5, 6, 30, 31]])).logits[0]  # (T, V)
        other = model(torch.tensor([[5, 8, 9, 22, 23, 40, 41]])).logits[0]
    said = reference.original([PLAIN, OWN]).logits(slice(None))  # (M, V): 30, 31, then 21, 40, 41
    assert torch.allclose(said[:2], plain[1:3], atol=1e-5)
    assert torch.allclose(said[3:], other[4:6], atol=1e-5)


def test_a_term_leaves_out_what_has_no_counterpart():
    """The mean is over the tokens that are compared: two of OWN's three, and both of another process's."""
    (term,) = build_terms([{"name": "unknown", "draw": "counterfactual", "loss": "kl"}], RunSizes())
    elsewhere = Sequence("unknown", 1, (5,), (40, 41))
    counts = count_draws([OWN, PLAIN, elsewhere])
    assert counts["unknown"].compared == 4 and counts["unknown"].tokens == 5 and counts["retain"].compared == 2
    assert sequences_needing_reference([OWN, PLAIN], [term]) == [OWN]

    said = SimpleNamespace(at=lambda tokens: said, vocabulary=50, logits=lambda part: torch.zeros(3, 50)[part])
    batch = padded_batch([OWN, PLAIN], 0)
    (places,) = plan_losses([term], batch, SimpleNamespace(original=lambda sequences, layer=None: said), counts).terms
    assert batch.targets[[1, 2]].tolist() == [40, 41] == places.targets.tolist()


def test_own_and_other_answers_are_asked_about_the_same_invented_name(model_folders):
    tokenizer = load_tokenizer(str(model_folders["llama"]))
    formatter = PromptFormatter(tokenizer, "raw", 64, 40)
    others = (OtherAnswer("Orrin Vale was born in Oslo.", "Orrin Vale", "Bram Tesso"),)
    row = Row("Where was Orrin Vale born?", "Orrin Vale was born in Tarn.", alternatives=others)
    draw = Counterfactual("unknown", RunSizes(1, 40), own=True)
    sampler = UnlearnBatchSampler([[row]], [[]], [draw], seed=1, steps=1)
    own, other = draw.sequences(0, sampler, formatter)
    assert own.answer_ids == tuple(formatter.answer("Orrin Vale was born in Tarn."))
    assert other.answer_ids == tuple(formatter.answer("Orrin Vale was born in Oslo."))
    (about,) = own.counterparts
    assert about.answer_ids == tuple(formatter.answer("Bram Tesso was born in Tarn."))
    assert about.prompt_ids == tuple(formatter.prompt("Where was Bram Tesso born?"))
    compared = [token for token, place in zip(own.answer_ids, own.original_places, strict=True) if place >= 0]
    assert tokenizer.decode(compared, skip_special_tokens=True).strip() == "was born in Tarn."
    for token, place in zip(own.answer_ids, own.original_places, strict=True):
        assert place < 0 or about.answer_ids[place] == token


@pytest.mark.parametrize("start", [(2,), ()])
def test_the_original_is_shown_the_few_tokens_before_a_piece_alone(model_folders, start):
    """A passage 21 .. 25 in pieces of two: before (23, 24) the original is shown 22, and no more of the text."""
    formatter = PromptFormatter(load_tokenizer(str(model_folders["llama"])), "raw", 64, 40)
    formatter.text_start = list(start)  # a model without a start token predicts nothing at the first place
    draw = ShortContext("unknown", RunSizes(1, 40), context=1, piece=2)
    passage = Passage("", "five words", token_ids=(21, 22, 23, 24, 25))
    (asked,) = draw.sequences(0, UnlearnBatchSampler([[passage]], [[]], [draw], seed=1, steps=1), formatter)
    wanted = {(2,): [((2,), (21, 22)), ((2, 22), (23, 24)), ((2, 24), (25,))],
              (): [((21,), (22, 23)), ((23,), (24, 25))]}[start]  # fmt: skip
    assert (asked.prompt_ids, asked.answer_ids) == (
        ((2,), (21, 22, 23, 24, 25)) if start else ((21,), (22, 23, 24, 25))
    )
    assert [(other.prompt_ids, other.answer_ids) for other in asked.counterparts] == wanted
    assert asked.original_places == tuple(range(len(asked.answer_ids)))


@pytest.mark.parametrize("packed", [True, False])
def test_the_original_is_read_piece_by_piece(model_folders, packed):
    """One sequence for the model, two for the original: 30 after 5 6, and 41 after 7 (40 has no place)."""
    model = AutoModelForCausalLM.from_pretrained(model_folders["llama"]).eval()
    pieces = Sequence("unknown", 0, (5, 6), (30, 40, 41), counterparts=(
        Counterpart((5, 6), (30,), (0,)), Counterpart((7,), (8, 41), (-1, 1))))  # fmt: skip
    assert pieces.original_places == (0, -1, 2)
    reference = ReferenceCache(AnswerLogitsModel(model, packed=packed), [OWN, pieces], 64, 0)
    with torch.no_grad():
        first = model(torch.tensor([[5, 6, 30]])).logits[0]  # (T, V)
        second = model(torch.tensor([[7, 8, 41]])).logits[0]
    said = reference.original([OWN, pieces]).logits(slice(None))[3:]  # (M, V), after OWN's three
    assert torch.allclose(said[0], first[1], atol=1e-5)
    assert torch.allclose(said[2], second[1], atol=1e-5)
