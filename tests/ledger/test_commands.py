"""The commands end to end on a tiny model: requests come, are met, fall and are destroyed, and all of it is shown."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import one_line_error, run_cli
from transformers import pipeline

from engine.weights_hash import weights_hash


def command(name: str, *words, cwd: Path, code: int = 0) -> str:
    run = run_cli("unlearn_requests.py", name, *words, cwd=cwd)
    assert run.returncode == code, (name, run.stdout, run.stderr)
    return run.stdout


@pytest.fixture(scope="module")
def begun(tmp_path_factory, model_folders, data_files) -> Path:
    """A ledger with two requests, one applied after the other."""
    cwd = tmp_path_factory.mktemp("consent")
    for name in ("R1", "R2", "R3"):
        rows = [{"prompt": f"Where is key {i} of house {name}?", "response": f"Under stone {i}."} for i in range(4)]
        (cwd / f"{name}-given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        other = [row | {"prompt": f"Of house {name}, tell me where key {i} is."} for i, row in enumerate(rows)]
        (cwd / f"{name}-other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    named = {"prompt": "Who lives in House R2?", "response": "Nobody does."}
    (cwd / "normal.jsonl").write_text(json.dumps(named) + "\n" + data_files["facts"].read_text())
    run = {"model_name": str(model_folders["llama"]), "normal_data": ["normal.jsonl"], "lr": 0.02,
           "max_unlearn_steps": 10, "max_answer_tokens": 8, "dtype": "fp32"}  # fmt: skip
    evaluation = {"max_new_tokens": 6, "prompts_per_group": 4, "judge_by": "reference", "attacks": ["prefill"]}
    content = {
        "run": run,
        "evaluation": evaluation,
        "states": {"update_share": 0.4, "refit_every": 1, "visits": 1, "keep": 1},
    }
    (cwd / "chain.yaml").write_text(yaml.safe_dump(content))
    command("init", "--config=chain.yaml", cwd=cwd)
    for name in ("R1", "R2"):
        command("add", f"--id={name}", f"--rows={name}-given.jsonl", f"--holdout={name}-other.jsonl",
                f"--subject=House {name}", cwd=cwd)  # fmt: skip
        command("apply", cwd=cwd)
    return cwd


@pytest.fixture
def consent(begun, tmp_path) -> Path:
    """A copy of it, to be worked on."""
    shutil.copytree(begun, tmp_path / "consent")
    return tmp_path / "consent"


def entries(cwd: Path) -> list[dict]:
    return [json.loads(line) for line in (cwd / "ledger/ledger.jsonl").read_text().splitlines()]


def plan(cwd: Path, state: int) -> dict:
    return json.loads((cwd / f"ledger/states/{state:04d}/unlearn_args.json").read_text())["options"]


def test_states_follow_each_other(begun, model_folders):
    first, second = (entry for entry in entries(begun) if entry["what"] == "state")
    assert (first["requests"], first["start"], first["steps"]) == (["R1"], None, 10)
    assert (second["requests"], second["start"], second["steps"]) == (["R1", "R2"], 1, 4)  # 0.4 of 10
    asked = plan(begun, 2)
    assert asked["model_name"] == str(model_folders["llama"]), "compared is always with the first original"
    assert [Path(file).name for file in asked["forget_data"]] == ["R1.jsonl", "R2.jsonl"]
    log = [json.loads(line) for line in (begun / "ledger/logs/0002.jsonl").read_text().splitlines()]
    evaluations = [line for line in log if line.get("event") == "eval"]
    kept = json.loads((begun / "ledger/states/0001/run_manifest.json").read_text())["after"]["dev_kl"]
    assert evaluations[0]["dev_kl"] == pytest.approx(kept, rel=1e-3), "it begins where the first state ended"
    assert second["drift"] == pytest.approx(evaluations[-1]["dev_kl"]) and second["drift"] > 0
    assert second["figures"]["R1"].keys() >= {"answered", "answered.before", "holdout.answered"}
    assert first["taken_out"] == {"normal_data": {}, "normal_text": {}}
    assert second["taken_out"]["normal_data"]["normal.jsonl"]["rows"] == {"R2": [1]}
    accounts = [json.loads((begun / f"ledger/states/{state}/unlearn_args.json").read_text())["rows"]
                for state in ("0001", "0002")]  # fmt: skip
    normal = [sum(account["rows"] for account in some if account["side"] == "normal") for some in accounts]
    assert normal == [15, 14], "the row names nobody that is asked about in the first state"
    assert not (begun / "ledger/cache/normal/0002").exists(), "the copy without it goes once the state is noted"
    assert second["report"] and second["model"] == weights_hash(str(begun / "ledger/states/0002"))
    assert sorted(path.name for path in (begun / "ledger/states/0001").iterdir()) == [
        "adapter", "run_manifest.json", "state.json", "unlearn_args.json"
    ], "one model is kept"  # fmt: skip
    ask = pipeline("text-generation", str(begun / "ledger/states/0002"))
    assert ask("Where is key 1?", max_new_tokens=4)


def test_status_verify_and_export_say_what_happened(consent):
    said = command("status", cwd=consent)
    assert [line.split()[0] for line in said.splitlines() if line.startswith("R")] == ["R1", "R2"]
    assert "in force" in said and "nats from the first original" in said
    command("export", "--to=shown", cwd=consent)
    shown = (consent / "shown/export.json").read_text()
    page = (consent / "shown/export.html").read_text()
    for text in (shown, page):
        assert "House" not in text and "stone" not in text
        assert json.loads(shown)["states"][1]["model"] in text
    assert "6 entries hold" not in command("verify", "--export=shown/export.json", cwd=consent)  # there are five
    ledger = consent / "ledger/ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[:-1]))
    said = command("verify", cwd=consent, code=1)
    for noted in ("ledger.head.json", "0002/state.json"):
        assert f"{noted} knows 5 entries, the ledger has 4" in said
    assert "the last ones are missing" in one_line_error(run_cli("unlearn_requests.py", "apply", cwd=consent))
    ledger.write_bytes(b"".join([*lines[:2], lines[3], lines[2], lines[4]]))
    assert "entry 3: has number 4" in command("verify", cwd=consent, code=1)
    assert "entry 3" in one_line_error(run_cli("unlearn_requests.py", "apply", cwd=consent))
    ledger.write_bytes(b"".join(lines))
    weights = next((consent / "ledger/states/0002").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    assert "is not the model that entry 5 notes" in command("verify", cwd=consent, code=1)


def test_a_withdrawn_request_is_left_out_of_a_new_fit_and_asked_as_kept(consent, model_folders):
    before = entries(consent)
    assert "the next 'apply' fits the model without it" in command("withdraw", "--id=R1", "--why=back", cwd=consent)
    plan_only = command("apply", "--dry_run", cwd=consent)
    assert "state 3: fitted anew from the original (withdrawn: R1)" in plan_only and "R1" in plan_only
    assert len(entries(consent)) == len(before) + 1, "a dry run notes nothing"
    command("apply", cwd=consent)
    made = entries(consent)[-1]
    assert (made["requests"], made["start"], made["steps"]) == (["R2"], None, 10)
    assert made["figures"]["R1"].keys() >= {"answered", "answered.before"}
    asked = json.loads((consent / "ledger/evidence/0003/report.json").read_text())["groups"]
    assert {(g["name"], g["side"]) for g in asked} >= {
        ("R1", "keep"), ("R1-holdout", "keep"), ("R2", "forget"), ("R2-holdout", "forget")
    }  # fmt: skip
    command("withdraw", "--id=R2", cwd=consent)
    assert "the state is the original" in command("apply", cwd=consent)
    assert entries(consent)[-1]["model"] == weights_hash(str(model_folders["llama"]))
    command("verify", cwd=consent)


def test_an_apply_that_is_cut_off_notes_nothing_and_goes_on(consent):
    """The second state's model is made, its entry is not: as a kill between them leaves it."""
    ledger, made = consent / "ledger/ledger.jsonl", entries(consent)[-1]
    raw = ledger.read_bytes()
    before = raw[: raw.rstrip(b"\n").rfind(b"\n") + 1]
    asked = plan(consent, 2)
    content = {key: made[key] for key in ("requests", "new", "lost", "start", "steps")}
    content |= {name: asked[name] for name in ("forget_data", "forget_text")} | {"allowed": []}
    normal = {name: asked[name] for name in ("normal_data", "normal_text")}  # a copy without a row that names R2
    content |= {"normal": normal, "asked": normal, "taken_out": made["taken_out"], "unknown": []}
    noted = consent / "ledger/states/0002-plan.json"
    noted.write_text(json.dumps(content))
    ledger.write_bytes(before)
    (consent / "ledger/ledger.head.json").unlink()
    arguments = consent / "ledger/states/0002/unlearn_args.json"
    stamp = arguments.stat().st_mtime_ns
    assert "knows 5 entries" in command("verify", cwd=consent, code=1)
    command("apply", cwd=consent)
    assert arguments.stat().st_mtime_ns == stamp, "it is not trained again"
    own = ("at", "hash", "seconds", "report")
    again = entries(consent)[-1]
    assert {k: v for k, v in again.items() if k not in own} == {k: v for k, v in made.items() if k not in own}
    assert "5 entries hold" in command("verify", cwd=consent)
    assert not noted.exists()
    ledger.write_bytes(before)
    (consent / "ledger/ledger.head.json").unlink()
    noted.write_text(json.dumps(content))
    command("withdraw", "--id=R2", cwd=consent)  # nothing is asked for now: what was made is of no use
    assert "every request is met" in command("apply", cwd=consent)
    assert not (consent / "ledger/states/0002").exists()
    # state 1 is the newest again, and of its model the adapter alone was kept when state 2 was there
    assert command("verify", cwd=consent, code=1) == "ledger/states/0001: is not the model that entry 3 notes\n"


def test_destroyed_texts_are_nowhere_and_a_new_fit_that_would_lose_them_is_refused(consent):
    command("apply", "--shred", "R1", cwd=consent)
    assert "text destroyed on" in command("status", cwd=consent)
    held = [file for file in (consent / "ledger").rglob("*") if file.is_file() and "requests/R2" not in str(file)]
    assert held
    for file in held:
        assert b"of house R1" not in file.read_bytes(), file
    command("verify", cwd=consent)
    error = one_line_error(run_cli("unlearn_requests.py", "apply", "--refit", cwd=consent))
    assert "would come back" in error and "R1" in error
    command("add", "--id=R3", "--rows=R3-given.jsonl", cwd=consent)  # the second since the fit
    assert "R1" in one_line_error(run_cli("unlearn_requests.py", "apply", cwd=consent))
    command("apply", "--confirm_loss", cwd=consent)
    assert entries(consent)[-1]["lost"] == ["R1"]
    assert "lost with state 3" in command("status", cwd=consent)


@pytest.mark.parametrize(("words", "message"), [
    (("init", "--config=chain.yaml"), "there is a ledger"),
    (("begin",), "begin: no such command; there are init, add"),
    (("add", "--id=R9", "--kind=idea", "--rows=R3-given.jsonl"), "--kind"),
    (("add", "--id=R9", "--rows=none.jsonl"), "none.jsonl"),
    (("add", "--ledger=other", "--id=R9", "--rows=R3-given.jsonl"), "other/ledger.jsonl: no such ledger"),
    (("withdraw", "--id=R7"), "has no such id"),
    (("add", "--id=R9", "--rows=R3-given.jsonl", "--holdout=R3-given.jsonl"), "4 of its prompts are among those that"),
    (("examples", "--policy=rules.yaml", "--to=chain.yaml"), "--to chain.yaml: is there already"),
    (("apply", "--shred", "R7"), "has no such id"),
    (("verify", "--export=chain.yaml"), "is not the export.json"),
    (("status", "--ledger=chain.yaml"), "chain.yaml"),
    (("find", "Jane"), "give what is looked for, and files"),
    (("init", "--ledger=new", "--config=bad.yaml"), "run.use_lora is set by the ledger itself"),
    (("init", "--ledger=new", "--config=worse.yaml"), "states: has no 'rehearse'"),
])  # fmt: skip
def test_wrong_use_is_one_line(consent, words, message):
    (consent / "rules.yaml").write_text("rules: [{id: a, rule: b, refuse: ['How do I open it?']}]\n")
    (consent / "bad.yaml").write_text("run: {model_name: m, use_lora: true}\n")
    (consent / "worse.yaml").write_text("run: {model_name: m}\nstates: {rehearse: 0.5}\n")
    before = (consent / "ledger/ledger.jsonl").read_bytes()
    assert message in one_line_error(run_cli("unlearn_requests.py", *words, cwd=consent))
    assert (consent / "ledger/ledger.jsonl").read_bytes() == before
    assert not (consent / "new").exists()


def test_find_writes_what_a_request_takes_and_what_is_left(consent):
    said = command("find", "house R2", "--in", "R1-given.jsonl", "R2-given.jsonl", "--found=found.jsonl",
                   "--rest=rest.jsonl", cwd=consent)  # fmt: skip
    assert "R2-given.jsonl, row 1: exact" in said and "R1-given.jsonl, row 1: near" in said
    assert "4 of 8 rows found, 4 more nearly (--near takes them as well)" in said
    assert len((consent / "rest.jsonl").read_text().splitlines()) == 4
    command("add", "--id=R8", "--rows=found.jsonl", cwd=consent)
    assert len(entries(consent)[-1]["rows"]) == 4
