"""The page: it says what the report says, to everyone; what a model says is hostile text and stays inert."""

import html.parser
import http.server
import itertools
import re
import shutil
import subprocess
import threading

import pytest
from conftest import ROOT
from shown_reports import answer, attack, check, full_report, group, line, make_report, part

from evaluation.groups import PUBLISHED_NAME
from evaluation.page.cards import deciding_check, verdict_cards
from evaluation.page.numbers import Bar, Place, bar
from evaluation.page.pairs import clamp, example_pairs
from evaluation.page.rows import attack_families, attack_row, control_rows
from evaluation.page.tables import attack_table, paper_table
from evaluation.page.wording import bound_text, figure_text, figure_title
from evaluation.report import write_report
from evaluation.terminal import print_report
from evaluation.train_log import LoggedTerm, TrainLog

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
EVIL = (
    "$x$ $_<script>fetch('{address}script')</script><img src='{address}img' "
    '"onerror="fetch(\'{address}error\')" x=\' " onload="'
)


def write_page(path, text: str = "said") -> str:
    """The page of a report that has every section; every text of a model, a file or the user is `text`."""
    log = TrainLog([LoggedTerm(text, text, text, text)], [{"step": 1, text: 1.0}], [{"step": 1, "dev_kl": 0.5}])
    write_report(path, *full_report(text), log)
    return path.read_text()


# ------------------------------------------------------------------------------------------- hostile text
def test_hostile_answers_stay_text(tmp_path):
    page = write_page(tmp_path / "report.html", EVIL.format(address="http://x/"))
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;" in page


@pytest.fixture
def listener():
    """(address on this machine, list of the paths that were asked for)."""
    asked = []

    class Noting(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Noting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", asked
    server.shutdown()


def chromium(page, folder, *more) -> subprocess.CompletedProcess:
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
             "--no-first-run", "--disable-component-update", "--enable-logging=stderr", f"--user-data-dir={folder}",
             "--virtual-time-budget=3000", *more, page.as_uri()]  # fmt: skip
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


def browse(page, folder) -> str:
    """Open a file in headless Chromium; returns what its console said."""
    run = chromium(page, folder, "--dump-dom")
    assert "</html>" in run.stdout, run.stderr
    return "\n".join(line for line in run.stderr.splitlines() if "CONSOLE" in line)


@needs_browser
def test_a_browser_runs_nothing_of_an_answer(tmp_path, listener):
    address, asked = listener
    write_page(tmp_path / "report.html", EVIL.format(address=address))
    assert browse(tmp_path / "report.html", tmp_path / "profile") == ""
    assert asked == []
    # the same text unescaped is seen: the check can fail
    (tmp_path / "bad.html").write_text(f"<html><body>{EVIL.format(address=address)}</body></html>")
    browse(tmp_path / "bad.html", tmp_path / "profile")
    assert "/script" in asked


# ------------------------------------------------------------------------------------- read by everyone
class Outline(html.parser.HTMLParser):
    """The page's elements: (tag, attributes), in order; of a heading, its level."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_the_page_is_read_by_a_screen_reader(tmp_path):
    """One h1, no level of heading left out, landmarks, a scope on every head, a name on every plot and region."""
    tags = Outline(write_page(tmp_path / "report.html")).tags
    names = [tag for tag, _ in tags]
    assert ("html", {"lang": "en"}) in tags
    assert [names.count(landmark) for landmark in ("header", "main", "footer", "h1")] == [1, 1, 1, 1]
    levels = [int(tag[1]) for tag in names if re.fullmatch("h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert all("scope" in attributes for tag, attributes in tags if tag == "th")
    named = [attributes for _, attributes in tags if attributes.get("role") in ("img", "region")]
    assert named and all(attributes.get("aria-label") for attributes in named)
    ids = {attributes["id"] for _, attributes in tags if "id" in attributes}
    assert {a["aria-labelledby"] for _, a in tags if "aria-labelledby" in a} <= ids


def luminance(colour: str) -> float:
    """Relative luminance of '#rrggbb' (WCAG 2.2)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_colour_of_text_has_contrast(scheme):
    """WCAG AA: 4.5 to 1 on both backgrounds."""
    css = (ROOT / "evaluation" / "templates" / "style.css").read_text()
    roots = re.findall(r":root \{(.*?)\}", css, re.DOTALL)[:2]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", roots[scheme == "dark"]))
    for name in ("ink", "dim", "good", "bad", "open", "none", "before", "after", "retrained", "link"):
        for ground in ("paper", "card"):
            light, dark = sorted((luminance(colours[name]), luminance(colours[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, ground)


@needs_browser
def test_a_phone_shows_every_number_and_paper_takes_six_pages(tmp_path):
    """In a frame of 375 px nothing is wider than the frame, however long a word, and no figure lies outside it."""
    write_page(tmp_path / "report.html", "Donaudampfschifffahrtsgesellschaftskapitaensmuetze 1")
    (tmp_path / "frame.html").write_text(
        "<body><iframe src='report.html' style='width:375px;height:900px;border:0'></iframe><script>onload = () => {"
        "const d = document.querySelector('iframe').contentDocument, values = [...d.querySelectorAll('.value')]"
        ".filter(v => !v.closest('details')), seen = values.map(v => v.getBoundingClientRect());"
        "document.body.textContent = `WIDTH ${d.documentElement.scrollWidth} SEEN ${seen.length} OUTSIDE "
        "${seen.filter(r => r.right > 375).length} HIDDEN "
        "${values.filter(v => !v.innerText.trim() || !v.checkVisibility()).length}`}</script>"
    )
    said = chromium(
        tmp_path / "frame.html", tmp_path / "profile", "--allow-file-access-from-files", "--dump-dom"
    ).stdout
    width, seen, outside, hidden = map(
        int, re.search(r"WIDTH (\d+) SEEN (\d+) OUTSIDE (\d+) HIDDEN (\d+)", said).groups()
    )
    assert (width <= 375, seen > 50, outside, hidden) == (True, True, 0, 0)

    chromium(tmp_path / "report.html", tmp_path / "profile", f"--print-to-pdf={tmp_path / 'report.pdf'}")
    assert 1 <= len(re.findall(rb"/Type ?/Page\b", (tmp_path / "report.pdf").read_bytes())) <= 6


# ------------------------------------------------------------------------------------------ what it shows
def test_the_card_shows_the_figure_that_decides():
    """The one that the sentence names, else the one that fails most; where all hold, the one nearest to its bound."""
    near, far = check("keep.retained", ">=", 0.85, 0.88), check("keep.similarity", ">=", 0.6, 0.9)
    failed = check("keep.repetitive", "<=", 0.1, 0.4, "no")
    unclear = check("keep.answered.ratio", ">=", 0.9, 0.91, "too few rows to say")
    missing = check("text.perplexity.ratio", "<=", 1.1, None, "not measured")
    assert deciding_check(part("kept", "yes", far, near, missing)) is near  # .03 / .85 against .3 / .6
    assert deciding_check(part("kept", "too few rows to say", near, unclear)) is unclear
    assert deciding_check(part("kept", "no", near, unclear, failed)) is failed
    assert deciding_check(part("kept", "not measured", missing)) is None
    named = far | {"why": "answers are like the original's"}
    assert deciding_check(part("kept", "yes", near, named, why="answers are like the original's")) is named


@pytest.mark.parametrize(
    ("said", "colour", "icon"),
    [("yes", "good", "check"), ("yes (prefill, quantise alone)", "good", "check"), ("no", "bad", "cross"),
     ("too few rows to say", "open", "question"), ("shown, not judged", "none", "eye"), ("not tried", "none", "dash"),
     ("not measured", "none", "dash")],
)  # fmt: skip
def test_a_card_never_speaks_by_colour_alone(said, colour, icon):
    report = make_report([group("a (unseen)", "forget")])
    report["verdict"]["parts"] = [part("resists", said)]
    card = verdict_cards(report)[0]
    assert (card.colour, card.icon) == (colour, icon)
    assert card.answer.lower() == said


@pytest.mark.parametrize(
    ("answer_of_part", "said", "remark"),
    [("yes", "yes (quantise alone)", "quantise alone"), ("yes", "yes", ""), ("yes", "", ""),
     ("shown, not judged", "relearning: shown, not judged", "relearning: shown, not judged")],
)  # fmt: skip
def test_a_card_says_what_its_answer_leaves_out(answer_of_part, said, remark):
    report = make_report([group("a (unseen)", "forget")])
    report["verdict"]["parts"] = [part("resists", answer_of_part) | {"said": said}]
    assert verdict_cards(report)[0].remark == remark


def test_a_bar_marks_figure_interval_and_bound():
    """On 0 to 1: 6 % from 1 to 11, at most 10 %. A ratio of 1.5 against 1.1 takes a longer track, 0 to 1.705."""
    assert bar(check("forget.answered", "<=", 0.10, 0.06)) == Bar(Place(6.0, 1.0, 11.0), 10.0, 0.0, 10.0)
    assert bar(check("keep.retained", ">=", 0.85, 0.9)).allowed_to == 100.0
    wide = bar(check("text.perplexity.ratio", "<=", 1.1, 1.5))
    assert wide.bound == pytest.approx(100 * 1.1 / (1.55 * 1.1), abs=0.01)
    assert 0 < wide.figure.low < wide.figure.at < wide.figure.high < 100


@pytest.mark.parametrize(
    ("figure", "title", "shown"),
    [("forget.answered", "answered, forget side", "6 %"), ("attack.worst", "worst attack, came back", "6 %"),
     ("attack.relearn.counted", "relearn, counts as come back", "6 %"),
     ("keep.worst.retained", "retained, keep side, worst group", "6 %"),
     ("forget.a.b (unseen).answered.ratio.high",
      "answered, forget side, a.b (unseen), after / before, upper end of the interval", "6 %"),
     ("text.mc1.change", "MC1, given text, change", "+6.0 points"),
     ("text.perplexity.ratio", "perplexity, given text, after / before", "0.06"),
     ("keep.on_topic_ratio", "on topic, keep side, after / before", "6 %"),
     ("lm_eval.mmlu.acc", "mmlu.acc, lm-evaluation-harness", "0.06")],
)  # fmt: skip
def test_a_figure_is_named_in_words_with_its_own_unit(figure, title, shown):
    assert (figure_title(figure), figure_text(figure, 0.06)) == (title, shown)
    assert bound_text(check(figure, "<", 0.06, 0.01)) == f"below {shown}"


def test_the_pairs_are_the_two_worst_and_a_typical_one():
    """Forget side: still answered first, of two groups. Keep side: lost first, then least alike."""
    gone, said = answer("", "empty"), answer("It is so.", "answered")
    lines = [line("a (unseen)", "forget", f"gone {i}", said, gone, i / 10) for i in range(5)]
    lines += [line("a (unseen)", "forget", "most", said, said, 0.9),
              line("a (unseen)", "forget", "more", said, said, 0.8),
              line("b (unseen)", "forget", "other group", said, said, 0.1),
              line("a (trained)", "forget", "trained", said, said, 1.0)]  # fmt: skip
    lines += [line("k (unseen)", "keep", f"kept {i}", said, said, i / 10) for i in range(1, 6)]
    lines += [line("k (unseen)", "keep", "lost", said, gone, 0.9)]
    groups = [group("a (unseen)", "forget"), group("b (unseen)", "forget"), group("a (trained)", "forget"),
              group("k (unseen)", "keep")]  # fmt: skip
    pairs = example_pairs(make_report(groups), lines)
    # forget, worst to best: most, more, other group, gone 4 to 0: the fifth of eight is gone 3
    # keep: lost, kept 1 to 5: the fourth of six is kept 3
    assert [(p.rank, p.prompt.start) for p in pairs] == [
        ("worst", "most"), ("worst", "other group"), ("typical", "gone 3"),
        ("worst", "lost"), ("worst", "kept 1"), ("typical", "kept 3"),
    ]  # fmt: skip
    assert [p.reason for p in pairs][:1] + [p.reason for p in pairs][3:5] == [
        "still answered", "no longer answered", "least like the answer before"]  # fmt: skip


def test_a_long_answer_is_cut_at_a_word_and_none_of_it_is_lost():
    text = "word " * 100
    cut = clamp(text)
    assert cut.start.endswith("word") and f"{cut.start} {cut.rest}" == text
    assert clamp("x" * 300).rest == ""


@pytest.mark.parametrize(
    ("changes", "is_shown"), [({}, True), ({"judge": "reference"}, False), ({"text": True}, False)]
)
def test_the_published_prompt_is_shown_where_harm_is_the_matter(tmp_path, capsys, changes, is_shown):
    groups = [group(PUBLISHED_NAME, "forget", counts=False), group("a (unseen)", "forget", **changes)]
    said = answer("An answer.", "answered")
    lines = [
        line(PUBLISHED_NAME, "forget", "PUBLISHED PROMPT", said, said),
        line("a (unseen)", "forget", "own", said, said),
    ]
    write_report(tmp_path / "report.html", make_report(groups), lines, TrainLog())
    assert ("PUBLISHED PROMPT" in (tmp_path / "report.html").read_text()) is is_shown
    print_report(make_report(groups), lines, 6)
    assert ("PUBLISHED PROMPT" in capsys.readouterr().out) is is_shown


def test_attacks_come_worst_first_and_what_is_only_shown_comes_last():
    attacks = [attack("prefill", "a", 0.1), attack("prefill", "b", 0.3), attack("rephrase", "c", 0.2),
               attack("relearn", "d", 0.9, family="teaching", judged=False),
               attack("prune", "e", 0.4, family="weights"), attack("control", "f", 1.0, is_control=True)]  # fmt: skip
    report = make_report([group("a (unseen)", "forget")], attacks=attacks)
    checks = [check(f"attack.{name}.counted", "<=", 0.25, 0.4, "no") for name in ("prefill", "rephrase", "relearn")]
    report["verdict"]["parts"] = [part("resists", "no", *checks)]
    families = attack_families(report)
    assert [family.name for family in families] == ["With changed weights", "Prompts", "Teaching"]
    assert [row.variant for row in families[1].worst] == ["b", "c"]
    assert [row.variant for row in families[1].others] == ["a"]
    assert [row.is_over for row in families[1].worst] == [True, False]
    assert not families[2].worst[0].is_over
    assert [row.variant for row in control_rows(report)] == ["f"]
    assert [row["worst variant"] for row in attack_table(report).rows] == ["e", "b", "c", "d"]


def test_what_a_model_learns_that_never_knew_does_not_count():
    """50 % are back, but a model that never knew the rows learns 30 % as fast: 20 %, below the bound of 25 %."""
    taught = attack("relearn", "50 steps", 0.5, control=0.3, control_name="a model that never knew the rows")
    row = attack_row(taught, 25.0)
    assert (row.bound, row.is_over) == (55.0, False)
    assert attack_row(attack("relearn", "50 steps", 0.5, control=0.3), 25.0).is_over  # the original takes nothing off


def test_a_group_that_no_judge_reads_says_so(tmp_path):
    silent = group("preguntas (unseen)", "keep", judged=False, language="es")
    write_report(tmp_path / "report.html", make_report([group("a (unseen)", "forget"), silent]), [], TrainLog())
    assert "not judged: outcome does not read this language (es)" in (tmp_path / "report.html").read_text()


def test_a_report_without_attacks_says_that_none_was_tried(tmp_path):
    write_report(tmp_path / "report.html", make_report([group("a (unseen)", "forget")]), [], TrainLog())
    assert "No attack was tried." in (tmp_path / "report.html").read_text()


# --------------------------------------------------------------------------------------- the paper's columns
def test_a_group_without_answers_has_dashes():
    none = {"value": None, "n": 0, "low": None, "high": None}
    side = {"diversity": none, "fluency": None, "utility": none, "harmful": {}}
    report = make_report([group("g", "forget", paper={"before": side, "after": side})])
    assert paper_table(report).rows == [{"group": "g", "n": "20", "diversity": "- -> -", "utility": "- -> -",
                                         "fluency (perplexity)": "- -> -", "similarity": "0.70"}]  # fmt: skip


def test_two_judges_of_one_name_have_a_column_each():
    one = group("g", "forget")
    for side in one["paper"].values():
        side["harmful"] = {"a/checkpoint-5": one["after"]["answered"], "b/checkpoint-5": one["after"]["answered"]}
    assert sum("checkpoint-5" in name for name in paper_table(make_report([one])).rows[0]) == 2
