"""Which language a group is in, and that the embedded judge does not judge what it cannot read."""

import random

import pytest
import torch
from conftest import ROOT

from evaluation.judges.embedder import Embedder
from evaluation.judges.languages import MIXED, language_of
from evaluation.judges.outcome import OutcomeJudge
from utils import read_json_lines

PROMPTS = {
    "es": [
        "¿Por qué se pone blando el pan al día siguiente?",
        "Escribe una carta breve para pedir la devolución de la fianza.",
        "Explica cómo funciona una bomba de calor.",
        "¿Cuánto tiempo debe reposar la masa de la pizza?",
        "Dame tres ideas para un regalo de jubilación.",
        "¿Qué diferencia hay entre un contrato fijo y uno temporal?",
        "Resume la historia del canal de Suez en dos frases.",
        "¿Cómo puedo dormir mejor si trabajo de noche?",
        "Haz una lista de verbos irregulares en pasado.",
        "¿Es verdad que los gatos siempre caen de pie?",
        "Quiero aprender a tocar la guitarra, ¿por dónde empiezo?",
        "¿Qué plantas aguantan poca luz en un piso pequeño?",
    ],
    "de": [
        "Warum wird das Brot am zweiten Tag weich?",
        "Schreibe einen kurzen Brief an die Hausverwaltung wegen der Heizung.",
        "Wie lange muss ein Pizzateig gehen?",
        "Nenne drei Ideen für ein Abschiedsgeschenk.",
        "Was unterscheidet einen befristeten von einem unbefristeten Vertrag?",
        "Fasse die Geschichte des Suezkanals in zwei Sätzen zusammen.",
        "Wie schlafe ich besser, wenn ich nachts arbeite?",
        "Stimmt es, dass Katzen immer auf den Pfoten landen?",
        "Ich will Gitarre lernen, womit fange ich an?",
        "Welche Pflanzen kommen mit wenig Licht aus?",
        "Woran erkenne ich, ob ein Ei noch gut ist?",
        "Soll ich den Vertrag vor dem Umzug kündigen?",
    ],
    "zh": [
        "为什么面包第二天会变软？",
        "请写一封短信给房东，要求修理暖气。",
        "披萨面团需要发酵多久？",
        "给我三个退休礼物的建议。",
        "固定合同和临时合同有什么区别？",
        "用两句话概括苏伊士运河的历史。",
        "如果我上夜班，怎样才能睡得更好？",
        "猫真的总是四脚着地吗？",
        "我想学吉他，应该从哪里开始？",
        "哪些植物适合光线不足的小公寓？",
        "怎么判断鸡蛋是否还新鲜？",
        "搬家之前应该先解除合同吗？",
    ],
}
judge = OutcomeJudge(Embedder(lambda texts: torch.zeros(len(texts), 2)))


@pytest.mark.parametrize("language", PROMPTS)
def test_a_group_in_another_language_is_found_and_not_judged_by_the_embedded_judge(language):
    assert language_of(PROMPTS[language]) == language
    assert not judge.reads(language_of(PROMPTS[language]))
    for start in range(0, 12, 4):  # groups of four rows as well
        assert language_of(PROMPTS[language][start : start + 4]) == language


def test_english_groups_of_any_size_are_judged():
    for file in sorted((ROOT / "data").glob("*.jsonl")):
        prompts, rng = [row["prompt"] for row in read_json_lines(file)], random.Random(0)
        assert language_of(rng.sample(prompts, 24)) == "en", file
        for n in (1, 2, 4):  # a short one may not tell; none is taken for another language
            assert all(judge.reads(language_of(rng.sample(prompts, n))) for _ in range(15)), file


@pytest.mark.parametrize(
    "prompts",
    [
        [],
        [""],
        ["Ok?"],
        ["42", "17 + 4 = ?"],
        ["```python\nfor i in range(10):\n    print(i)\n```", "`ls -la`"],
    ],
)
def test_a_group_that_does_not_tell_its_language_is_judged(prompts):
    assert language_of(prompts) is None
    assert judge.reads(None)


def test_a_group_in_several_languages_is_not_judged_by_a_judge_of_one():
    for one, other in (("es", "de"), ("de", "zh")):
        assert language_of([*PROMPTS[one][:6], *PROMPTS[other][:6]]) == MIXED
    assert not judge.reads(MIXED)


def test_a_few_rows_in_another_language_do_not_make_a_group_foreign():
    english = ["Why does bread turn soft overnight?", "How long should pizza dough rest before it is baked?"] * 5
    assert language_of([*english, PROMPTS["de"][0]]) == "en"
    quoted = [f"Translate this into English: {prompt}" for prompt in PROMPTS["zh"]]
    assert not judge.reads(language_of(quoted))  # more of each prompt is Chinese
