"""The endpoint over real HTTP, asked by OpenAI's own client and by httpx."""

from __future__ import annotations

import base64
import io
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from PIL import Image
from ray import serve
from ray.serve.schema import ServeDeploySchema

from rayllava.checkpoint.layouts import StoredModel, write
from rayllava.checkpoint.manifest import ModelManifest
from rayllava.generate.load import load_engine
from rayllava.records import Request, Turn
from serving.app import ServeSpec, application, build
from serving.local import listening, serve_locally
from tests.generate.llava import tiny_llava
from tests.serving.counter import Counter
from tests.tiny import make_parts, processor_spec

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "export"
    tokenizer_dir = Path(make_parts(folder.parent / "parts").llm)
    manifest = ModelManifest(processor=processor_spec(max_length=256), family="vicuna", source="test")
    write("hf", folder, StoredModel.of(tiny_llava(), tokenizer_dir, num_own_rows=330), manifest)
    return folder


@pytest.fixture(scope="module")
def url(ray_local: None, folder: Path) -> Iterator[str]:
    """The tiny model at /; at /slow an engine that takes its time, behind a token and small queues."""
    slow = ServeSpec(model=str(folder), name="slow", max_batch=1, max_queued=1)
    with listening(application(ServeSpec(model=str(folder), name="tiny"))) as url:
        app = application(slow, token="s3cret", load=partial(Counter, step_s=0.05))
        serve.run(app, name="slow", route_prefix="/slow")
        yield url


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60)


@pytest.fixture
def slow(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/slow/v1", api_key="s3cret", max_retries=0, timeout=60)


def picture(shade: int = 30) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (200, shade, 30)).save(file, "PNG")
    return file.getvalue()


def messages(text: str = "what is shown", *pictures: bytes) -> Any:
    urls = ["data:image/png;base64," + base64.b64encode(content).decode() for content in pictures]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def until(true: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.05)


def test_plain_streamed_and_offline_answers_are_the_same(client: openai.OpenAI, folder: Path) -> None:
    options: Any = {"model": "tiny", "messages": messages("what is shown", picture()), "temperature": 0}
    options["max_tokens"] = 20
    plain = client.chat.completions.create(**options)
    *chunks, last = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})

    request = Request("1", (Turn("user", "<image>\nwhat is shown"),), (picture(),), max_new_tokens=20)
    offline = list(load_engine(folder).generate([request]))
    text = "".join(delta.text for delta in offline)
    assert text
    assert plain.choices[0].message.content == text
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert plain.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == offline[-1].finish
    assert plain.usage and plain.usage.prompt_tokens == offline[-1].num_prompt_tokens
    assert plain.usage.completion_tokens == offline[-1].num_tokens
    assert last.usage == plain.usage and not last.choices
    assert plain.id.startswith("chatcmpl-") and {chunk.id for chunk in chunks} == {last.id}


def test_a_picture_counts_with_all_its_positions(client: openai.OpenAI) -> None:
    counts = []
    for pictures in ([], [picture()], [picture(), picture(99)]):
        asked = messages("what", *pictures)
        answer = client.chat.completions.create(model="tiny", messages=asked, max_tokens=1)
        assert answer.usage
        counts.append(answer.usage.prompt_tokens)
    assert counts[2] - counts[1] >= processor_spec().num_image_tokens


def test_the_wire_is_server_sent_events(url: str) -> None:
    body = {"model": "tiny", "messages": messages(), "max_tokens": 3, "stream": True}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers={"x-request-id": "mine"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-request-id"] == "mine"
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert json.loads(events[0].removeprefix("data: "))["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_stop_ends_the_answer_before_itself(client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "messages": messages(), "temperature": 0, "max_tokens": 20}
    whole = client.chat.completions.create(**options).choices[0].message.content or ""
    stop = whole[len(whole) // 2 :][:2]
    cut = client.chat.completions.create(**options, stop=stop)
    assert cut.choices[0].message.content == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_many_clients_at_once_get_their_own_answers(client: openai.OpenAI) -> None:
    def ask(number: int) -> str | None:
        asked = messages(f"how many {number % 6}", picture(number % 6))
        answer = client.chat.completions.create(model="tiny", messages=asked, temperature=0, max_tokens=10)
        return answer.choices[0].message.content

    alone = [ask(number) for number in range(6)]
    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(ask, range(24))) == alone * 4


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list().data] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "rayllava"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_errors_have_openais_shape(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="other", messages=messages())
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as remote:
        parts: Any = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}}]
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": parts}])
    assert "remote images are off" in remote.value.message
    with pytest.raises(openai.BadRequestError) as broken:
        client.chat.completions.create(model="tiny", messages=messages("what", picture()[:60]))
    assert "not an image" in broken.value.message or "header" in broken.value.message
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="tiny", messages=messages("what " * 400))
    assert long.value.code == "context_length_exceeded"
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as several:
            client.chat.completions.create(model="tiny", messages=messages(), n=2, stream=stream)
        assert several.value.param == "n"

    post = partial(httpx.post, f"{url}/v1/chat/completions")
    for answer, status in [
        (post(content=b"{"), 400),
        (post(json={"model": "tiny", "messages": messages(), "temperature": "warm"}), 400),
        (httpx.get(f"{url}/v1/chat/completions"), 405),
        (httpx.get(f"{url}/v1/nothing"), 404),
        (httpx.get(f"{url}/nothing"), 404),
        (post(content=iter([b"x" * (1 << 20)] * 40)), 413),
    ]:
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_health_says_that_the_engine_takes_work(url: str) -> None:
    answer = httpx.get(f"{url}/health")
    assert (answer.status_code, answer.content) == (200, b"")


def test_a_token_is_wanted_where_there_is_one(url: str, slow: openai.OpenAI) -> None:
    assert slow.models.list().data[0].id == "slow"
    for key in ("wrong", "s3cret2", "s3cre"):
        with pytest.raises(openai.AuthenticationError):
            slow.with_options(api_key=key).models.list()
    answer = httpx.post(f"{url}/slow/v1/chat/completions", content=b"{")
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert httpx.get(f"{url}/slow/health").status_code == 200


def num_open() -> int:
    return serve.get_deployment_handle("Engine", "slow").num_open.remote().result(timeout_s=10)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(slow: openai.OpenAI, stream: bool) -> None:
    options: Any = {"model": "slow", "messages": messages(), "temperature": 0, "stream": stream}
    if stream:
        chunks = slow.chat.completions.create(**options)
        next(iter(chunks))
        assert num_open() == 1
        chunks.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            slow.with_options(timeout=1).chat.completions.create(**options)
    until(lambda: num_open() == 0, seconds=5)


def test_a_full_queue_turns_clients_away(slow: openai.OpenAI) -> None:
    def ask(_: int) -> openai.RateLimitError | str:
        try:
            answer = slow.chat.completions.create(model="slow", messages=messages(), max_tokens=10)
        except openai.RateLimitError as error:
            return error
        return answer.choices[0].finish_reason

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(12)))
    refused = [answer for answer in answers if isinstance(answer, openai.RateLimitError)]
    assert 2 <= len(answers) - len(refused) <= 6
    assert {error.response.headers["retry-after"] for error in refused} == {"1"}
    assert {error.type for error in refused} == {"rate_limit_error"}


def test_an_engine_that_dies_in_mid_stream_ends_it_with_an_error_and_is_replaced(url: str) -> None:
    body = {"model": "slow", "messages": messages("poison"), "stream": True}
    headers = {"Authorization": "Bearer s3cret"}
    answer = httpx.post(f"{url}/slow/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200
    *said, failed, done, end = answer.text.split("\n\n")
    assert "1 " in said[1] and (done, end) == ("data: [DONE]", "")
    assert json.loads(failed.removeprefix("data: "))["error"]["type"] == "server_error"
    assert httpx.get(f"{url}/slow/health", timeout=10).status_code == 503
    until(lambda: httpx.get(f"{url}/slow/health", timeout=10).status_code == 200, seconds=60)


def test_a_second_serve_on_one_cluster_is_refused(url: str, folder: Path) -> None:
    with pytest.raises(ValueError, match="Serve runs on this Ray cluster already"), serve_locally(folder):
        pass


# -- what needs no server ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "model is not set; add model=DIR"),
        ({"model": "/nowhere"}, "model=/nowhere is no folder"),
        ({"quant": "fp4"}, "quant=fp4: input should be 'none', 'nf4' or 'int8'"),
        ({"max_batch": "0"}, "max_batch=0: "),
        ({"modle": "x"}, "unknown field modle; did you mean model?"),
    ],
)
def test_a_wrong_word_is_one_line(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        build(words)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"model={tmp_path} holds no model"):
        build({"model": str(tmp_path)})


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.7", "::"])
def test_beyond_loopback_a_token_is_needed(folder: Path, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setattr("serving.access._host", lambda: host)
    with pytest.raises(ValueError, match="set RAYLLAVA_API_TOKEN"):
        application(ServeSpec(model=str(folder)))
    monkeypatch.setenv("RAYLLAVA_API_TOKEN", "s3cret")
    assert build({"model": str(folder), "quant": "none"})


def test_a_taken_port_is_named(folder: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"port={port} cannot be had"), serve_locally(folder, port=port):
            pass


def test_the_config_file_is_one_that_serve_takes() -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "serving" / "config.yaml").read_text()))
    (app,) = config.applications
    assert app.import_path == "serving.app:build"
    ServeSpec(**app.args)
    assert [deployment.name for deployment in app.deployments] == ["Ingress", "Engine"]
