"""The real client against a small server that speaks the protocol, and all that can go wrong on the way."""

from __future__ import annotations

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from cairn.cli.app import main
from cairn.data.descriptions import read_descriptions
from cairn.experiment.describe import DescribeConfig, is_own_machine, problem_with

NAMES = ("ant", "bee", "cat")
GOOD = ["six thin legs", "two feelers"]


class Server:
    """Answers with what `script` says for the class asked about, one entry per request; the last one stays."""

    def __init__(self):
        self.requests: list[dict] = []
        self.script: dict[str, list] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(asked | {"path": self.path, "key": self.headers["Authorization"]})
                text = asked["messages"][0]["content"][0]["text"]
                name = next(name for name in NAMES if f"'{name}'" in text)
                entries = outer.script.get(name, [GOOD])
                entry = entries.pop(0) if len(entries) > 1 else entries[0]
                if entry == "cut":
                    self.connection.close()
                    return
                status = entry if isinstance(entry, int) else 200
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                if status == 429:
                    self.send_header("retry-after-ms", "1")
                body = json.dumps(outer.answer(entry, asked["model"])).encode()
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    @staticmethod
    def answer(entry, model: str) -> dict:
        if isinstance(entry, int):
            return {"error": {"message": f"status {entry}", "type": "error"}}
        message = {"role": "assistant", "content": None, "refusal": None}
        if isinstance(entry, dict):
            message |= entry
        else:
            message["content"] = entry if isinstance(entry, str) else json.dumps({"sentences": entry})
        return {
            "id": "x",
            "object": "chat.completion",
            "created": 1,
            "model": f"{model}-1",
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.002)
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture
def ask(server, tmp_path, monkeypatch, capsys):
    """Runs `cairn describe` on a folder of three classes; status, output, errors."""
    for split in ("train", "test"):
        for i, name in enumerate(NAMES):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            for j in range(3):
                Image.new("RGB", (40, 30), (80 * i, 60 * j, 90)).save(tmp_path / "pets" / split / name / f"{j}.png")
    monkeypatch.chdir(tmp_path)

    def call(*more: str):
        arguments = ["describe", "--data", "pets", "--sentences", "2", "--guides", "1+1", "--out", "said.json"]
        monkeypatch.setattr("sys.argv", ["cairn", *arguments, "--base-url", server.url, *more])
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code
        out = capsys.readouterr()
        return status, out.out, out.err

    return call


def test_every_class_is_shown_asked_about_and_written(ask, server):
    status, out, err = ask()
    assert (status, err) == (0, "")
    said = read_descriptions("said.json")
    assert said.of(NAMES) == (tuple(GOOD),) * 3
    entry = said.classes["bee"]
    assert entry.model == "gpt-5-1"
    assert len(entry.images) == 2
    assert all("bee" in image for image in entry.images)
    assert "'bee'" in entry.prompt
    assert entry.date.startswith("20")
    assert "330 tokens" in out
    for request in server.requests:
        assert request["path"] == "/v1/chat/completions"
        assert request["key"] == "Bearer a key"
        assert request["response_format"]["json_schema"]["strict"] is True
        text, *pictures = request["messages"][0]["content"]
        assert text["type"] == "text"
        assert len(pictures) == 2
        data = pictures[0]["image_url"]["url"].removeprefix("data:image/png;base64,")
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (40, 30)


def test_what_is_there_is_never_sent_again(ask, server):
    assert ask()[0] == 0
    before = len(server.requests)
    status, out, _ = ask()
    assert status == 0
    assert "described in said.json: 3 of 3 classes" in out
    assert len(server.requests) == before


@pytest.mark.parametrize(
    "first",
    [
        429, 500, "cut", "{broken", "null", ["one"], ["a bee", "two feelers"], ["same", "same"],
        ["word " * 30, "x"], {"refusal": "I cannot"}, {"content": ""},
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_answer_is_asked_for_again(ask, server, first):
    server.script["bee"] = [first, GOOD]
    status, _, err = ask()
    assert (status, err) == (0, "")
    assert read_descriptions("said.json").of(NAMES) == (tuple(GOOD),) * 3
    assert len(server.requests) == 4


def test_a_class_that_is_always_refused_is_left_out_and_named(ask, server):
    server.script["bee"] = [{"refusal": "I cannot"}]
    status, out, err = ask()
    assert status == 2
    assert "class 'bee': given up after 4 answers, the last: refused: I cannot" in out
    assert err.strip() == "cairn: describe: no description of 1 class: bee; run it again"
    assert set(read_descriptions("said.json").classes) == {"ant", "cat"}
    server.script["bee"] = [GOOD]
    before = len(server.requests)
    assert ask()[0] == 0
    assert len(server.requests) == before + 1


def test_a_dead_server_keeps_what_was_done_and_the_same_command_goes_on(ask, server):
    server.script["bee"] = [500]
    status, _, err = ask()
    assert status == 2
    assert "class 'bee'" in err
    assert "the same command goes on here" in err
    assert set(read_descriptions("said.json").classes) == {"ant"}
    server.script["bee"] = [GOOD]
    assert ask()[0] == 0
    assert set(read_descriptions("said.json").classes) == set(NAMES)


@pytest.mark.parametrize("refusal", [401, 403, 404])
def test_a_refused_key_or_model_is_one_line(ask, server, refusal, tmp_path):
    server.script["ant"] = [refusal]
    status, _, err = ask()
    assert status == 2
    assert err.count("\n") == 1
    assert "check key, address and model" in err
    assert not (tmp_path / "said.json").exists()


def test_a_server_on_this_machine_wants_no_key(ask, monkeypatch, tmp_path):
    """As llama.cpp, Ollama and vLLM serve; the address may also come from the environment."""
    monkeypatch.delenv("OPENAI_API_KEY")
    status, _, _ = ask()
    assert status == 0
    assert (tmp_path / "said.json").exists()


@pytest.mark.parametrize(
    ("address", "own"),
    [
        ("http://localhost:11434/v1", True),
        ("http://127.0.0.1:8080/v1", True),
        ("http://[::1]:8000/v1", True),
        ("https://api.openai.com/v1", False),
        ("http://localhost.example.org/v1", False),
        ("http://127.example.org", False),
        ("nonsense", False),
    ],
)
def test_which_addresses_are_this_machine(address, own):
    assert is_own_machine(address) is own


def test_a_server_that_is_not_there_is_named(ask, server):
    server.http.shutdown()
    server.http.server_close()
    status, _, err = ask()
    assert (status, err.count("\n")) == (2, 1)
    assert "no server answers at http://127.0.0.1" in err


def test_no_key_is_one_line(ask, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    status, _, err = ask("--base-url", "https://models.example.org/v1")
    assert (status, err.count("\n")) == (2, 1)
    assert "set OPENAI_API_KEY" in err


def test_a_dry_run_sends_nothing(ask, server, tmp_path):
    status, out, _ = ask("--dry-run")
    assert status == 0
    assert "bee: 2 images (" in out
    assert "Never use the name 'bee'" in out
    assert not server.requests
    assert not (tmp_path / "said.json").exists()


def test_damaged_images_of_describe_stop_it_or_are_left_out(ask, server, tmp_path):
    folder = tmp_path / "pets" / "train" / "bee"
    (folder / "1.png").write_bytes(b"damaged")
    status, out, err = ask("--dry-run")
    assert (status, out) == (2, "described in said.json: 0 of 3 classes\n")
    assert "1 image that cannot be read: train/bee/1.png (not an image)" in err
    assert "leave them out with --on-bad-image skip" in err
    status, out, err = ask("--on-bad-image", "skip", "--dry-run")
    assert (status, err) == (0, "")
    assert "note: left out: 1 image that cannot be read: train/bee/1.png (not an image)" in out
    shown = next(line for line in out.splitlines() if line.startswith("bee: "))
    assert {"train/bee/0.png", "train/bee/2.png"} == set(shown.partition("(")[2].partition(")")[0].split(", "))
    for name in ("0.png", "2.png"):
        (folder / name).write_bytes(b"")
    status, _, err = ask("--on-bad-image", "skip")
    assert status == 2
    assert "class 'bee': 3 images that cannot be read" in err
    assert "among them all of this class" in err
    assert not server.requests
    assert not (tmp_path / "said.json").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--guides", "four"), "guides 'four'"), (("--sentences", "0"), "--sentences 0"),
        (("--data", "nowhere"), "nowhere"), (("--towers", "tinny"), "tiny"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(ask, server, options, says):
    status, _, err = ask(*options)
    assert (status, err.count("\n")) == (2, 1)
    assert says in err
    assert not server.requests


def test_names_are_looked_for_as_they_are_spoken():
    config = DescribeConfig(sentences=1)
    answer = json.dumps({"sentences": ["the red fox runs"]})
    assert "contains the class name" in problem_with(answer, "Red_Fox", config)[1]
    assert problem_with(answer, "Red_Fox", config.model_copy(update={"name_free": False}))[1] == ""
