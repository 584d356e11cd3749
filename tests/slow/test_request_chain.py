"""A chain of requests by the script that measures one: what it says, and that it repeats bit for bit."""

import json
import subprocess
import sys

import yaml
from conftest import ENVIRONMENT, ROOT


def test_a_chain_goes_on_where_it_was_stopped_and_repeats_bit_for_bit(tmp_path, model_folders, data_files):
    rows = [{"prompt": f"Where is key {i} of {name}?", "response": f"Under stone {i}.", "category": name}
            for name in ("Ann", "Bo") for i in range(4)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = [row | {"prompt": row["prompt"].replace("Where is", "In what place lies")} for row in rows]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    run = {"model_name": str(model_folders["llama"]), "normal_data": [str(data_files["facts"])], "lr": 0.02,
           "max_unlearn_steps": 6, "max_answer_tokens": 8, "dtype": "fp32"}  # fmt: skip
    evaluation = {"max_new_tokens": 6, "prompts_per_group": 4, "judge_by": "reference", "quick": True,
                  "attacks": ["prefill"]}  # fmt: skip
    (tmp_path / "ledger.yaml").write_text(
        yaml.safe_dump({"run": run, "evaluation": evaluation, "states": {"visits": 1}})
    )
    asked = {"kind": "person", "rows": "rows.jsonl", "holdout": ["other.jsonl"]}
    steps = [{"add": asked | {"id": "R1", "pick": 1}}, {"add": asked | {"id": "R2", "pick": 2}}, {"withdraw": "R1"}]
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump({"ledger": "ledger.yaml", "steps": steps[:2]}))

    def run_chain(*words):
        command = [sys.executable, str(ROOT / "benchmarks/request_chain.py"), "chain.yaml", "--folder=l", *words]
        done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run_chain()
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump({"ledger": "ledger.yaml", "steps": steps}))
    said = run_chain("--union", "--repeat")
    assert said.count("unlearn_requests.py apply") == 1 + 1 + 3, "the two states that were there are taken as they are"
    assert "yes made a second time: 3 of 3 states have the same weights" in said
    assert "R1, withdrawn, own rows" in said and "R1, withdrawn, held out" in said
    entries = [json.loads(line) for line in (tmp_path / "l/ledger.jsonl").read_text().splitlines()]
    states = [entry for entry in entries if entry["what"] == "state"]
    assert [state["requests"] for state in states] == [["R1"], ["R1", "R2"], ["R2"]]
    trained = json.loads((tmp_path / "l/states/0003/unlearn_args.json").read_text())["options"]["forget_data"]
    assert [file.rpartition("/")[2] for file in trained] == ["R2.jsonl"], "the held-out rows are asked alone"
    assert states[2]["figures"]["R2"].keys() >= {"answered", "holdout.answered", "holdout.answered.before"}
