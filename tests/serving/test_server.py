"""`fastdiff serve` as its clients see it: a real server, the official client, and everything that may go wrong."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import hashlib
import io
import json
import os
import re
import signal
import socket
import struct
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

import fastdiff
from fastdiff.backends import native
from tests.docs.pages import blocks
from tests.support.paths import ROOT
from tests.support.served import LONG, NAN_CLASS, Served, alive, until

if native.extension() is None:
    pytest.skip("fastdiff._native is not built", allow_module_level=True)

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
pytestmark = [linux, pytest.mark.xdist_group("server")]
KEY = "a-key-of-this-test"
ENDLESS = {"n": 64, "solver": "ddpm", "steps": 1000, "label": 1}  # seconds of work


def client(server: Served, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=LONG, max_retries=0, **options)


def decoded(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def events(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    kind = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            kind = line[7:]
        elif line.startswith("data: "):
            yield kind, json.loads(line[6:])


@contextlib.contextmanager
def background(server: Served, **fields: Any) -> Iterator[concurrent.futures.Future[httpx.Response]]:
    """Ask for images in another thread, and cancel that at the end."""
    name = f"background-{time.monotonic_ns()}"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        future = pool.submit(
            httpx.post, f"{server.url}/v1/images/generations", json=fields, headers={"x-request-id": name}, timeout=LONG
        )
        try:
            until(lambda: future.done() or server.http.get(f"/v1/jobs/{name}").status_code == 200)
            yield future
        finally:
            with contextlib.suppress(httpx.HTTPError):
                server.http.delete(f"/v1/jobs/{name}")


def idle(server: Served) -> None:
    """Wait until nothing is in flight."""
    until(lambda: server.running() == 0 and server.metric("fastdiff_jobs_waiting") == 0)


# Images ---------------------------------------------------------------------------------------------------------------


def test_images_are_those_of_a_sampler(server: Served, model: str) -> None:
    answer = server.draw(model="tiny", prompt="2", n=3, solver="unipc", steps=5, guidance=2.0, seed=7, start_index=4)
    assert answer.status_code == 200
    body = answer.json()
    sampler = fastdiff.Sampler.from_pretrained(model, determinism="bitwise")
    alone = sampler.sample(3, labels=2, solver="unipc", steps=5, guidance=2.0, seed=7, start_index=4)
    for entry, picture in zip(body["data"], alone.to_pil(), strict=True):
        assert (np.asarray(decoded(entry["b64_json"])) == np.asarray(picture)).all()
    receipt = body["fastdiff"]
    assert (receipt["seed"], receipt["solver"], receipt["nfe"], receipt["labels"]) == (7, "unipc", 10, [2, 2, 2])
    assert [entry["sha256"] for entry in body["data"]] == receipt["pixels_sha256"]
    assert answer.headers["x-request-id"] == receipt["id"]
    assert all(float(answer.headers[f"x-{name}-ms"]) >= 0 for name in ("queue", "run", "total"))
    again = server.draw(label=[2], solver="unipc", steps=5, guidance=2.0, seed=7, start_index=5).json()
    assert again["data"][0]["sha256"] == receipt["pixels_sha256"][1]


def test_the_official_client(server: Served) -> None:
    images = client(server).images
    answer = images.generate(
        model="tiny", prompt="1", n=2, response_format="b64_json", size="8x8", user="someone",
        extra_body={"steps": 4, "seed": 3},
    )  # fmt: skip
    assert [decoded(image.b64_json).size for image in answer.data] == [(8, 8)] * 2
    assert answer.output_format == "png"
    seen: list[Any] = []
    with images.generate(prompt="1", stream=True, partial_images=2, extra_body={"steps": 8, "seed": 3}) as stream:
        seen = list(stream)
    assert [e.type for e in seen] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [e.partial_image_index for e in seen[:2]] == [0, 1]
    assert seen[-1].usage.total_tokens == 0
    with pytest.raises(openai.BadRequestError, match="reads no text: a class is needed, a number from 0 to 3"):
        images.generate(prompt="a white dog")
    with pytest.raises(openai.NotFoundError, match="'other' is unknown; there are tiny, words"):
        images.generate(model="other", prompt="1")
    assert [m.id for m in client(server).models.list()] == ["tiny", "words"]
    assert client(server).models.retrieve("tiny").fastdiff["classes"] == 4
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 10, 10)).save(picture, "PNG")
    edited = images.edit(
        image=("a.png", picture.getvalue(), "image/png"), prompt="1", extra_body={"strength": 0.5, "steps": 4}
    )
    assert decoded(edited.data[0].b64_json).size == (8, 8)


def test_prompts_of_a_model_that_reads_text(server: Served, text_model: str) -> None:
    answer = client(server).images.generate(
        model="words", prompt="a dog", n=2, extra_body={"negative": "snow", "guidance": 3.0, "steps": 4, "seed": 3}
    )
    sampler = fastdiff.Sampler.from_pretrained(text_model, determinism="bitwise")
    alone = sampler.sample(2, prompts="a dog", negative="snow", guidance=3.0, solver="auto", steps=4, seed=3)
    for entry, picture in zip(answer.data, alone.to_pil(), strict=True):
        assert (np.asarray(decoded(entry.b64_json)) == np.asarray(picture)).all()
    assert answer.fastdiff["prompts"] == ["a dog"] * 2
    assert answer.fastdiff["negative"] == ["snow"] * 2
    assert answer.data[0].label is None
    body = {"model": "words", "prompt": "a dog", "negative": "snow", "guidance": 3.0, "steps": 4, "seed": 3, "n": 2}
    with server.http.stream("POST", "/v1/images/generations", json={**body, "stream": True}) as response:
        *_, (kind, last) = events(response)
    assert kind == "image_generation.completed"
    assert last["fastdiff"]["pixels_sha256"] == answer.fastdiff["pixels_sha256"]
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 10, 10)).save(picture, "PNG")
    form = {"model": "words", "prompt": "7", "steps": "4", "strength": "0.5", "seed": "1"}
    edited = server.http.post("/v1/images/edits", files={"image": picture.getvalue()}, data=form)
    assert edited.json()["fastdiff"]["prompts"] == ["7"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"model": "words"}, "prompt", "prompt is needed: words draws what a text says"),
        ({"model": "words", "prompt": "a dog", "label": 1}, "label", "words has no classes"),
        ({"model": "words", "prompt": "dog " * 20}, "prompt", "20 pieces of words; at most 6 fit"),
        ({"model": "words", "prompt": "x" * 1001}, "prompt", "1000"),
        ({"model": "words", "prompt": "a dog", "negative": "dog " * 20}, "negative", "at most 6 fit"),
        ({"model": "words", "prompt": "a dog", "negative": ["snow"]}, "negative", "str"),
        ({"model": "tiny", "prompt": "1", "negative": "a dog"}, "negative", "tiny reads no text"),
    ],
    ids=str,
)
def test_prompts_that_are_refused(server: Served, fields: dict[str, Any], param: str, words: str) -> None:
    answer = server.draw(**fields, steps=1)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.text
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"label": [1, 2], "n": 2, "steps": 3, "solver": "unipc", "guidance": 2.0, "start_index": 5},
        {"prompt": "1", "n": 2, "steps": 2, "seed": 2**64 - 1},
        {"model": "words", "prompt": "ein Hündchen '\u200b", "negative": "snow", "n": 2, "guidance": 2.0, "steps": 3},
    ],
    ids=["labels", "class as a prompt", "text"],
)
def test_a_picture_says_how_to_draw_it_again(server: Served, fields: dict[str, Any]) -> None:
    """The text in each PNG has a request for this image alone, and the SHA-256 of its pixels."""
    answer = server.draw(**fields).json()
    for entry in answer["data"]:
        picture = decoded(entry["b64_json"])
        facts = json.loads(picture.text["fastdiff"])
        assert facts["pixels_sha256"] == hashlib.sha256(np.asarray(picture).tobytes()).hexdigest() == entry["sha256"]
        assert (facts["index"], facts["label"]) == (entry["index"], entry["label"])
        assert facts["table_sha256"] == answer["fastdiff"]["table_sha256"]
        again = server.draw(**facts["request"]).json()["data"][0]
        assert again["sha256"] == entry["sha256"]
        assert again["b64_json"] == entry["b64_json"]  # the whole file, too
    other = server.draw(**fields, output_format="webp").json()["data"][0]
    assert "fastdiff" not in decoded(other["b64_json"]).info


def test_an_edited_picture_has_no_request_of_its_own(server: Served) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 10, 10)).save(picture, "PNG")
    form = {"label": "1", "steps": "4", "strength": "0.5", "seed": "1"}
    entry = server.http.post("/v1/images/edits", files={"image": picture.getvalue()}, data=form).json()["data"][0]
    facts = json.loads(decoded(entry["b64_json"]).text["fastdiff"])
    assert facts["pixels_sha256"] == entry["sha256"]
    assert "request" not in facts


def test_the_client_of_the_documentation(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    """The example of docs/serving.md runs, with this server's address and model."""
    (example,) = [b.text for b in blocks(ROOT / "docs" / "serving.md") if b.text.startswith("from openai")]
    exec(example.replace("http://127.0.0.1:8000", server.url).replace('prompt="9"', 'prompt="1"'), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "2 unipc 7"
    assert printed[1:] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]


def test_metrics_are_documented(server: Served) -> None:
    assert server.draw(label=1, steps=1).status_code == 200
    text = server.http.get("/metrics").text
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    known = set(re.findall(r"`(fastdiff_\w+)`", page))
    families = {
        name if kind != "counter" or name.endswith("_total") else f"{name}_total"
        for name, kind in re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE)
    }
    assert {name for name in families if not name.endswith("_created")} == known


def test_streams_end_with_the_images_of_plain_answers(server: Served) -> None:
    fields = {"label": [0, 1], "n": 2, "steps": 6, "seed": 5}
    plain = server.draw(**fields).json()
    body = {**fields, "stream": True, "partial_images": 3, "output_format": "webp"}
    with server.http.stream("POST", "/v1/images/generations", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        seen = list(events(response))
    partial = [data for kind, data in seen if kind == "image_generation.partial_image"]
    assert sorted((p["image_index"], p["partial_image_index"]) for p in partial) == [
        (i, k) for i in (0, 1) for k in range(3)
    ]
    assert all(p["rows"] == 6 for p in partial)
    last = [data for kind, data in seen if kind == "image_generation.completed"]
    assert [data["sha256"] for data in last] == plain["fastdiff"]["pixels_sha256"]
    assert decoded(last[0]["b64_json"]).format == "WEBP"
    assert "fastdiff" not in last[0]
    assert last[1]["fastdiff"]["pixels_sha256"] == plain["fastdiff"]["pixels_sha256"]


def test_edits_keep_what_the_mask_keeps(server: Served) -> None:
    picture, mask = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8), (250, 20, 20)).save(picture, "PNG")
    alpha = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    alpha.paste((0, 0, 0, 0), (0, 0, 8, 4))  # transparent above: drawn anew
    alpha.save(mask, "PNG")
    files = {"image": ("../../etc/passwd", picture.getvalue()), "mask": ("m.png", mask.getvalue())}
    answer = server.http.post("/v1/images/edits", files=files, data={"label": "1", "steps": "4", "seed": "1"})
    assert answer.status_code == 200, answer.text
    pixels = np.asarray(decoded(answer.json()["data"][0]["b64_json"]))
    assert (pixels[4:] == (250, 20, 20)).all()
    assert (pixels[:4] != (250, 20, 20)).any()


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"\xff\xfe{}", 400, "no JSON"),
        (b'{"prompt": "\xff"}', 400, "no JSON"),
        (b"[" * 30_000, 400, "Expected `object`"),
        (b'{"prompt": ' + b"[" * 30_000, 400, "prompt"),
        (b'{"label": ' + b"[" * 30_000, 400, "label"),
        (b"{" * 3, 400, "no JSON"),
        (b"x" * 70_000, 413, "larger than 65536 bytes"),
    ],
    ids=["utf-16", "utf-8", "nested", "nested prompt", "nested label", "cut", "large"],
)
def test_bodies_that_are_no_requests(server: Served, body: bytes, status: int, words: str) -> None:
    answer = server.http.post("/v1/images/generations", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert words in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert server.draw(label=1, steps=1).status_code == 200


def test_a_body_of_100_megabytes(server: Served) -> None:
    """Neither its header nor its bytes, which may come without a header, are believed."""

    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield bytes(1 << 20)

    for content in (bytes(100 << 20), chunks()):
        with contextlib.suppress(httpx.WriteError, httpx.ReadError):  # the server need not read all of it
            headers = {"content-type": "application/json"}
            answer = server.http.post("/v1/images/generations", content=content, headers=headers)
            assert answer.status_code == 413
    assert server.draw(label=1, steps=1).status_code == 200
    peak = Path(f"/proc/{server.process.pid}/status").read_text().partition("VmHWM:")[2].split()[0]
    assert int(peak) < 200 << 10  # KiB


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"), ({"n": 65}, "n"), ({"n": 1e9}, "n"), ({"n": True}, "n"), ({"n": "2"}, "n"),
        ({"steps": 0}, "steps"), ({"steps": 1001}, "steps"), ({"steps": 2.5}, "steps"),
        ({"seed": -1}, "seed"), ({"seed": 2**64}, "seed"), ({"seed": "x"}, "seed"),
        ({"size": "100000x10000"}, "size"), ({"size": "9x9"}, "size"), ({"size": 8}, "size"),
        ({"label": 5}, "label"), ({"label": -1}, "label"), ({"label": [1, 2]}, "label"), ({"label": "../x"}, "label"),
        ({"prompt": "1", "label": 1}, "prompt"), ({"prompt": "x" * 1001}, "prompt"),
        ({"guidance": 1e300}, "guidance"), ({"eta": -1}, "eta"), ({"solver": "nothing"}, "solver"),
        ({"solver": "/etc/passwd"}, "solver"), ({"spacing": "odd"}, "spacing"),
        ({"response_format": "url"}, "response_format"), ({"image": "http://169.254.169.254/"}, "image"),
        ({"output_format": "gif"}, "output_format"),
        ({"partial_images": 2}, "partial_images"), ({"stream": True, "partial_images": 101}, "partial_images"),
        ({"quality": "hd"}, "quality"), ({"deadline_ms": 0}, "deadline_ms"), ({"priority": 1e9}, "priority"),
        ({"background": "transparent"}, "background"), ({"on_deadline": "wait"}, "on_deadline"),
        ({"start_index": 2**60}, "start_index"),
    ],
    ids=str,
)  # fmt: skip
def test_values_that_are_not_allowed(server: Served, fields: dict[str, Any], param: str) -> None:
    answer = server.draw(**{"label": 1, "steps": 1, **fields} if "prompt" not in fields else fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.text


def png(width: int, height: int) -> bytes:
    """Return a file whose header claims this size."""
    chunks = b"\x89PNG\r\n\x1a\n"
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(1000))),
        (b"IEND", b""),
    ):
        chunks += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return chunks


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"image": png(100_000, 100_000)}, "image"),
        ({"image": png(9, 8)}, "9x8; tiny takes one of 8x8"),
        ({"image": png(8, 8)[:45]}, "image is a damaged picture"),
        ({"image": b"P6 8 8 255 "}, "no picture in the format PNG"),
        ({"picture": png(8, 8)}, "a file named image is needed"),
        ({"mask": png(8, 8)}, "a file named image is needed"),
    ],
    ids=["pixel bomb", "other size", "cut", "other format", "other name", "only a mask"],
)
def test_pictures_that_are_refused(server: Served, files: dict[str, bytes], words: str) -> None:
    answer = server.http.post("/v1/images/edits", files=files, data={"label": "1", "steps": "1"})
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]


def test_paths_methods_and_types(server: Served) -> None:
    http = server.http
    for path in ("/v1/images/variations", "/../../etc/passwd", "/v1/models/..%2f..%2fetc", "/v1/jobs/nothing"):
        assert http.get(path).status_code == 404
        assert set(http.get(path).json()["error"]) == {"message", "type", "param", "code"}
    assert http.get("/v1/images/generations").status_code == 405
    assert http.post("/v1/images/generations", content=b"{}").status_code == 415
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    assert http.post("/v1/images/generations", content=b"{}", headers=headers).status_code == 415
    assert http.post("/v1/images/edits", json={}).status_code == 415
    assert http.get("/v1/models", headers={"x-request-id": "a b"}).status_code == 400
    assert http.get("/v1/models", headers={"x-large": "x" * 20_000}).status_code == 431
    assert http.get("/v1/models", headers={"x-large": "x" * 200_000}).status_code in (400, 431)


def test_nan_in_one_image_ends_its_request_alone(server: Served) -> None:
    good = {"label": 1, "n": 2, "steps": 200, "seed": 1}
    before = server.draw(**good).json()["fastdiff"]["pixels_sha256"]
    with background(server, **good) as beside:
        bad = server.draw(label=NAN_CLASS, steps=3)
        assert bad.status_code == 500, bad.text
        assert bad.json()["error"]["code"] == "not_finite"
        assert bad.headers["x-should-retry"] == "false"
        assert beside.result().json()["fastdiff"]["pixels_sha256"] == before


def test_deadlines(server: Served) -> None:
    impossible = server.draw(**ENDLESS, deadline_ms=1)
    assert (impossible.status_code, impossible.json()["error"]["code"]) == (504, "deadline_impossible")
    assert server.draw(label=1, steps=1, deadline_ms=1e6).status_code == 200
    assert server.metric("fastdiff_deadline_total") >= 2
    degraded = server.draw(label=1, deadline_ms=1e6, on_deadline="degrade", guidance=1.5)
    assert degraded.status_code == 400
    assert "needs measurements" in degraded.json()["error"]["message"]


# Jobs -----------------------------------------------------------------------------------------------------------------


def test_a_job_can_be_asked_for_and_cancelled(server: Served) -> None:
    name = {"x-request-id": "job-a"}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        body = {**ENDLESS, "steps": 1000}
        waiting = pool.submit(server.http.post, "/v1/images/generations", json=body, headers=name)
        until(lambda: server.http.get("/v1/jobs/job-a").json().get("status") == "running")
        assert server.http.get("/v1/jobs/job-a").json()["eta_ms"] > 0
        twice = server.http.post("/v1/images/generations", json={"label": 1}, headers=name)
        assert (twice.status_code, twice.json()["error"]["code"]) == (409, "duplicate_request")
        assert server.http.delete("/v1/jobs/job-a").json()["status"] == "cancelled"
        assert waiting.result().status_code == 409
    assert server.http.get("/v1/jobs/job-a").json()["error"]["code"] == "cancelled"
    done = server.draw(label=1, steps=1)
    record = server.http.get(f"/v1/jobs/{done.headers['x-request-id']}").json()
    assert record["status"] == "finished"
    assert record["receipt"]["pixels_sha256"] == [done.json()["data"][0]["sha256"]]


def connect(server: Served, body: dict[str, Any], missing: int = 0, buffer: int = 0) -> socket.socket:
    """Send a request, of whose body so many bytes do not come; return its connection, which buffers so many bytes."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    connection = socket.socket()
    if buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.settimeout(LONG)
    connection.connect((host, int(port)))
    content = json.dumps(body).encode()
    lines = ["POST /v1/images/generations HTTP/1.1", "host: x", "content-type: application/json"]
    head = "\r\n".join([*lines, f"content-length: {len(content) + missing}", "", ""])
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("state", ["waiting", "running", "streaming"])
def test_clients_that_leave_free_their_slots(server: Served, state: str) -> None:
    idle(server)
    before = server.metric(f'fastdiff_cancelled_total{{stage="{state}"}}')
    with contextlib.ExitStack() as stack:
        if state == "waiting":  # behind as many images as there are slots, of a job that is more urgent
            stack.enter_context(background(server, **ENDLESS, priority=900))
            until(server.running)
        connection = connect(server, {**ENDLESS, "stream": state == "streaming", "priority": -900})
        if state == "streaming":
            assert b"200 OK" in connection.recv(1000)
        else:
            wanted = "fastdiff_jobs_waiting" if state == "waiting" else "fastdiff_jobs_running"
            until(lambda: server.metric(wanted))
        connection.close()
        until(lambda: server.metric(f'fastdiff_cancelled_total{{stage="{state}"}}') == before + 1)
    idle(server)


def test_a_slow_reader_holds_nobody_up(server: Served) -> None:
    """A client that reads nothing of a stream of many previews: others are answered, and the stream's job ends."""
    idle(server)
    dropped = server.metric("fastdiff_previews_dropped_total")
    # Several megabytes, more than the system buffers for a connection of which nothing is read.
    many = {"n": 64, "label": 1, "steps": 100, "stream": True, "partial_images": 100, "priority": 900}
    slow = connect(server, many, buffer=4096)
    assert server.draw(label=1, steps=2).status_code == 200
    until(lambda: server.metric("fastdiff_previews_dropped_total") > dropped)
    idle(server)
    slow.close()


# Processes ------------------------------------------------------------------------------------------------------------


def test_an_engine_that_is_killed_is_replaced(server: Served) -> None:
    engine, restarts = server.engine(), server.metric("fastdiff_engine_restarts_total")
    with background(server, **ENDLESS) as running:
        until(server.running)
        os.kill(engine, signal.SIGKILL)
        lost = running.result()
        assert (lost.status_code, lost.json()["error"]["code"]) == (503, "engine_lost")
        assert "retry-after" in lost.headers
        refused = server.draw(label=1)
        assert refused.status_code == 503
        assert server.http.get("/health/live").status_code == 200
    until(lambda: server.http.get("/health/ready").status_code == 200)
    assert server.draw(label=1, steps=1).status_code == 200
    assert server.metric("fastdiff_engine_restarts_total") == restarts + 1
    assert server.engine() not in (0, engine)
    assert not alive(engine)


def test_an_engine_that_stands_still_is_not_ready(server: Served) -> None:
    until(lambda: server.http.get("/health/ready").status_code == 200)
    os.kill(server.engine(), signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        until(lambda: server.http.get("/health/ready").status_code == 503)
        assert "no sign of life" in server.http.get("/health/ready").json()["reason"]
        assert server.http.get("/health/live").status_code == 200
    finally:
        os.kill(server.engine(), signal.SIGCONT)
    assert time.monotonic() - stopped < LONG
    until(lambda: server.http.get("/health/ready").status_code == 200)
    assert server.draw(label=1, steps=1).status_code == 200


def test_sigterm_lets_jobs_finish(server: Served) -> None:
    """Ready turns false, new requests are refused, what runs is finished, and the server ends with 0, alone."""
    idle(server)
    engine = server.engine()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        body = {"label": 1, "n": 8, "steps": 1000, "solver": "ddpm", "seed": 1}
        running = pool.submit(httpx.post, f"{server.url}/v1/images/generations", json=body, timeout=LONG)
        until(server.running)
        server.process.send_signal(signal.SIGTERM)
        refused = until(lambda: (r := server.draw(label=1)).status_code == 503 and r)
        assert refused.json()["error"]["code"] == "shutting_down"
        assert server.says("STOPPING=1")
        assert server.http.get("/health/ready").status_code == 503
        assert running.result().status_code == 200
    assert server.wait() == 0
    until(lambda: not alive(engine))


@pytest.mark.slow
def test_interrupts_of_the_group_let_jobs_finish(server: Served) -> None:
    """Ctrl-C reaches the drawing process, too, which leaves it to the other."""
    engine = server.engine()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        body = {"label": 1, "n": 16, "steps": 1000, "solver": "ddpm", "seed": 1}
        running = pool.submit(httpx.post, f"{server.url}/v1/images/generations", json=body, timeout=LONG)
        until(server.running)
        os.killpg(server.process.pid, signal.SIGINT)
        assert running.result().status_code == 200
    assert server.wait() == 0
    until(lambda: not alive(engine))


@pytest.mark.slow
def test_jobs_that_do_not_finish_in_time_are_cancelled(model: str, tmp_path: Path) -> None:
    server = Served(tmp_path, model, "--max-queue-seconds", "1e6", "--drain-seconds", "0.2")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = pool.submit(httpx.post, f"{server.url}/v1/images/generations", json=ENDLESS, timeout=LONG)
        until(server.running)
        server.process.send_signal(signal.SIGTERM)
        cut = running.result()
    assert (cut.status_code, cut.json()["error"]["code"]) == (503, "shutting_down")
    assert server.wait() == 0
    server.end()


@pytest.mark.slow
def test_a_second_signal_ends_at_once(server: Served) -> None:
    engine = server.engine()
    connection = connect(server, ENDLESS)
    until(server.running)
    server.process.send_signal(signal.SIGTERM)
    until(lambda: server.http.get("/health/ready").status_code == 503)
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 1
    until(lambda: not alive(engine))
    connection.close()


@pytest.mark.slow
def test_no_orphan_stays_when_the_server_is_killed(server: Served) -> None:
    connection = connect(server, ENDLESS)
    until(server.running)
    assert len(server.group()) >= 2
    server.process.kill()
    server.wait()
    until(lambda: not server.group())
    connection.close()


@pytest.mark.slow
def test_a_deadline_that_passes_during_the_run(server: Served) -> None:
    idle(server)
    for seconds in (10, 20, 40, 80):  # until it is accepted, which the server's estimate decides
        with concurrent.futures.ThreadPoolExecutor() as pool:
            late = pool.submit(server.draw, **ENDLESS, deadline_ms=1e3 * seconds)
            until(lambda late=late: late.done() or server.running())
            if late.done() and late.result().json()["error"]["code"] == "deadline_impossible":
                continue
            os.kill(server.engine(), signal.SIGSTOP)
            time.sleep(seconds)
            os.kill(server.engine(), signal.SIGCONT)
            break
    assert (late.result().status_code, late.result().json()["error"]["code"]) == (504, "deadline_missed")
    assert server.metric('fastdiff_deadline_total{result="missed"}') >= 1


@pytest.mark.slow
def test_a_body_that_does_not_arrive(server: Served) -> None:
    with connect(server, {"label": 1}, missing=50) as connection:
        assert b" 408 " in connection.recv(1000)


@pytest.mark.slow
def test_keys_and_a_full_queue(model: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text(f"{KEY}\nanother-key\n")
    server = Served(
        tmp_path, model, "--api-key-file", str(keys), "--max-queue-seconds", "0.5", "--log-format", "json",
        "--max-steps", "10", "--no-page",
    )  # fmt: skip
    try:
        own = {"authorization": f"Bearer {KEY}", "x-request-id": "mine"}
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}, {"authorization": "Bearer"}):
            answer = server.http.post("/v1/images/generations", json={"label": 1}, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert server.http.get("/health/ready").status_code == 200
        assert server.http.post("/v1/images/generations", json={"label": 1, "steps": 5}, headers=own).status_code == 200
        assert server.http.get("/v1/jobs/mine", headers=own).status_code == 200
        other = {"authorization": "Bearer another-key"}
        assert server.http.get("/v1/jobs/mine", headers=other).status_code == 404
        many = server.http.post(
            "/v1/images/generations",
            json={"label": 1, "solver": "ddpm", "n": 1},
            headers={"authorization": f"Bearer {KEY}"},
        )
        assert many.status_code == 400
        assert "at most 10" in many.json()["error"]["message"]

        def draw(_: int) -> httpx.Response:
            body = {"label": 1, "n": 64, "solver": "heun", "steps": 5}
            return httpx.post(f"{server.url}/v1/images/generations", json=body, headers=other, timeout=LONG)

        with concurrent.futures.ThreadPoolExecutor(64) as pool:
            answers = list(pool.map(draw, range(200)))
        full = [a for a in answers if a.status_code == 429]
        assert {a.status_code for a in answers} == {200, 429}
        assert all(int(a.headers["retry-after"]) >= 1 for a in full)
        assert all(a.json()["error"]["code"] == "queue_full" for a in full)
        log = server.log.read_text()
        assert KEY not in log
        assert "wrong" not in log
        assert server.http.get("/").status_code == 404
        lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
        assert {"time", "level", "message", "route", "status", "ms", "request_id"} <= set(lines[-1])
    finally:
        server.end()
