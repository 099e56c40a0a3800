"""`--llm-refine` against a stand-in for a language model's server on this machine: what it is asked and may answer."""

from __future__ import annotations

import dataclasses
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from opensora.cli import main
from opensora.config.settings import InferenceSettings
from opensora.errors import ConfigError
from opensora.pipeline import prompt_refiner
from opensora.pipeline.job import Job
from opensora.pipeline.job_spec import JobSpec
from opensora.pipeline.loaded_models import LoadedModels
from opensora.pipeline.prompt_refiner import endpoint, refine_texts
from opensora.pipeline.recipe import read_recipe
from opensora.remote import chat
from opensora.remote.chat import Endpoint
from opensora.utils.config_utils import parse_inference_args
from tests.chat_server import Server, drips, hangs_up, says, sends, silent
from tests.checkpoints import SAMPLE, run_script, tree
from tests.full import some

KEY = "sk-very-secret-0123"
SMALL = ("--num-sampling-steps", "2", "--image-size", "16", "24", "--num-frames", "17", "--verbose", "0")
ASK = (*SMALL, "--llm-refine", "True", "--save-dir", "made")
SETTINGS = InferenceSettings(model={"type": "STDiT3"}, num_frames=1)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that the environment names, asked without a pause."""
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setattr(prompt_refiner, "PAUSE", 0.0)
        for name, value in (("BASE_URL", running.url), ("MODEL", "some-model"), ("API_KEY", KEY)):
            monkeypatch.setenv(f"OPENAI_{name}", value)
        yield running
        running.shutdown()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_cache: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def of(server: Server) -> Endpoint:
    return endpoint(dataclasses.replace(SETTINGS, llm_base_url=server.url))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_what_is_asked(server, caplog):
    assert refine_texts(["a cat", " ", "a dog", "a cat", ""], of(server)) == {
        "a cat": "A Small Cat.", " ": " ", "a dog": "A Small Cat.", "": "",
    }  # fmt: skip
    assert server.texts == ["a cat", "a dog"]
    path, headers, body = server.asked[0]
    asked = json.loads(body)
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert headers["Content-Type"] == "application/json"
    assert set(asked) == {"model", "messages"} and asked["model"] == "some-model"
    assert [message["role"] for message in asked["messages"]] == ["system", "user"]
    wanted = ("paragraph", "english", "120 words", "subject", "does", "setting", "light", "camera", "quotation marks")
    assert all(word in asked["messages"][0]["content"].lower() for word in wanted)
    assert not warnings(caplog)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (" A cat\n\n  on a mat. \n", "A cat on a mat."),
        ('"A cat."', "A cat."),
        ("“A cat.”", "A cat."),
        ('A sign says "stop"', 'A sign says "stop"'),
        ('"Stop", says a "cat"', '"Stop", says a "cat"'),
        ("<think>The user\nwants</think>\nA cat.", "A cat."),
        ("A c\ud800at.", "A cat."),
    ],
)
def test_what_is_kept_of_an_answer(server, content, text):
    server.answers = [says(content)]
    assert refine_texts(["x"], of(server)) == {"x": text}


WRONG = "answer is not a chat completion"
FAILURES = [
    (sends("{"), WRONG),
    (sends("[]"), WRONG),
    (sends("3"), WRONG),
    (sends(b"\xff\xfe\xff"), WRONG),
    (sends("[" * 100_000), WRONG),
    (sends("1" * 5_000), WRONG),
    (sends('{"choices": ' * 60 + "1" + "}" * 60), WRONG),
    (says("." * 20_000), "answer has more than 10,000 characters"),
    (says("a-" * 6_000), "answer has more than 10,000 characters"),
    (sends('{"choices": []}'), WRONG),
    (sends('{"choices": [{"message": {}}]}'), WRONG),
    (sends(json.dumps({"error": {"message": f"wrong key {KEY}"}})), WRONG),
    (says(["a"]), WRONG),
    (says({"a": 1}), WRONG),
    (sends(""), WRONG),
    (says(None), "answer is empty"),
    (says(""), "answer is empty"),
    (says(' "" '), "answer is empty"),
    (says("猫"), "answer is empty"),
    (sends(" " * (chat.MAX_BYTES + 9)), WRONG),
    (sends(f"wrong key {KEY}", 401), "server answers 401"),
    (sends("", 429), "server answers 429"),
]


@pytest.mark.parametrize(("answer", "reason"), FAILURES)
def test_a_text_stays_after_a_failure(server, caplog, answer, reason):
    """The other texts are asked for all the same."""
    server.answers = [answer, says("A dog.")]
    assert refine_texts(["a cat", "b"], of(server)) == {"a cat": "a cat", "b": "A dog."}
    (warning,) = warnings(caplog)
    assert warning.startswith("prompt 'a cat' stays unchanged: the language model's ") and reason in warning
    assert KEY not in caplog.text and len(server.asked) == 2


def test_a_server_in_trouble_is_asked_twice(server, caplog):
    server.answers = [sends("", 503), says("A cat.")]
    assert refine_texts(["x"], of(server)) == {"x": "A cat."}
    assert len(server.asked) == 2 and not warnings(caplog)
    server.asked.clear()
    server.answers = [sends("", 500)] * 2 + [says("never")]
    assert refine_texts(["x"], of(server)) == {"x": "x"}
    assert len(server.asked) == 2 and len(warnings(caplog)) == 1 and "server answers 500" in warnings(caplog)[0]


@pytest.mark.parametrize("answer", [silent, drips])
def test_a_slow_server_is_given_up(server, caplog, monkeypatch, answer):
    """It is asked twice for one text, not at all for the others."""
    monkeypatch.setattr(prompt_refiner, "SECONDS", 0.4)
    server.answers = [answer]
    assert refine_texts(["a", "b", "c"], of(server)) == {"a": "a", "b": "b", "c": "c"}
    assert server.texts == ["a", "a"]
    (warning,) = warnings(caplog)
    assert "prompts from 'a' on stay" in warning and "cannot be reached (no answer within 0 s)" in warning


def test_a_slow_server_may_recover(server, caplog, monkeypatch):
    def patient_from_now_on(handler: BaseHTTPRequestHandler) -> None:
        monkeypatch.setattr(prompt_refiner, "SECONDS", 60.0)
        silent(handler)

    monkeypatch.setattr(prompt_refiner, "SECONDS", 0.5)
    server.answers = [patient_from_now_on, says("A cat.")]
    assert refine_texts(["a"], of(server)) == {"a": "A cat."} and not warnings(caplog)


def test_nobody_answers(server, caplog):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        where = endpoint(dataclasses.replace(SETTINGS, llm_base_url=url))
        assert refine_texts(["a", "b"], where) == {"a": "a", "b": "b"}
    assert len(warnings(caplog)) == 1 and "cannot be reached (Connection refused)" in warnings(caplog)[0]
    where = endpoint(dataclasses.replace(SETTINGS, llm_base_url="http://a..b/v1"))
    assert refine_texts(["a"], where) == {"a": "a"} and "cannot be reached" in warnings(caplog)[1]
    caplog.clear()
    server.answers = [hangs_up]
    assert refine_texts(["a", "b"], of(server)) == {"a": "a", "b": "b"}
    assert len(warnings(caplog)) == 1 and len(server.asked) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_does_not_take_the_key_along(server, caplog, status):
    server.answers = [sends("", status, Location=f"http://localhost:{server.server_port}/elsewhere"), says("A cat.")]
    assert refine_texts(["a"], of(server)) == {"a": "a"}
    assert len(server.asked) == 1 and f"server answers {status}" in warnings(caplog)[0]


def test_no_proxy_is_asked_for_this_machine(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert refine_texts(["a"], of(server)) == {"a": "A Small Cat."}


def test_settings_come_before_the_environment(server):
    assert endpoint(SETTINGS) == (urlsplit(server.url), "some-model", KEY)
    asked = dataclasses.replace(SETTINGS, llm_base_url="https://other.example/api/", llm_model="own")
    assert endpoint(asked) == (urlsplit("https://other.example/api/"), "own", KEY)


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        (["API_KEY"], ["OPENAI_API_KEY"]),
        (["MODEL"], ["OPENAI_MODEL"]),
        (["BASE_URL", "API_KEY"], ["OPENAI_BASE_URL", "OPENAI_API_KEY"]),
    ],
)
@pytest.mark.parametrize("empty", ["", "  ", None])
def test_what_is_missing_is_named(server, monkeypatch, missing, named, empty):
    for name in missing:
        if empty is None:
            monkeypatch.delenv(f"OPENAI_{name}")
        else:
            monkeypatch.setenv(f"OPENAI_{name}", empty)
    with pytest.raises(ConfigError, match="set ") as error:
        endpoint(SETTINGS)
    assert all(name in str(error.value) for name in named) and str(error.value).count("OPENAI_") == len(missing)


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000", "file:///etc/passwd", "ftp://a/v1", "http://", "http://a:b/v1", "http://[::1",
        "http://a b/v1", "https://me:hidden@a/v1", "https://a/v1?key=hidden", "https://a/v1#hidden", "http://ä/v1",
        "http://a\r\nX: y/",
    ],
)  # fmt: skip
def test_wrong_urls(server, url):
    with pytest.raises(ConfigError, match="base URL of the language model is not valid") as error:
        endpoint(dataclasses.replace(SETTINGS, llm_base_url=url))
    assert "hidden" not in str(error.value)


@pytest.mark.parametrize("key", ["se cret", "se\ncret", "secrét"])
def test_a_key_that_is_none_is_not_shown(server, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY holds") as error:
        endpoint(SETTINGS)
    assert "cr" not in str(error.value).replace("character", "")


def test_offline_asks_no_language_model(here, server, capsys):
    assert run_script(SAMPLE, *ASK, "--prompt", "a", "--llm-base-url", server.url, "--llm-model", "m", "--offline") == 1
    assert "llm_refine calls a language model, but offline is set" in capsys.readouterr().err
    assert not server.asked and not Path("made").exists()


def test_the_key_has_no_flag(server):
    with pytest.raises(SystemExit):
        parse_inference_args([SAMPLE, "--llm-api-key", "x"])


def test_videos_of_refined_texts(here, server, capsys, caplog):
    """Each text is asked for once, its scores come after the answer; replay asks nobody and makes the same frames."""
    server.answers = [says("A Tall Jeep in a forest."), says("The desert: a Jeep!")]
    prompt = "|0|a jeep|1|a desert"
    flags = ("--loop", "2", "--num-frames", "34", "--num-sample", "2", "--aes", "6", "--llm-model", "own")
    assert run_script(SAMPLE, *ASK, "--prompt", prompt, *flags, "--llm-base-url", server.url) == 0
    assert server.texts == ["a jeep", "a desert"]
    for name in ("sample_0000-0", "sample_0000-1"):
        recipe = read_recipe(here / f"made/{name}.mp4")
        assert recipe["prompt"] == prompt
        assert recipe["encoded_prompts"] == [
            "a tall jeep in a forest. aesthetic score: 6.0.", "the desert: a jeep! aesthetic score: 6.0.",
        ]  # fmt: skip
        assert recipe["settings"]["refined"] == {
            "a jeep": "A Tall Jeep in a forest.",
            "a desert": "The desert: a Jeep!",
        }
        assert recipe["settings"]["llm_refine"] is True and recipe["settings"]["llm_model"] == "own"
        assert recipe["settings"]["llm_base_url"] is None
    server.asked.clear()
    _, told = capsys.readouterr()
    assert main(["replay", "made/sample_0000-1.mp4", "--save-dir", "again"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1].startswith("identical")
    assert read_recipe(out.splitlines()[0])["settings"]["refined"] == recipe["settings"]["refined"]
    assert not server.asked
    assert KEY not in caplog.text + told + out + err and not any(
        KEY.encode() in (data or b"") for data in tree(here).values()
    )


def test_each_recipe_holds_its_own_texts(here, server):
    server.answers = [says("one"), says("two")]
    assert run_script(SAMPLE, *ASK, "--prompt", "a", 'b{"reference_path": ""}', "--num-frames", "1") == 0
    refined = [read_recipe(here / f"made/sample_000{n}.png")["settings"]["refined"] for n in (0, 1)]
    assert refined == [{"a": "one"}, {"b": "two"}]


def test_replay_after_a_failure_asks_nobody(here, server, caplog, monkeypatch):
    server.answers = [sends("", 400), says("A dog.")]
    assert run_script(SAMPLE, *ASK, "--prompt", "a cat") == 0
    assert read_recipe(here / "made/sample_0000.mp4")["settings"]["refined"] == {"a cat": "a cat"}
    monkeypatch.delenv("OPENAI_API_KEY")
    assert main(["replay", "made/sample_0000.mp4", "--save-dir", "again"]) == 0
    assert len(server.asked) == 1 and len(warnings(caplog)) == 1


def test_results_that_exist_are_not_asked_for(here, server):
    flags = ("--prompt-as-path", "--num-frames", "1")
    assert run_script(SAMPLE, *ASK, *flags, "--prompt", "a") == 0
    assert run_script(SAMPLE, *ASK, *flags, "--prompt", "a", "b") == 0
    assert server.texts == ["a", "b"]


def test_other_languages_become_english(here, server, capsys):
    server.answers = [says("A cat."), sends("", 404)]
    assert run_script(SAMPLE, *ASK, "--prompt", "猫") == 0
    assert read_recipe(here / "made/sample_0000.mp4")["encoded_prompts"][0].startswith("a cat. ")
    before = tree(here)
    assert run_script(SAMPLE, *ASK, "--prompt", "猫", "--save-dir", "new") == 1
    assert "prompt '猫' is empty once cleaned" in capsys.readouterr().err and tree(here) == before


def test_nobody_is_asked_for_what_is_refused(here, server, capsys):
    for flags in (
        ("--prompt", "a cat {"),
        ("--prompt", "a", "--ckpt-path", "gone.pt"),
        ("--prompt", "a", "--fps", "0"),
    ):
        assert run_script(SAMPLE, *ASK, *flags) == 1
    settings = parse_inference_args([SAMPLE, *ASK, "--prompt", "a"])
    Job(JobSpec(settings), LoadedModels(settings))
    assert not server.asked


def test_class_numbers_are_not_refined(here, server, capsys):
    assert run_script("configs/dit/inference/1x256x256-class.py", *ASK, "--prompt", "207") == 1
    assert "llm_refine rewrites words, but these prompts are numbers of classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("refined", "problem"),
    [
        ({}, "refined has no text for 'a cat'"),
        ({"a cat": 3}, "refined.a cat must be a string; it is 3"),
        ({"a cat": " "}, "prompt 'a cat' is empty once cleaned"),
        ({"a cat": "\ud800"}, r"refined.a cat must be UTF-8 text; it is '\ud800'"),
        ("a cat", "refined must be a dict; it is 'a cat'"),
    ],
)
@some(2)
def test_damaged_recipes(here, server, capsys, refined, problem):
    assert run_script(SAMPLE, *ASK, "--prompt", "a cat") == 0
    sidecar = here / "made/sample_0000.json"
    recipe = json.loads(sidecar.read_text())
    recipe["settings"]["refined"] = refined
    sidecar.write_text(json.dumps(recipe))
    before = tree(here)
    assert main(["replay", str(sidecar), "--save-dir", "again"]) == 1
    assert problem in capsys.readouterr().err and tree(here) == before and len(server.asked) == 1
