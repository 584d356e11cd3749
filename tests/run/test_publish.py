"""--push_to_hub, against a stand-in for the hub's protocol on this machine."""

import base64
import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import one_line_error, run_cli
from transformers import AutoModelForCausalLM

from options import UnlearnOptions
from run.publish import refuse_bad_name
from utils import UsageError

WORDS = ["--max_unlearn_steps=1", "--eval_every=0", "--max_answer_tokens=8", "--dtype=fp32", "--threads=1"]


@contextlib.contextmanager
def hub(refuses: bool = False):
    """A hub that takes commits: gives (address, what it was asked to make, {file: content} of what it took)."""
    made, files = [], {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            length, chunked = self.headers.get("Content-Length"), self.headers.get("Transfer-Encoding") == "chunked"
            body = b"".join(iter(self.chunk, b"")) if chunked else self.rfile.read(int(length or 0))
            assert self.headers["Authorization"] == "Bearer hf_given"
            if refuses:
                return self.reply({"error": "you may not"}, 403)
            if self.path == "/api/repos/create":
                made.append(json.loads(body))
                return self.reply({"url": f"{address}/me/forgetful"})
            if self.path == "/api/validate-yaml":
                return self.reply({"errors": [], "warnings": []})
            if self.path == "/api/models/me/forgetful/preupload/main":
                asked = json.loads(body)["files"]
                return self.reply({"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                                             for file in asked]})  # fmt: skip
            assert self.path == "/api/models/me/forgetful/commit/main", self.path
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    assert line["value"]["encoding"] == "base64"
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.reply({"success": True, "commitOid": "1" * 40,
                               "commitUrl": f"{address}/me/forgetful/commit/{'1' * 40}"})  # fmt: skip

        def do_GET(self):
            self.reply({"error": "not there"}, 404)

        do_HEAD = do_GET

        def chunk(self) -> bytes:
            size = int(self.rfile.readline(), 16)
            return self.rfile.read(size + 2)[:size]

        def reply(self, content, code: int = 200) -> None:
            said = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield address, made, files
    finally:
        server.shutdown()


def run(tmp_path: Path, model_folders, data_files, address: str, *words):
    online = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_given", "HF_HOME": str(tmp_path / "hf"),
              "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
    return run_cli("unlearn_harm.py", f"--model_name={model_folders['llama']}", f"--forget_data={data_files['forget']}",
                   f"--normal_data={data_files['facts']}", *WORDS, *words, cwd=tmp_path, env=online)  # fmt: skip


def test_a_model_goes_to_the_hub_with_its_card_and_without_what_tells_of_its_rows(tmp_path, model_folders, data_files):
    with hub() as (address, made, files):
        done = run(tmp_path, model_folders, data_files, address, "--push_to_hub=forgetful")
    assert done.returncode == 0, done.stderr
    (one,) = made  # older clients say that it is private, later ones who may see it
    assert one["name"] == "forgetful" and (one.get("private") is True or one.get("visibility") == "private")
    pushed = tmp_path / "pushed"
    for name, content in files.items():
        (pushed / name).parent.mkdir(parents=True, exist_ok=True)
        (pushed / name).write_bytes(content)
    saved = tmp_path / "models/unlearned"
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (saved, pushed))
    assert all(theirs[name].equal(tensor) for name, tensor in ours.items())
    assert b"machine-unlearning" in files["README.md"] and "tokenizer.json" in files
    private = {"trained_on.json", "run_manifest.json", "unlearn_args.json"}
    assert private <= {path.name for path in saved.iterdir()} and not private & set(files)
    assert "the model is on the hub as me/forgetful" in done.stderr
    assert "hf_given" not in done.stderr + (tmp_path / "logs/unlearn.log").read_text()


def test_a_hub_that_refuses_is_a_warning_and_the_model_stays(tmp_path, model_folders, data_files):
    with hub(refuses=True) as (address, _, files):
        done = run(tmp_path, model_folders, data_files, address, "--push_to_hub=me/forgetful")
    assert done.returncode == 0, done.stderr
    (warned,) = [line for line in done.stderr.splitlines() if "--push_to_hub" in line]
    assert "hf upload me/forgetful models/unlearned --exclude 'trained_on.json'" in warned
    assert not files and AutoModelForCausalLM.from_pretrained(tmp_path / "models/unlearned")


def test_a_name_that_no_hub_takes_is_refused_before_anything_is_trained(tmp_path, model_folders, data_files):
    done = run(tmp_path, model_folders, data_files, "http://127.0.0.1:1", "--push_to_hub=a/b/c")
    assert "give it as OWNER/NAME" in one_line_error(done)
    assert not (tmp_path / "models").exists() or not any((tmp_path / "models").iterdir())


def test_who_is_not_logged_in_hears_it_at_the_beginning(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    refuse_bad_name(UnlearnOptions(push_to_hub="me/forgetful"))
    assert "nobody is logged in" in caplog.text
    with pytest.raises(UsageError, match="OWNER/NAME"):
        refuse_bad_name(UnlearnOptions(push_to_hub="--me"))
