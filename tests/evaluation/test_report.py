"""The page: what a model says is hostile text, and the page asks nothing of anyone."""

import http.server
import json
import shutil
import subprocess
import threading

import pytest

from evaluation.report import paper_rows, write_model_card, write_report
from evaluation.train_log import LoggedTerm, TrainLog

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
RATE = {"value": 0.5, "n": 2, "low": 0.1, "high": 0.9}


def write_page(path, evil: str) -> str:
    """A report in which every text that comes from a model, a file or the user is `evil`."""
    measured = {"on_topic": RATE, "empty": RATE, "repetitive": RATE, "leak": RATE}
    paper = {"diversity": RATE, "fluency": 3.0, "utility": RATE, "harmful": {evil: RATE}}
    spoken = {"recall": RATE, "verbatim": RATE}
    group = {"name": evil, "side": "forget", "style": "qa", "n": 2, "counts": True, "before": measured,
             "after": measured, "length_ratio": RATE, "similarity": RATE, "paper": {"before": paper, "after": paper},
             "rouge_l": {"before": spoken, "after": spoken}, "retained": RATE}  # fmt: skip
    answer = {"answer": evil, "on_topic": True, "empty": False}
    line = {"group": evil, "side": "forget", "prompt": evil, "before": answer, "after": answer}
    figures = {"nll": RATE, "extraction_strength": RATE, "exact_memorisation": RATE}
    report = {
        "before": evil, "after": evil, "on_topic_cosine": 0.3, "groups": [group],
        "judges": {evil: [evil]}, "options": {"max_new_tokens": 4, "model_name": evil, "reward_model": evil},
        "verdict": {"line": evil, "parts": [], "requirements": []},
        "attacks": [{"name": "prefill", "variant": evil, "back": RATE, "examples": [evil]},
                    {"name": "relearn", "variant": "benign rows, 4 steps", "back": RATE, "examples": []},
                    {"name": "relearn", "variant": "benign rows, 8 steps", "back": RATE, "examples": []}],
        "layers": {"before": [1.0], "after": [2.0]},
        "memorised": {"groups": [{"name": evil, "n": 2, "before": figures, "after": figures}],
                      "membership": [{"source": evil, "members": 2, "others": 2, "before": {"loss": 0.5},
                                      "after": {"loss": 0.5}}]},
    }  # fmt: skip
    log = TrainLog([LoggedTerm(evil, evil, evil, evil)], [{"step": 1, evil: 1.0}], [{"step": 1, "dev_kl": 0.5}])
    write_report(path, report, [line], log)
    return path.read_text()


EVIL = (
    "$x$ $_<script>fetch('{address}script')</script><img src='{address}img' "
    '"onerror="fetch(\'{address}error\')" x=\' " onload="'
)


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


def browse(page, folder) -> str:
    """Open a file in headless Chromium; returns what its console said."""
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
             "--no-first-run", "--disable-component-update", "--enable-logging=stderr", f"--user-data-dir={folder}",
             "--virtual-time-budget=3000", "--dump-dom", page.as_uri()]  # fmt: skip
    run = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert "</html>" in run.stdout, run.stderr
    return "\n".join(line for line in run.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_runs_nothing_of_an_answer(tmp_path, listener):
    address, asked = listener
    write_page(tmp_path / "report.html", EVIL.format(address=address))
    assert browse(tmp_path / "report.html", tmp_path / "profile") == ""
    assert asked == []
    # the same text unescaped is seen: the check can fail
    (tmp_path / "bad.html").write_text(f"<html><body>{EVIL.format(address=address)}</body></html>")
    browse(tmp_path / "bad.html", tmp_path / "profile")
    assert "/script" in asked


def test_a_group_without_answers_has_dashes():
    none = {"value": None, "n": 0, "low": None, "high": None}
    side = {"diversity": none, "fluency": None, "utility": none, "harmful": {}}
    group = {"name": "g", "n": 1, "similarity": RATE, "paper": {"before": side, "after": side}}
    assert paper_rows({"groups": [group]}) == [{"group": "g", "n": "1", "diversity": "- -> -", "utility": "- -> -",
                                                "fluency (perplexity)": "- -> -", "similarity": "0.50"}]  # fmt: skip


def test_two_judges_of_one_name_have_a_column_each():
    side = {
        "diversity": RATE,
        "fluency": 2.0,
        "utility": RATE,
        "harmful": {"a/checkpoint-5": RATE, "b/checkpoint-5": RATE},
    }
    group = {"name": "g", "n": 1, "similarity": RATE, "paper": {"before": side, "after": side}}
    assert sum("checkpoint-5" in name for name in paper_rows({"groups": [group]})[0]) == 2


MADE = {"model_name": "opt", "forget_data": ["a.csv"], "normal_data": ["b.csv"], "method": "yao",
        "forget_loss": "ascent", "bad_weight": 0.5, "random_weight": 1.0, "normal_weight": 1.0, "lr": 2e-6,
        "seed": 1}  # fmt: skip
RUN = {"steps": 5, "stop_reason": "done", "kept_step": 4, "seconds": 3.0}


def card_of(folder, options: dict, terms: list[dict] | None = None) -> str:
    made = {"options": options, "run": RUN} | ({"terms": terms} if terms else {})
    (folder / "unlearn_args.json").write_text(json.dumps(made))
    write_model_card(folder)
    return (folder / "README.md").read_text()


def test_a_card_of_a_folder_without_a_recipe_names_method_and_weights(tmp_path):
    card = card_of(tmp_path, MADE)
    assert "| method | `yao`: gradient ascent + random mismatch + KL to the original" in card
    assert "| weights (bad / random / normal) | 0.5 / 1.0 / 1.0 |" in card
    assert "| term |" not in card


def test_a_card_of_a_recipe_has_a_row_a_term(tmp_path):
    """The terms that the run minimised, with the weights that they had; the paper is named for its own recipe alone."""
    terms = [{"name": "forget", "draw": "forget", "loss": "npo", "weight": 0.3},
             {"name": "retain", "draw": "retain", "loss": "kl", "weight": 28.0},
             {"name": "retain_first", "draw": "retain", "loss": "kl", "weight": 12.04}]  # fmt: skip
    unset = dict.fromkeys(("bad_weight", "random_weight", "normal_weight", "forget_loss"))
    card = card_of(tmp_path, MADE | unset | {"method": "selective", "recipe": {"terms": [{"name": "off"}]}}, terms)
    assert "| recipe | `selective` |" in card
    assert "| term | sequences of | loss | weight |\n|---|---|---|---|\n| forget | forget | npo | 0.3 |\n" in card
    assert "| retain_first | retain | kl | 12.04 |\n\n" in card
    assert "None" not in card
    assert "off" not in card
    assert "Yao" not in card
    assert "Yao" in card_of(tmp_path, MADE | unset | {"method": "yao"}, terms)
