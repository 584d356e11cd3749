"""A hub that cannot be reached is said at once; one that answers, whatever and however late, is left to its client."""

import contextlib
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from conftest import ENVIRONMENT, ROOT, one_line_error, run_cli, run_python
from huggingface_hub import constants

import hub
from sources.rows import read_rows
from utils import UsageError, load_config


@contextlib.contextmanager
def stand_in(answer):
    """A server on this machine: `answer` (handler) writes the reply; gives (address, the lines that it was sent)."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.requestline)
            answer(self)

        do_GET = do_HEAD

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()


def status(code: int):
    def answer(handler):
        handler.send_response(code)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def closed_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{one.getsockname()[1]}"


@pytest.fixture
def at(monkeypatch, tmp_path):
    """A function that sets the address of the hub; nothing is cached, and no proxy set."""

    def set_address(address: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        hub._no_connection.cache_clear()
        huggingface_hub.close_session()  # which read the proxies when it was made

    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield set_address
    hub._no_connection.cache_clear()
    huggingface_hub.close_session()


def test_a_model_and_a_data_set_are_refused_at_once_if_nothing_listens(at):
    at(closed_port())
    started = time.monotonic()
    with pytest.raises(UsageError, match=r"copy it to models/else and pass .* cannot be reached: .*refused"):
        load_config("someone/else")
    with pytest.raises(UsageError, match=r"save it as data/rows.jsonl .* cannot be reached: .*refused"):
        read_rows("someone/rows", "--forget_data")
    assert time.monotonic() - started < 20, "its client would have tried for a minute (datasets alone takes seconds)"


def test_the_whole_command_says_one_line(tmp_path, data_files):
    offline = {"HF_ENDPOINT": closed_port(), "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    run = run_cli("unlearn_harm.py", "--model_name=someone/else", f"--forget_data={data_files['forget']}",
                  f"--normal_data={data_files['facts']}", cwd=tmp_path, env=offline)  # fmt: skip
    assert "copy it to models/else" in one_line_error(run)


def test_a_connection_that_does_not_come_about_is_not_waited_for(at, monkeypatch):
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    with socket.socket() as deaf, contextlib.ExitStack() as held:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for _ in range(4):  # its queue is full, and further connections hang
            waiting = held.enter_context(socket.socket())
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(deaf.getsockname())
        at(f"http://127.0.0.1:{deaf.getsockname()[1]}")
        started = time.monotonic()
        said = hub.why_unreachable("someone/else")
        assert said.startswith("no connection to http://127.0.0.1:")
        assert said.endswith(" within 1 s; HF_HUB_ETAG_TIMEOUT=30 waits longer")
        assert time.monotonic() - started < 10


def test_whatever_answers_is_left_to_its_client(at):
    def late(handler):
        time.sleep(hub.READ_SECONDS + 0.5)
        status(200)(handler)

    for answer in (status(200), status(404), status(503), late):
        with stand_in(answer) as (address, asked):
            at(address)
            assert hub.why_unreachable("someone/else") is None
            assert hub.why_unreachable("someone/rows", "dataset") is None
            assert len(asked) == 1, "once a process"


def test_a_proxy_is_asked_where_one_is_set(at, monkeypatch):
    with stand_in(status(200)) as (address, asked):
        monkeypatch.setenv("HTTP_PROXY", address)
        at("http://hub.invalid")
        assert hub.why_unreachable("someone/else") is None
        assert asked == ["HEAD http://hub.invalid/ HTTP/1.1"]
    monkeypatch.setenv("HTTP_PROXY", closed_port())
    at("http://hub.invalid")
    assert "refused" in hub.why_unreachable("someone/else")


def test_what_is_cached_or_asked_offline_is_not_looked_for(at, tmp_path, monkeypatch):
    at(closed_port())
    (tmp_path / "cache/models--someone--else/snapshots/1a2b").mkdir(parents=True)
    assert hub.why_unreachable("someone/else") is None
    assert hub.why_unreachable("someone/else", "dataset") is not None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.why_unreachable("someone/else", "dataset") is None


def test_a_mirror_gives_its_model(tmp_path, model_folders):
    def serve(handler):
        repository, _, file = handler.path.partition("/resolve/main/")
        path = model_folders["opt"] / file
        found = repository == "/someone/tiny" and path.is_file()
        content = path.read_bytes() if found else b""
        handler.send_response(200 if found else 404)
        handler.send_header("Content-Length", str(len(content)))
        if found:
            handler.send_header("ETag", f'"{hash(file) & 0xFFFFFFFF:08x}"')
            handler.send_header("X-Repo-Commit", "1" * 40)
        else:
            handler.send_header("X-Error-Code", "EntryNotFound")
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(content)

    with stand_in(serve) as (address, asked):
        mirrored = ENVIRONMENT | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        code = "from prompts.tokenizer import load_tokenizer; print(len(load_tokenizer('someone/tiny')))"
        run = run_python("-c", code, cwd=ROOT, env=mirrored)
    assert run.returncode == 0 and int(run.stdout) > 256, run.stderr
    assert asked[0] == "HEAD / HTTP/1.1" and any("tokenizer.json" in line for line in asked)
