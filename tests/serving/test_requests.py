"""Parts of the server without a server: classes that prompts name, keys, signs of life, names of models."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from fastdiff.cli.serve import _rows, _size
from fastdiff.errors import InvalidArgument
from fastdiff.serving import process
from fastdiff.serving.front import Keys
from fastdiff.serving.process import Pulse
from fastdiff.serving.requests import Generation, Refusal, labels_of, options_of, read_generation, subject_of
from fastdiff.serving.server import _socket, named
from fastdiff.serving.wire import Model

FASHION = Model("fashion", 32, 32, 1, 3, ["Coat", "Bag", "0"], "native", "bitwise", "float32", ["ddim"])


def without_classes() -> Model:
    return Model("plain", 8, 8, 3, None, None, "native", "bitwise", "float32", ["ddim"])


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({}, None), ({"prompt": ""}, None), ({"prompt": "Bag"}, 1), ({"prompt": "1"}, 1), ({"prompt": 1}, 1),
        ({"prompt": "#0"}, 0), ({"label": 2}, 2), ({"label": "Coat", "prompt": ""}, 0),
        ({"label": ["Bag", 0], "n": 2}, [1, 0]), ({"label": []}, "lists 0 classes for n=1"),
        ({"prompt": "0"}, "is the name of class #2; write #0 for the other"), ({"prompt": "3"}, "a number from 0 to 2"),
        ({"prompt": "٣"}, "reads no text"), ({"prompt": "a coat"}, "reads no text: a class is needed"),
        ({"prompt": "Bag", "label": 1}, "give one of them"), ({"label": 2**70}, "a number from 0 to 2"),
        ({"label": -1}, "a number from 0 to 2"), ({"prompt": "1 "}, "reads no text"),
    ],
    ids=str,
)  # fmt: skip
def test_prompts_name_classes(fields: dict[str, Any], labels: Any) -> None:
    g = Generation(**fields)
    if not isinstance(labels, str):
        assert labels_of(g, FASHION) == labels
        return
    with pytest.raises(Refusal, match=labels) as refused:
        labels_of(g, FASHION)
    assert refused.value.status == 400


def test_prompts_of_models_without_classes() -> None:
    assert labels_of(Generation(prompt=""), without_classes()) is None
    with pytest.raises(Refusal, match="plain has no classes and reads no text"):
        labels_of(Generation(prompt="a dog"), without_classes())


def test_a_seed_that_is_drawn_is_a_number_of_javascript() -> None:
    seeds = {options_of(Generation(), FASHION)["seed"] for _ in range(50)}
    assert len(seeds) == 50
    assert max(seeds) < 2**53
    assert options_of(Generation(seed=2**64 - 1), FASHION)["seed"] == 2**64 - 1


def test_duplicate_and_unknown_fields() -> None:
    assert read_generation(b'{"n": 1, "n": 2}').n == 2
    for body in (b'{"modle": "x"}', b'{"checkpoint": "/x"}', b"[]", b"null", b"", b'{"n": NaN}', b'{"eta": 1e999}'):
        with pytest.raises(Refusal) as refused:
            read_generation(body)
        assert refused.value.status == 400


def test_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(b"one\n\n  two \r\n")
    keys = Keys(path)
    assert keys.owner("Bearer one") != keys.owner("bearer two")
    assert b"one" not in str(vars(keys)).encode()
    for header in (None, "", "one", "Bearer", "Bearer ", "Basic one", "Bearer on", "Bearer onee", "Bearer \xff"):
        with pytest.raises(Refusal) as refused:
            keys.owner(header)
        assert refused.value.status == 401
    assert Keys(None).owner(None) == b""
    path.write_bytes(b"\n \n")
    with pytest.raises(InvalidArgument, match="has no key"):
        Keys(path)


def stats(steps: int, jobs: int = 1, step_s: float = 0.01) -> dict[str, dict[str, float]]:
    return {"m": {"steps": steps, "waiting": 0, "running": jobs, "longest_s": step_s}}


def test_a_process_is_ready_while_it_lives_and_steps() -> None:
    pulse = Pulse(0.0)
    assert "being loaded" in pulse.trouble(100.0)[0]
    pulse.ready = True
    pulse.beat(stats(1, jobs=0), 100.0)
    assert pulse.trouble(101.0) == ("", 0.0)
    why, share = pulse.trouble(102.0)
    assert "no sign of life" in why
    assert share < 1.0
    assert pulse.trouble(100.0 + process.HUNG_S + 1.0)[1] > 1.0
    for now in (102.0, 103.0, 104.0):  # it has no work
        pulse.beat(stats(1, jobs=0), now)
        assert pulse.trouble(now)[0] == ""
    for i in range(5):  # it has work, and takes steps
        pulse.beat(stats(2 + i), 105.0 + i)
        assert pulse.trouble(105.0 + i)[0] == ""


@pytest.mark.parametrize(("step_s", "limit"), [(0.01, 1.25), (1.0, 5.0)])
def test_a_loop_that_hangs_is_not_ready(step_s: float, limit: float) -> None:
    """Signs of life alone do not make it ready: a step is needed within two seconds, or five steps' time."""
    pulse = Pulse(0.0)
    pulse.ready = True
    pulse.beat(stats(7, jobs=0, step_s=step_s), 0.0)
    now = 0.0
    while now < limit:
        assert pulse.trouble(now)[0] == ""
        now += 0.25
        pulse.beat(stats(7, step_s=step_s), now)
    now += 0.25
    pulse.beat(stats(7, step_s=step_s), now)
    assert "m took no step for" in pulse.trouble(now)[0]
    assert now <= limit + 0.5
    assert pulse.trouble(now)[1] < 1.0
    pulse.beat(stats(8, step_s=step_s), now)
    assert pulse.trouble(now)[0] == ""


def test_a_model_that_waits_for_another_ones_long_steps_does_not_hang() -> None:
    pulse = Pulse(0.0)
    pulse.ready = True
    slow = {"slow": {"steps": 1, "waiting": 0, "running": 1, "longest_s": 2.0}}
    for now in (0.0, 1.0, 2.0, 3.0, 4.0, 5.0):
        slow["slow"]["steps"] += 1
        pulse.beat({**stats(7), **slow}, now)
        assert pulse.trouble(now)[0] == ""
    pulse.beat({**stats(7), **slow}, 11.0)
    assert "took no step for 11.0 s" in pulse.trouble(11.0)[0]


def test_subjects_of_models_that_read_text() -> None:
    model = Model("words", 8, 8, 3, None, None, "native", "bitwise", "float32", ["ddim"], text=True)
    assert subject_of(Generation(prompt="a dog"), model) == {"prompts": "a dog"}
    assert subject_of(Generation(prompt="", negative=""), model) == {"prompts": "", "negative": ""}
    assert subject_of(Generation(prompt=7), model) == {"prompts": "7"}
    for g, words in (
        (Generation(), "prompt is needed"),
        (Generation(prompt="", label=1), "words has no classes"),
        (Generation(label=["a"]), "words has no classes"),
    ):
        with pytest.raises(Refusal, match=words):
            subject_of(g, model)
    with pytest.raises(Refusal, match="fashion reads no text"):
        subject_of(Generation(prompt="Bag", negative="Coat"), FASHION)
    assert subject_of(Generation(prompt="Bag"), FASHION) == {"labels": 1}


def test_names_of_models(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "net.safetensors").touch()
    found = named(["fashion-mnist", str(tmp_path / "folder"), str(tmp_path / "net.safetensors")])
    assert list(found) == ["fashion-mnist", "folder", "net"]
    with pytest.raises(InvalidArgument, match="both would be the model folder"):
        named([str(tmp_path / "folder"), "folder"])
    with pytest.raises(InvalidArgument, match="other characters"):
        named([str(tmp_path / "a b")])


def test_values_of_the_command_line() -> None:
    assert (_size("64KiB"), _size("1MiB"), _size("100")) == (65536, 1048576, 100)
    assert (_rows("auto"), _rows("8")) == (None, 8)
    for parse, text in ((_size, "0"), (_size, "-1"), (_size, "1XB"), (_rows, "0"), (_rows, "x"), (_rows, "٣")):
        with pytest.raises(InvalidArgument):
            parse(text)


def test_packets_of_an_answer_do_not_wait_for_each_other() -> None:
    """Nagle's algorithm holds the second one back until the client confirms the first one, 40 ms later."""
    with (
        _socket("127.0.0.1", 0) as listening,
        socket.create_connection(listening.getsockname()[:2], timeout=60),
        listening.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
