"""Attacks on tiny models: each gives an answer a prompt, and does to weights and prompts what it says."""

import pytest
import torch
from conftest import make_tokenizer, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from engine.adapters import decoder_layers
from evaluation.attacks import ATTACKS, WRAPPERS, relearning
from evaluation.attacks.ablation import choose_direction, final_states, layers_to_try, without_direction
from evaluation.attacks.base import AskedRow, Attack, AttackConfig, AttackData, AttackTarget, RelearnSet
from evaluation.attacks.logit_lens import logit_lens_nll
from evaluation.attacks.prompts import PREFIXES, few_shot
from evaluation.attacks.pruning import without_small_weights
from evaluation.attacks.quantisation import fake_quantize
from evaluation.attacks.reading import multiple_choice, names_question, reverse_query
from evaluation.attacks.relearning import choose_learning_rate, fine_tune, relearn
from evaluation.attacks.text import more_words, other_passages
from evaluation.parsing import parse_evaluation
from prompts.formatter import PromptFormatter
from prompts.windows import TextCutter, ask_to_go_on
from sources.rows import Row
from utils import UsageError


@pytest.fixture(params=["opt", "llama"])
def target(request):
    return make_target(request.param)


def make_target(family: str) -> AttackTarget:
    """A tiny model under attack: three attacked rows, whose answers came with them, and others to show and to teach."""
    tokenizer = make_tokenizer("opt" if family == "opt" else "chat")
    model = tiny_model(family, len(tokenizer)).eval()
    asked = [AskedRow(row=Row(f"How do I open lock {i}?", f"Take the red pick {i}."), id=str(i), judge="reference",
                      reference=f"Take the red pick {i}.") for i in range(3)]  # fmt: skip
    shots = [Row(f"How do I open door {i}?", f"Kick it {i} times.") for i in range(4)]
    keep = [Row(f"What is the colour of flower {i}?", "It is blue.") for i in range(4)]
    data = AttackData(asked=asked, forget_train_rows=shots, keep_rows=keep,
                      relearn_sets=[RelearnSet("doors", shots), RelearnSet("half", shots[:2], [1, 2])])  # fmt: skip
    config = AttackConfig(max_new_tokens=5, batch_size=8, seed=1, num_samples=3, relearn_steps=8, num_examples=4,
                          relearn_lr=1e-3)  # fmt: skip
    return AttackTarget(model=model, formatter=PromptFormatter(tokenizer, "auto", 512, 16), packed=True, data=data,
                        config=config)  # fmt: skip


def test_every_attack_answers_every_prompt_and_leaves_the_model_as_it_was(target):
    templates = 3 if target.formatter.style == "chat" else 2
    variants = {"quantise": 2, "prune": 3, "ablate": 1, "prefill": 3, "suffix": 2, "few_shot": 1, "sampling": 1,
                "reverse": 2, "multiple_choice": 1, "rephrase": len(WRAPPERS) + templates,
                "relearn": 6}  # two sets of rows, asked after a quarter, half and all of the steps  # fmt: skip
    assert variants.keys() == {name for name, attack in ATTACKS.items() if isinstance(attack, Attack)}
    before = {name: tensor.clone() for name, tensor in target.model.state_dict().items()}
    plain = target.answer(target.prompts())
    for name, count in variants.items():
        found = ATTACKS[name].run(target)
        assert len({a.variant for a in found}) == len(found) == count, name
        for result in found:
            asked = [1, 2] if result.variant.startswith("half") else None
            assert result.rows in (asked, [0, 1, 2]), name
            assert [len(texts) for texts in result.answers] == [3 if name == "sampling" else 1] * (2 if asked else 3)
        after = target.model.state_dict()
        assert after.keys() == before.keys(), name
        assert all(torch.equal(before[key], after[key]) for key in before), name
        assert target.answer(target.prompts()) == plain, f"{name} left something behind that changes the answers"


def test_passages_are_attacked_in_their_own_form_and_only_words_that_were_not_shown_count(target):
    """Words that were shown are not counted as given back: only what follows them is compared."""
    formatter = target.formatter
    text = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    cut = TextCutter(formatter.tokenizer, 24, 12, has_start=bool(formatter.text_start)).cut(
        Row("", text * 6, is_text=True)
    )
    rows = [ask_to_go_on(passage) for passage in cut[:3]]
    target.data.asked = [AskedRow(row=row, id=str(i), judge="reference", reference=row.response)
                         for i, row in enumerate(rows)]  # fmt: skip
    target.data.forget_train_rows = cut[3:5]
    target.data.relearn_sets = [RelearnSet("passages", cut[3:5])]
    before = target.answer(target.prompts())
    variants = {"quantise": 2, "prune": 3, "prefill": 2, "rephrase": 5, "few_shot": 1, "sampling": 1, "relearn": 3}
    assert variants.keys() == {name for name, a in ATTACKS.items() if isinstance(a, Attack) and a.on_text}
    for name, count in variants.items():
        found = ATTACKS[name].on_text(target)
        assert len({a.variant for a in found}) == len(found) == count, name
        assert all(len(result.answers) == 3 for result in found), name
    assert target.answer(target.prompts()) == before
    asked = prompts_of(target, more_words)
    start = list(formatter.text_start)
    assert [prompt[len(start) :] for prompt in asked[:3]] == [list(row.token_ids[: row.shown + 4]) for row in rows]
    shots = prompts_of(target, other_passages)
    whole_text = formatter.tokenizer.decode(shots[0])
    assert whole_text.index(cut[3].text) < whole_text.index(cut[4].text) and whole_text.endswith(rows[0].prompt[-10:])
    row = rows[0]
    target.config.max_new_tokens = 64
    target.answer = lambda prompts, *_: [formatter.tokenizer.decode(row.token_ids[row.shown : row.shown + 4])] * 3
    assert more_words(target)[0].hits[0] == [False]  # it repeats what was shown
    target.answer = lambda prompts, *_: [formatter.tokenizer.decode(row.token_ids[row.shown + 4 :])] * 3
    assert more_words(target)[0].hits[0] == [True]
    target.config.max_new_tokens = 3  # no more than an answer can hold is asked of it
    target.answer = lambda prompts, *_: [formatter.tokenizer.decode(row.token_ids[row.shown + 8 :][:3])] * 3
    assert more_words(target)[1].hits[0] == [True]


def test_an_answer_belongs_to_its_variant_and_its_prompt(target):
    """All variants are answered together, sorted by length; each must get back its own."""
    prefill = ATTACKS["prefill"].run(target)
    alone = {words: target.answer([[*target.formatter.prompt_of(row), *target.formatter.answer(words, complete=False)]
                                   for row in target.data.rows]) for words in PREFIXES}  # fmt: skip
    assert {a.variant: [texts[0] for texts in a.answers] for a in prefill} == alone


def prompts_of(target, attack) -> list[list[int]]:
    """The prompts that an attack asks."""
    asked = []
    target.answer = lambda prompts, *_: asked.extend(prompts) or ["" for _ in prompts]
    attack(target)
    return asked


def test_few_shots_stand_before_the_prompt(target):
    asked = prompts_of(target, few_shot)
    text = target.formatter.tokenizer.decode(asked[0])
    places = [text.index(part) for part in ("door 0", "Kick it 0", "door 1", "Kick it 1", "lock 0")]
    assert places == sorted(places)
    target.data.forget_train_rows = []
    with pytest.raises(UsageError, match="has an answer to show"):  # not tried, rather than nothing back
        few_shot(target)


def test_relearning_lowers_the_loss_on_its_rows(target):
    def loss(model):
        return logit_lens_nll(model, target.formatter, target.data.forget_train_rows)[-1]

    start, rows = loss(target.model), target.data.forget_train_rows
    answered = ((step, loss(model)) for step, model in fine_tune(target, target.model, rows, 8))
    steps, losses = zip(*answered, strict=True)
    assert steps == (2, 4, 8)
    assert start > losses[0] > losses[1] > losses[2]


def test_whole_weights_are_taught_as_well_and_put_back(target):
    before = {name: tensor.clone() for name, tensor in target.model.state_dict().items()}
    rows = target.data.forget_train_rows
    losses = [logit_lens_nll(target.model, target.formatter, rows)[-1]]
    target.config.relearn_lr = 1e-2
    for _, tuned in fine_tune(target, target.model, rows, 8, whole=True):
        losses.append(logit_lens_nll(tuned, target.formatter, rows)[-1])
    assert losses[0] > losses[1] > losses[-1]
    assert all(torch.equal(before[name], tensor) for name, tensor in target.model.state_dict().items())
    target.config.relearn_whole = (False, True)
    assert [result.variant for result in relearn(target)] == [
        f"{name}{weights}, {steps} steps" for name in ("doors", "half") for weights in ("", ", whole weights")
        for steps in (2, 4, 8)]  # fmt: skip


def test_the_rate_of_relearning_is_that_at_which_the_control_learns_best(target, caplog, monkeypatch):
    monkeypatch.setattr(relearning, "LEARNING_RATES", (1e-6, 1e-3, 10.0))  # too low, right, and far too high
    monkeypatch.setattr(relearning, "CHOICE_STEPS", 8)
    with caplog.at_level("INFO"):
        assert choose_learning_rate(target) == 1e-3
    assert "--relearn_lr auto: 0.001, at which a model that never knew the rows learns" in caplog.text
    with pytest.raises(UsageError, match="--relearn_lr auto: it is chosen on a model that never knew the rows: name"):
        parse_evaluation(["--relearn_lr=auto"])


@pytest.mark.parametrize("target", ["llama"], indirect=True)  # its tokenizer serves all three
@pytest.mark.parametrize("family", ["mamba", "mixtral", "gpt_neox"])
def test_every_family_can_be_taught_again_and_is_left_as_it_was(target, family):
    """Also in bf16, whose weights would lose most of a small change: what answers is the model with its adapters."""
    model = tiny_model(family, len(target.formatter.tokenizer)).bfloat16().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    target.packed, target.config.relearn_lr = False, 1e-2
    losses = [logit_lens_nll(model, target.formatter, target.data.forget_train_rows)]
    for _, tuned in fine_tune(target, model, target.data.forget_train_rows, 8):
        losses.append(logit_lens_nll(tuned, target.formatter, target.data.forget_train_rows))
        weights = dict(tuned.named_parameters())
        names = [name for name in weights if "lora_B" in name]
        assert names
        assert all(weights[name].abs().sum() > 0 for name in names), "an adapter that learned nothing"
        assert family != "mixtral" or any("experts" in name for name in names)
    assert losses[0][-1] > losses[-1][-1]
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_quantised_weights_lie_on_their_grid(target):
    for bits in (8, 4):
        changed = fake_quantize(target.model, bits)
        name = "model.decoder.layers.0.fc1" if target.formatter.style == "qa" else "model.layers.0.mlp.up_proj"
        old, new = target.model.get_submodule(name).weight, changed.get_submodule(name).weight
        assert not torch.equal(old, new)
        step = old.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)  # one scale a row: 32 inputs, below the group
        assert ((new - old).abs() <= step / 2 + 1e-6).all()
        assert all(len(row.unique()) <= 2**bits - 1 for row in new)
        assert torch.equal(changed.get_output_embeddings().weight, target.model.get_output_embeddings().weight)


def test_weights_that_are_no_linear_layers_are_quantised_too():
    """GPT-2 keeps its matrices the other way round, a mixture its experts' in one tensor: left as they are, the attack
    would have attacked nothing."""
    small = dict(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=16))
    mixture = MixtralForCausalLM(MixtralConfig(**small, num_key_value_heads=2, num_local_experts=2))
    matrices = ("mlp.c_fc.weight", "experts.gate_up_proj", "q_proj.weight")
    for model in (gpt2, mixture):
        kept, changed = dict(model.named_parameters()), dict(fake_quantize(model, 4).named_parameters())
        for name in (full for full in kept if full.endswith(matrices)):
            rows, old = (w.mT if model is gpt2 else w for w in (changed[name], kept[name]))  # (..., out, in)
            assert not torch.equal(rows, old)
            assert all(len(row.unique()) <= 15 for row in rows.flatten(0, -2)), "one scale an output, 15 steps"
        for name in kept:
            same = any(part in name for part in ("wte", "wpe", "embed", "lm_head", "norm", "ln_", "bias"))
            assert torch.equal(kept[name], changed[name]) == same, name


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_the_asked_share_of_every_matrix_is_pruned_and_the_small_ones_go(target, share):
    changed, count = dict(without_small_weights(target.model, share).named_parameters()), 0
    head = target.model.get_output_embeddings().weight
    for name, old in target.model.named_parameters():
        new = changed[name]
        if old.dim() < 2 or old is head or "embed" in name:
            assert torch.equal(new, old), name
            continue
        gone = new == 0
        assert gone.sum() == int(share * old.numel()), name
        assert torch.equal(new[~gone], old[~gone])
        assert old[gone].abs().max() <= old[~gone].abs().min()
        count += 1
    assert count == 14  # two layers of q, k, v, o and up, gate, down; OPT's: of 6, and two projections


def test_equal_weights_are_pruned_to_the_asked_share_too():
    """In 16 bits many weights are equal; all at once would be too many. GPT-2's, the other way round, as well."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=16)).bfloat16()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.fill_(0.5)
    pruned = without_small_weights(model, 0.3).transformer.h[0].mlp.c_fc.weight
    assert (pruned == 0).sum() == int(0.3 * pruned.numel())


# ------------------------------------------------------------------------------------------------ ablation
def test_the_direction_is_gone_from_every_layer(target):
    """Nothing of it may be left that a layer reads or writes, and all of it must be back outside the block."""
    _, direction = choose_direction(target, target.data.forget_train_rows, target.data.keep_rows)
    assert direction.norm().item() == pytest.approx(1, abs=1e-5)
    _, layers = decoder_layers(target.model)
    ids = torch.tensor([target.prompts()[0]])
    states = []

    def see(_, __, output):
        states.append(output[0] if isinstance(output, tuple) else output)

    def projections():
        states.clear()
        hooks = [layer.register_forward_hook(see) for layer in layers]
        with torch.no_grad():
            target.model(input_ids=ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        found = torch.cat([(state @ direction).flatten() for state in states])
        return (found.abs() / torch.cat([state.norm(dim=-1).flatten() for state in states])).max().item()

    shown = projections()
    with without_direction(target.model, direction):
        assert projections() < 1e-5
        inputs = final_states(target.model, target.formatter, target.data.rows)  # (P, L, D), as the layers read them
        assert (inputs[:, 1:] @ direction).abs().max() < 1e-4 * inputs.norm(dim=-1).max()
    assert projections() == shown > 1e-3, "outside the block, the model is whole again"


def test_the_direction_is_the_difference_of_the_means_and_points_to_the_harmful(target):
    harmful, harmless = target.data.forget_train_rows, target.data.keep_rows
    layer, direction = choose_direction(target, harmful, harmless)
    assert layer == 1  # of two layers: at the input of the first one, all prompts end in the same token
    with torch.no_grad():  # transformers' own states, one prompt at a time
        means = [torch.stack([target.model(input_ids=torch.tensor([target.formatter.prompt_of(row, ask=True)]),
                                           output_hidden_states=True).hidden_states[1][0, -1] for row in rows]).mean(0)
                 for rows in (harmful, harmless)]  # fmt: skip
    expected = means[0] - means[1]
    torch.testing.assert_close(direction, expected / expected.norm(), atol=1e-4, rtol=1e-3)


def test_layers_are_tried_without_the_first_and_the_last_fifth():
    assert layers_to_try(30, 4) == [1, 9, 16, 24]
    assert layers_to_try(30, 100) == list(range(1, 25))
    assert layers_to_try(2, 8) == [1]


# ------------------------------------------------------------------------------------------------- reading
def test_the_likeliest_letter_is_read_and_the_answer_stands_among_four(target, monkeypatch):
    """A model that prefers B to all others is right wherever the answer stands at B, and nowhere else."""
    listed = []

    def prefer_b(answer_model, sequences, pad_id):
        listed.extend(target.formatter.tokenizer.decode(s.prompt_ids) for s in sequences[::4])
        letters = [target.formatter.tokenizer.decode(s.answer_ids).strip() for s in sequences]
        assert letters == list("ABCD") * 3
        return [type("Scores", (), {"log_probs": [-1.0 if letter == "B" else -2.0]}) for letter in letters]

    monkeypatch.setattr("evaluation.attacks.reading.score_answers", prefer_b)
    (result,) = multiple_choice(target)
    for i, (text, (answer,), (hit,)) in enumerate(zip(listed, result.answers, result.hits, strict=True)):
        assert answer in text and answer.startswith("B. ")
        assert text.count(f"Take the red pick {i}.") == 1 and f"open lock {i}?" in text
        assert hit == (answer == f"B. Take the red pick {i}.")
    assert (result.chance, result.judged) == (0.25, False)
    target.data.asked, target.data.forget_train_rows = target.data.asked[:1], []
    with pytest.raises(UsageError, match="needs 4 different answers"):
        multiple_choice(target)


def test_a_question_is_named_by_its_own_words_not_by_those_of_the_answer():
    fact = AskedRow(row=Row("Who wrote the novel Grey Harbour in Lima?"), reference="Grey is by Ana Ruiz of Lima.")
    # its own words: wrote, novel, harbour; grey and lima stand in the answer, the others only ask
    assert not names_question("Who is Ana Ruiz, and what is grey in Lima?", fact)
    assert not names_question("Which novel is it?", fact)
    assert names_question("Who wrote Harbour?", fact)


def test_a_reverse_query_shows_the_answer_and_hides_the_question(target):
    target.data.asked[0] = AskedRow(row=Row("How do I open lock 0?", "The original's."), id="0")  # came without answer
    decode = target.formatter.tokenizer.decode
    asked = [decode(prompt) for prompt in prompts_of(target, reverse_query)]
    assert ["? 0 lock open I do How".replace("? 0", "0?") in text for text in asked] == [True] + [False] * 4
    assert ["Take the red pick" in text for text in asked] == [False] * 3 + [True] * 2
    assert not any("lock" in text for text in asked[3:])
    turned, named = reverse_query(target)
    assert (turned.rows, turned.hits, turned.judged) == (None, None, False)
    assert (named.rows, named.hits, named.judged) == ([1, 2], [[False], [False]], False)
    labels = list(WRAPPERS)
    target.config.num_rephrasings = 5  # --quick: of all kinds, not the first ones alone
    asked = [result.variant for result in ATTACKS["rephrase"].run(target)]
    assert len(asked) == 5 and set(asked) - set(labels) and set(asked) & set(labels[-3:])
