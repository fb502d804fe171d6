"""No argument of the native engine makes it read or write outside a buffer; `make sanitize-python` runs this too.

Every array is an allocation of exactly its size, so that AddressSanitizer sees one number too many.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdiff import NoiseSchedule, Sampler, solvers
from fastdiff.backends.native import arrays, packing
from fastdiff.core.state import TableBank
from tests.support.unets import TINY_CLASSES, random_unet

native = pytest.importorskip("fastdiff._native", reason="the native extension is not built")

G, PANEL, SLICE, By, Method = native.GROUP, native.PANEL, native.slice(""), native.By, native.Method
SCHEDULE = NoiseSchedule("linear", 100, beta_end=0.1)
REFUSED = (TypeError, ValueError, RuntimeError, OverflowError, MemoryError, BufferError)
TIMES, LABELS = 5, 4


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def padded(channels: int) -> int:
    return -(-channels // G) * G


class Valid:
    """Arguments of every call of an engine, none of them wrong: name -> (method, arguments), in the order of calls."""

    def __init__(self, rows: int = 2, height: int = 8, width: int = 8, channels: int = 20, method: Any = None):
        self.rows, self.H, self.W, self.C = rows, height, width, channels
        self.method = Method.winograd4 if method is None else method
        self.x, self.out, self.class_image = (
            floats(rows, 3, height, width),
            self.maps(3),
            floats(rows, height, width, 3),
        )
        self.times, self.classes = floats(TIMES, 4 * padded(channels)), floats(LABELS, 4 * padded(channels))
        self.calls: dict[str, tuple[str, dict[str, Any]]] = {}
        a, b, b_statistics = self.maps(3), self.maps(channels), self.statistics(channels)
        self.calls["input"] = "input", {"center": True, "combine": 1, "dst": a}
        self.conv("conv", [a], [3], b, method=self.method, statistics=b_statistics, emb=self.vectors(3, By.timestep))
        half = zeros(rows, height // 2, width // 2, padded(channels))
        self.calls["pool"] = "pool", {"src": [b], "norm": self.norm([channels]), "silu": True, "dst": half}
        self.conv("half", [b], [channels], zeros(*half.shape), stride=2, norm=self.norm([channels]))
        self.conv("up", [half], [channels], self.maps(channels), upsample=True, method=self.method, residual=half)
        self.conv("one", [b, a], [channels, 3], self.maps(channels), kernel=1, padding=0, residual=b, relu=True)
        both = self.norm([channels, 3], modulation=self.vectors(5, By.row, 2 * (channels + 3) + 5))
        self.conv("two", [b, a], [channels, 3], self.maps(channels), method=Method.winograd2, norm=both, silu=True)
        qkv = self.maps(3 * 2 * 6)
        several = {"src": [qkv], "heads": 2, "head_dim": 6, "text": None, "norm": None, "bf16": False}
        several["dst"] = self.maps(12)
        self.calls["heads"] = "attention", several
        reads = {**several, "src": [self.maps(12)], "text": floats(LABELS, 7, 2 * 12), "dst": self.maps(12)}
        self.calls["text"] = "attention", reads
        layer = "Norm", {
            "statistics": [], "channels": [channels], "groups": 0, "eps": 1e-5, "gamma": floats(padded(channels)),
            "beta": floats(padded(channels)), "modulation": None,
        }  # fmt: skip
        gates = -(-padded(channels) // (PANEL // 2)) * PANEL
        gated = {"kernel": 1, "padding": 0, "norm": layer, "geglu": True, "outputs": gates, "emb_channels": channels}
        self.conv("geglu", [b], [channels], self.maps(channels), **gated)
        single = {"src": [self.maps(channels), b], "heads": 1, "head_dim": channels, "text": None}
        single["norm"] = self.norm([channels])
        self.calls["attention"] = "attention", {**single, "bf16": False, "dst": self.maps(channels)}
        both = {"time": self.vectors(0, By.timestep), "classes": self.vectors(0, By.label)}
        self.calls["embed"] = "embed", {**both, "features": channels, "dst": zeros(rows, 1, 1, padded(channels))}
        self.conv("last", [b], [channels], self.out, norm=self.norm([channels]), silu=True, outputs=3)

    def maps(self, channels: int) -> np.ndarray:
        return zeros(self.rows, self.H, self.W, padded(channels))

    def statistics(self, channels: int) -> np.ndarray:
        return zeros(self.rows, -(-self.H // native.STRIP), 2, padded(channels))

    def vectors(self, offset: int, by: Any, width: int | None = None) -> tuple[str, dict[str, Any]]:
        values = {By.timestep: self.times, By.label: self.classes}.get(by)
        values = floats(self.rows, width) if values is None else values
        return "RowVectors", {"values": values, "by": by, "offset": offset}

    def norm(self, channels: list[int], modulation: Any = None) -> tuple[str, dict[str, Any]]:
        total = sum(channels)
        return "Norm", {
            "statistics": [self.statistics(c) for c in channels], "channels": channels, "groups": 1, "eps": 1e-5,
            "gamma": floats(total), "beta": floats(total), "modulation": modulation,
        }  # fmt: skip

    def conv(self, name: str, src: list[np.ndarray], channels: list[int], dst: np.ndarray, **changes: Any) -> None:
        outputs = changes.pop("outputs", self.C)
        arguments = {
            "src": src, "kernel": 3, "stride": 1, "padding": 1, "circular": False, "upsample": False,
            "method": Method.direct, "norm": None, "silu": False, "geglu": False, "relu": False, "bf16": False,
            "emb": None, "bias": floats(padded(outputs)), "emb_channels": outputs, "residual": None, "divide": 1.0,
            "dst": dst, "statistics": None, **changes,
        }  # fmt: skip
        positions = {Method.direct: 1, Method.winograd2: 16, Method.winograd4: 36}[arguments["method"]]
        depth = sum(map(padded, channels)) * (arguments["kernel"] ** 2 if positions == 1 else 1)
        arguments["weights"] = floats(-(-padded(outputs) // PANEL), positions, PANEL // SLICE, depth, SLICE)
        self.calls[name] = "conv", arguments

    def engine(self) -> dict[str, Any]:
        index = np.zeros(self.rows, np.int64)
        return {
            "isa": "", "threads": 1, "x": self.x, "out": self.out, "out_channels": 3, "timestep": index,
            "label": index.copy(), "class_image": self.class_image,
        }  # fmt: skip

    def step(self, images: int = 3, guided: bool = True) -> dict[str, Any]:
        tables = [solvers.dpmpp_2m(SCHEDULE, 3), solvers.ddpm(SCHEDULE, 2)]
        bank = TableBank(tables, torch.device("cpu"))
        shape, rows, index = (images, 3, self.H, self.W), images * (1 + guided), np.arange(images, dtype=np.int64)
        entry = np.arange(bank.host.shape[0] * bank.host.shape[1], dtype=np.int64).reshape(bank.host.shape[:2])
        return {
            "x": floats(*shape), "row": np.zeros_like(index), "table": index % 2, "entry": entry % TIMES,
            "images": index.copy(), "guided": index.copy() if guided else index[:0].copy(),
            "label": index % LABELS, "null_label": LABELS - 1, "null": (index + 1) % LABELS,
            "class_image": floats(images, self.H, self.W, 3), "null_image": floats(self.H, self.W, 3),
            "net": zeros(rows, self.H, self.W, G), "out": zeros(*shape),
            "bank": bank.values.numpy(), "guidance": floats(images), "rescale": floats(images), "advance_rows": True,
            "lengths": bank.lengths.numpy(), "seed": index, "index": index.copy(), "xs": zeros(*shape),
            "m1": zeros(*shape), "m2": zeros(*shape), "m3": zeros(*shape),
        }  # fmt: skip


def functions() -> dict[str, dict[str, Any]]:
    """Return valid arguments of the module's functions."""
    index, shape = np.arange(3, dtype=np.int64), (3, 2, 3, 5)
    bank = TableBank([solvers.ddpm(SCHEDULE, 2)], torch.device("cpu"))
    place = {"bank": bank.values.numpy(), "table": index * 0, "row": index * 0}
    history = {name: zeros(*shape) for name in ("xs", "m1", "m2", "m3")}
    words = {
        "words": np.zeros((3, 4), np.uint32),
        "counter": np.ones((3, 4), np.uint32),
        "key": np.ones((3, 2), np.uint32),
    }
    return {
        "update": {
            "x": floats(*shape), "out": floats(*shape), **place, "seed": index, "index": index.copy(), **history,
            "z": None, "x0_scale": floats(3), "images": np.array([0, 2]), "begin": 0, "end": -1, "isa": "",
        },
        "guide": {
            "out": zeros(*shape), "net": floats(6, 3, 5, G), **place, "guidance": floats(3), "channels": 2,
            "rescale": 0.5, "begin": 1, "end": 3, "isa": "",
        },
        "advance": {"row": index * 0, "table": index * 0, "lengths": bank.lengths.numpy()},
        "philox": {**words, "isa": ""},
        "normals": {"z": zeros(3, 7, 5), "seed": index, "index": index, "row": index, "stream": 1, "first": 3,
                    "words": np.zeros((3, 7, 5), np.uint32), "isa": ""},
        "checksums": {"arrays": [floats(5), floats(3, 7)], "threads": 2, "isa": ""},
    }  # fmt: skip


def made(value: Any) -> Any:
    """Return an argument with the objects that stand in it as (class, arguments)."""
    if isinstance(value, tuple) and len(value) == 2 and value[0] in ("Norm", "RowVectors"):
        return getattr(native, value[0])(**{k: made(v) for k, v in value[1].items()})
    return value


def build(valid: Valid, of: dict[str, Any] | None = None) -> Any:
    engine = native.Engine(**(of or valid.engine()))
    for method, arguments in valid.calls.values():
        getattr(engine, method)(**{k: made(v) for k, v in arguments.items()})
    return engine


# What can be wrong with an argument -----------------------------------------------------------------------------------


def resized(a: np.ndarray, draw: Any) -> np.ndarray:
    shape = list(a.shape) or [1]
    axis = draw(st.integers(0, len(shape) - 1))
    shape[axis] = max(0, shape[axis] + draw(st.sampled_from([-16, -2, -1, 1, 2, 16])))
    return np.zeros(shape, a.dtype)


def unaligned(a: np.ndarray, draw: Any) -> np.ndarray:
    raw = np.zeros(a.nbytes + 1, np.uint8)
    return raw[1:].view(a.dtype).reshape(a.shape)


def freed(a: np.ndarray, draw: Any) -> torch.Tensor:
    tensor = torch.from_numpy(a.astype(np.int64) if a.dtype == np.uint32 else a).clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def readonly(a: np.ndarray, draw: Any) -> np.ndarray:
    a = a.copy()
    a.flags.writeable = False
    return a


def with_index(a: np.ndarray, draw: Any) -> np.ndarray:
    """An index that does not exist, or another dtype's bits."""
    a = a.copy()
    if a.size:
        value = draw(st.sampled_from([-1, 1, 3, 100, 2**31, 2**62, -(2**63)]))
        of_type = {np.dtype(np.float32): np.nan, np.dtype(np.uint32): value % 2**32}
        a.flat[draw(st.integers(0, a.size - 1))] = of_type.get(a.dtype, value)
    return a


ARRAYS: list[Callable[[np.ndarray, Any], Any]] = [
    resized, resized, unaligned, freed, readonly, with_index, with_index,
    lambda a, _: a.astype(np.float64),
    lambda a, _: np.zeros(a.shape, np.int32),
    lambda a, _: a.astype(a.dtype.newbyteorder(">")),
    lambda a, _: np.repeat(a, 2, axis=-1)[..., ::2] if a.ndim else a,
    lambda a, _: a[::-1] if a.ndim else a,
    lambda a, _: a.T.copy().T,
    lambda a, _: np.broadcast_to(a.flat[0] if a.size else a, a.shape),
    lambda a, _: a.reshape(-1),
    lambda a, _: a[None],
    lambda a, _: a[:0] if a.ndim else a,
    lambda a, _: torch.from_numpy(a[..., :0].copy()),
    lambda a, _: torch.zeros(a.shape, device="meta"),
    lambda a, _: torch.zeros(a.shape, dtype=torch.bfloat16),
    lambda a, _: torch.zeros(a.shape, requires_grad=True),
    lambda a, _: tuple(a.shape),
    lambda a, _: (2**62, *a.shape[1:]),
    lambda a, _: a.ctypes.data,
    lambda a, _: a.tolist(),
]  # fmt: skip
NUMBERS = [-1, 0, 1, 2, 3, 4, 7, 64, 2**20, 2**24, 2**31 - 1, 2**31, 2**62, 2**63, -(2**31), 0.5, float("nan"), 1e300]
OTHERS = [None, "", "sse9", b"", object(), [], {}, True, *NUMBERS, Method.winograd2, By.label]


def damage(value: Any, draw: Any) -> Any:
    """Return the argument with one thing that is not as it should be."""
    if isinstance(value, np.ndarray) and draw(st.integers(0, 9)):
        return draw(st.sampled_from(ARRAYS))(value, draw)
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        i = draw(st.integers(0, len(value) - 1))
        return [*value[:i], damage(value[i], draw), *value[i + 1 :]] if draw(st.booleans()) else [*value, value[i]]
    if isinstance(value, tuple) and draw(st.integers(0, 5)):
        name = draw(st.sampled_from(sorted(value[1])))
        return value[0], {**value[1], name: damage(value[1][name], draw)}
    if isinstance(value, (int, float)) and draw(st.integers(0, 5)):
        return draw(st.sampled_from(NUMBERS))
    return draw(st.sampled_from(OTHERS))


FUZZ = settings(max_examples=300, suppress_health_check=list(HealthCheck), derandomize=True)
SHAPES = st.builds(
    Valid,
    rows=st.integers(1, 3),
    height=st.sampled_from([2, 4, 6, 8, 10]),
    width=st.sampled_from([2, 4, 6, 10]),
    channels=st.sampled_from([1, 15, 16, 17, 33, 70]),
    method=st.sampled_from([Method.direct, Method.winograd2, Method.winograd4]),
)


@settings(FUZZ, max_examples=40)
@given(valid=SHAPES, images=st.integers(1, 4), guided=st.booleans())
def test_what_fits_runs(valid, images, guided):
    engine = build(valid)
    engine.run(0, len(engine))
    step = valid.step(images, guided)
    engine.step(**step)
    assert step["row"].tolist() == [1] * images
    with pytest.raises(ValueError, match="no operation can be added"):
        engine.input(center=True, combine=0, dst=valid.calls["input"][1]["dst"])


@FUZZ
@given(data=st.data())
def test_an_operation_with_a_wrong_argument(data):
    valid = Valid(channels=data.draw(st.sampled_from([16, 20])))
    name = data.draw(st.sampled_from(sorted(valid.calls)))
    method, arguments = valid.calls[name]
    wrong = data.draw(st.sampled_from(sorted(arguments)))
    valid.calls[name] = method, {**arguments, wrong: damage(arguments[wrong], data.draw)}
    try:
        engine = build(valid)
        engine.step(**valid.step())
    except REFUSED:
        return


@FUZZ
@given(data=st.data())
def test_an_engine_or_a_step_with_a_wrong_argument(data):
    valid = Valid()
    engine, step = valid.engine(), valid.step()
    target = engine if data.draw(st.booleans()) else step
    wrong = data.draw(st.sampled_from(sorted(target)))
    target[wrong] = damage(target[wrong], data.draw)
    try:
        built = build(valid, engine)
        built.run(0, len(built))
        built.step(**step)
        built.step(**step)
    except REFUSED:
        return


@FUZZ
@given(data=st.data())
def test_a_function_with_a_wrong_argument(data):
    name, arguments = data.draw(st.sampled_from(sorted(functions().items(), key=lambda item: item[0])))
    wrong = data.draw(st.sampled_from(sorted(arguments)))
    arguments[wrong] = damage(arguments[wrong], data.draw)
    try:
        getattr(native, name)(**arguments)
    except REFUSED:
        return


@pytest.mark.parametrize("number", [-1, 0, 4097, 2**20, 2**31 - 1])
def test_a_number_of_threads_that_no_machine_has(number):
    with pytest.raises(ValueError, match="threads: from 1 to 4096 is needed"):
        native.Engine(**{**Valid().engine(), "threads": number})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("entry", np.full((2, 4), TIMES, np.int64), f"timestep {TIMES} of a table of {TIMES}"),
        ("entry", np.full((2, 4), -1, np.int64), "timestep -1"),
        ("label", np.full(3, LABELS, np.int64), f"label {LABELS} of a table of {LABELS}"),
        ("null_label", LABELS, f"label {LABELS} of a table of {LABELS}"),
        ("images", np.array([0, 1, 3]), "images has 3: ascending numbers below 3"),
        ("images", np.array([0, 2, 1]), "images has 1: ascending"),
        ("images", np.array([-1, 1, 2]), "images has -1"),
        ("images", np.array([0, 1]), "guided has 2: ascending numbers below 2"),
        ("images", np.array([[0, 1, 2]]), "one dimension"),
        ("guided", np.array([0, 0, 1]), "guided has 0: ascending"),
        ("guided", np.array([0, 1]), r"net is \[6, 8, 8, 16\], \[5, "),
        ("guidance", None, "guidance is None"),
        ("rescale", floats(4), r"rescale is \[4\], \[3\] is needed"),
        ("null_image", None, "class image"),
        ("null_image", floats(8, 8, 4), "null_image is"),
        ("label", None, "label is None"),
        ("null", np.full(3, -1, np.int64), f"label -1 of a table of {LABELS}"),
        ("null", np.array([0, LABELS, 1]), f"label {LABELS} of a table of {LABELS}"),
        ("null", np.zeros(2, np.int64), r"null is \[2\], \[3\] is needed"),
        ("class_image", None, "class image"),
        ("row", np.full(3, 4, np.int64), "row 4 of table"),
        ("table", np.full(3, 2, np.int64), "table 2"),
        ("lengths", np.zeros(1, np.int64), r"lengths is \[1\], \[2\] is needed"),
        ("x", zeros(3, 6, 8, 8), "prepared for"),
        ("net", zeros(6, 8, 8, 2 * G), "net is"),
        ("m2", zeros(3, 3, 8, 7), "m2 is"),
    ],
)  # fmt: skip
def test_a_step_is_refused_by_name(name, value, message):
    valid = Valid()
    engine, step = build(valid), valid.step()
    before = step["x"].copy()
    with pytest.raises(ValueError, match=message):
        engine.step(**{**step, "null": None if name == "null_label" else step["null"], name: value})
    assert np.array_equal(step["x"], before)
    engine.step(**step)  # and can still run


# Memory ---------------------------------------------------------------------------------------------------------------


def test_an_engine_keeps_its_arrays():
    """They are dropped here, and their memory is used for others."""
    valid = Valid()
    expected, step = Valid(), valid.step()
    build(expected).step(**(wanted := expected.step()))
    engine = build(valid)
    del valid
    gc.collect()
    others = [np.full(n, np.nan, np.float32) for n in (256, 4096, 36 * 16 * 64) for _ in range(64)]
    engine.step(**step)
    assert np.array_equal(step["x"], wanted["x"])
    assert all(np.isnan(other).all() for other in others)


def test_the_storage_of_an_operand_cannot_be_freed():
    tensor = torch.zeros(4, 4)
    arrays.array(tensor)
    with pytest.raises(RuntimeError, match="not resizable"):
        tensor.untyped_storage().resize_(0)


def test_threads_that_share_an_engine_take_turns():
    engine = build(valid := Valid())
    steps = [valid.step() for _ in range(4)]
    for i, step in enumerate(steps):
        step["x"] += i
    expected = [step["x"].copy() for step in steps]
    for x, step in zip(expected, steps, strict=True):
        alone = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in step.items()}
        engine.step(**{**alone, "x": x})
    threads = [threading.Thread(target=lambda s=step: engine.step(**s)) for step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(step["x"], x) for step, x in zip(steps, expected, strict=True))


@pytest.mark.parametrize("number", [2, 4])
def test_first_use_from_several_threads(number, monkeypatch):
    """All pack the same weights at once: each keeps what it reads, and nothing is packed twice."""
    monkeypatch.setattr("fastdiff.backends.native.threads.number", lambda: 2)
    expected, options = None, {"steps": 2, "labels": [0, 1], "guidance": 2.0}
    for _ in range(6):
        unet = random_unet(TINY_CLASSES)
        samplers = [Sampler(unet, SCHEDULE, backend="native") for _ in range(number)]
        start, got = threading.Barrier(number), [None] * number

        def work(i: int, samplers: Any = samplers, start: Any = start, got: Any = got) -> None:
            start.wait()
            got[i] = samplers[i].sample(2, **options).images
            _ = [torch.full((n,), torch.nan) for n in (64, 1024, 16384, 147456) for _ in range(8)]
            got[i] = torch.cat([got[i], samplers[i].sample(2, **options).images])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected = got[0] if expected is None else expected
        assert torch.equal(expected[:2], expected[2:])
        assert all(images is not None and torch.equal(images, expected) for images in got)
        packed = packing.Weights.of(unet, native).packed
        assert len({t.data_ptr() for t in packed.values()}) == len(packed)
