"""The command line, as a shell runs it: its output and files, its errors for bad input, its help."""

from __future__ import annotations

import dataclasses
import gzip
import inspect
import json
import re
import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fastdiff
from fastdiff import checkpoint, cli, solvers
from fastdiff.backends.native import choose_method
from fastdiff.core.lower import lower
from fastdiff.core.plan import plan
from fastdiff.core.program import Conv
from fastdiff.data import pictures as images
from fastdiff.sampler import Sampler
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import StepTable
from tests.support import oracles as oracle
from tests.support import warm
from tests.support.unets import TINY, TINY_CLASSES, change, random_unet, randomize_

CLASSES = 4
COMMANDS = (
    "sample", "generate", "verify", "export", "train", "info", "convert", "bench", "eval", "trilemma", "serve",
)  # fmt: skip


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny network of four classes, 3 x 8 x 8."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    checkpoint.save_folder(path, random_unet(TINY_CLASSES), NoiseSchedule("linear", 100, beta_end=0.1))
    return str(path)


def shell(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``fastdiff`` in a process of its own."""
    return warm.run("-m", "fastdiff", *arguments, cwd=folder)


def commands() -> dict[str, Callable[..., None]]:
    """Return the functions of the commands, by name."""
    return {f.__name__: f for command in cli.app.registered_commands if (f := command.callback) is not None}


Result = tuple[int, str, str]
Call = Callable[..., Result]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run ``fastdiff`` in an empty folder, in this process (importing torch anew costs seconds): (code, out, err)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["fastdiff", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


# Help -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def printed_help() -> dict[str, str]:
    """Return what each command prints for --help, all in one new process, which has not imported torch after any."""
    code = f"""
import contextlib, io, json, sys
from fastdiff.cli import main
texts = {{}}
for command in {["", *COMMANDS]!r}:
    sys.argv = ["fastdiff", *([command] if command else []), "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as text:
        try:
            main()
        except SystemExit as end:
            assert not end.code, (command, end.code)
    heavy = {{"torch", "numpy", "PIL", "safetensors", "diffusers"}} & set(sys.modules)
    assert not heavy, f"{{command}} imported {{sorted(heavy)}}"
    texts[command] = text.getvalue()
print(json.dumps(texts))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_light(command: str, printed_help: dict[str, str]) -> None:
    assert "Usage: fastdiff" in printed_help[command]
    for word in ["Examples:", f"fastdiff {command}"] if command else COMMANDS:
        assert word in printed_help[command]


def test_version_is_light(tmp_path: Path) -> None:
    code = """
import sys
from fastdiff.cli import main
sys.argv = ["fastdiff", "--version"]
try:
    main()
finally:
    assert "torch" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, fastdiff.__version__)


@pytest.fixture
def help_text(call: Call, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")

    def text(command: str) -> str:
        code, out, _ = call(command, "--help")
        assert code == 0
        return out

    return text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_every_default(command: str, help_text: Callable[[str], str]) -> None:
    """Rich takes text in brackets for markup: a default that is explained there vanishes from the help."""
    text = re.sub(r"\s*│\n│\s*", " ", help_text(command))
    source = inspect.getsource(commands()[command])
    body = source[: source.index("-> None:")]
    options = inspect.getsource(cli.options)
    for shared in re.findall(r": (\w+Option) =", body):  # options of several commands
        definition = re.search(rf"^{shared} = Annotated.*\n(?:[ \]].*\n)*", options, re.MULTILINE)
        assert definition is not None
        body += definition[0]
    explained = re.findall(r"\(default: [^)\n]*\)", body)
    assert "[default" not in body
    assert len(explained) >= {
        "sample": 5,
        "generate": 5,
        "train": 4,
        "convert": 2,
        "bench": 2,
        "eval": 5,
        "trilemma": 7,
    }.get(command, 0)
    for default in explained:
        assert default in text, f"{default} is not shown"


EXAMPLE = re.compile(r"^ ?((?:fastdiff|torchrun) .*?) *$", re.MULTILINE)


def examples(command: str) -> list[str]:
    """Return the command lines in the docstring of a command."""
    found = re.findall(r"^\s*((?:fastdiff|torchrun) .*)$", str(commands()[command].__doc__), re.MULTILINE)
    assert len(found) >= 2
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_can_be_copied_from_the_help(command: str, help_text: Callable[[str], str]) -> None:
    """Compare the examples on a terminal of 80 columns with those that the tests below run."""
    assert EXAMPLE.findall(help_text(command)) == examples(command)


@pytest.mark.example
@pytest.mark.parametrize("example", examples("sample"))
def test_sample_examples(example: str, call: Call) -> None:
    """Run the examples with fewer images and steps."""
    arguments = shlex.split(re.sub(r"--per-class \d+", "--per-class 1", re.sub(r"--n \d+", "--n 2", example)))[1:]
    if "--steps" in arguments:
        arguments[arguments.index("--steps") + 1] = "2"
    elif "--quality" not in arguments:
        arguments += ["--steps", "2"]
    for option in {"--image", "--condition"} & set(arguments):
        Image.new("L", (40, 36), 128).save(arguments[arguments.index(option) + 1])
    if "--condition" in arguments:
        checkpoint.save_folder(arguments[1], random_unet(change(TINY, in_channels=4)), NoiseSchedule())
    code, out, err = call(*arguments)
    assert (code, err) == (0, "")
    written = [a for a in arguments if Path(a).suffix in (".png", ".gif", ".npz") and a not in ("in.png", "gray.png")]
    assert written
    for name in written:
        assert Path(name).stat().st_size > 0
        assert name in out or name.endswith(".gif")


@pytest.mark.example
@pytest.mark.parametrize("example", examples("info"))
def test_info_examples(example: str, call: Call) -> None:
    code, out, err = call(*shlex.split(example)[1:])
    assert (code, err) == (0, "")
    assert "v_prediction" in out
    if "--solver" in example:
        assert "ddim: 10 steps, 10 rows" in out


# convert --------------------------------------------------------------------------------------------------------------


@pytest.mark.example
def test_convert_examples(call: Call) -> None:
    """Run the examples in their order, as each uses the result of the one before, on a small original."""
    network = randomize_(oracle.DDPM(32, 3, (1, 1), 1, (8,), 3, 16))
    torch.save(network.state_dict(), "cifar10.ckpt")
    for example in examples("convert"):
        code, out, err = call(*shlex.split(example)[1:])
        assert (code, err) == (0, "")
        assert out.startswith(f"{shlex.split(example)[3]}: ")
    back = torch.load("back.ckpt", weights_only=True)
    assert all(torch.equal(v, back[k]) for k, v in network.state_dict().items())
    assert back.keys() == network.state_dict().keys()
    assert checkpoint.load("cifar10").unet.config.sample_size == 32
    assert call("sample", "fashion.safetensors", "--n", "1", "--steps", "1", "--labels", "3", "--out", "a.png")[0] == 0


def test_convert_says_what_it_did(model: str, call: Call) -> None:
    code, out, err = call("convert", model, "a.safetensors", "--json")
    assert (code, err) == (0, "")
    unet = random_unet(TINY_CLASSES)
    assert json.loads(out) == {
        "src": model, "dst": "a.safetensors", "format": "safetensors", "from": "diffusers",
        "tensors": len(unet.state_dict()), "parameters": sum(p.numel() for p in unet.parameters()), "left_out": [],
    }  # fmt: skip
    song = randomize_(oracle.SongUNet(8, 128, (1,), 1, (), augment_dim=9))
    torch.save({"ema": song.state_dict(), "net": {"x": torch.ones(1)}}, "edm.pt")
    code, out, err = call("convert", "edm.pt", "b", "--weights", "ema")
    assert (code, err) == (0, "")
    assert out.splitlines()[1] == "left out, as sampling does not need them: map_augment.weight"
    assert (Path("b") / "unet" / "config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        (["nowhere", "out"], ("nowhere", "fashion-mnist")),
        (["MODEL", "out", "--format", "gguf"], ("'gguf'", "diffusers, safetensors, ddpm")),
        (["MODEL", "out.pt"], ("out.pt", "Give the format")),
        (["MODEL", "out.pt", "--format", "edm"], ("cannot be written as 'edm'", "norm_eps")),
        (["MODEL", "out", "--preset", "adm-imagenet-64"], ("preset='adm-imagenet-64'", "folder")),
        (["MODEL", "out", "--variant", "fp16"], ("fp16",)),
        (["MODEL", "file/out"], ("file/out", "could not be written")),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_convert_arguments(arguments: list[str], needles: tuple[str, ...], model: str, call: Call) -> None:
    Path("file").write_text("in the way")
    assert_refused(call("convert", *[model if a == "MODEL" else a for a in arguments]), needles)
    assert [p.name for p in Path().iterdir()] == ["file"]


# train ----------------------------------------------------------------------------------------------------------------


def photos(folder: Path) -> None:
    """Eight pictures in two sub-folders."""
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        for i in range(4):
            picture = Image.fromarray(rng.integers(0, 256, (70, 80, 3), dtype=np.uint8))
            images.save_picture(picture, folder / name / f"{i}.png")


def idx(path: Path, array: np.ndarray) -> None:
    """MNIST's format, gzipped."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


SMALL = ["--steps", "2", "--batch-size", "4", "--channels", "8,8,16", "--layers", "1", "--groups", "4",
         "--sample-every", "0", "--save-every", "2"]  # fmt: skip


def train_arguments(example: str, folder: Path) -> list[str]:
    """Change a train example to take less time: data made here, a small network, two updates, nothing compiled."""
    photos(folder / "photos")
    idx(folder / "images.gz", np.arange(8 * 28 * 28).reshape(8, 28, 28) % 256)
    idx(folder / "labels.gz", np.arange(8) % 3)
    for name, mode in (("colour", "RGB"), ("gray", "L")):
        for i in range(8):
            images.save_picture(Image.new(mode, (70, 80), ("red", "blue")[i % 2]), folder / name / f"{i}.png")
    arguments = [a for a in shlex.split(example) if a != "--compile"]
    assert any((folder / a).exists() for a in arguments), "an example on data that this test does not make"
    return [*arguments, *SMALL]


@pytest.mark.example
@pytest.mark.parametrize("example", [e for e in examples("train") if e.startswith("fastdiff")])
def test_train_examples(example: str, call: Call, tmp_path: Path) -> None:
    arguments = train_arguments(example, tmp_path)[1:]
    code, out, err = call(*arguments, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["step"] == 2
    sampler = Sampler.from_pretrained(result["model"], device="cpu")
    assert result["parameters"] == sum(p.numel() for p in sampler.unet.parameters())
    size = int(arguments[arguments.index("--size") + 1])
    assert sampler.info.size == (size, size)
    assert sampler.info.classes == (3 if "images.gz" in arguments else None if "colour" in arguments else 2)
    condition = torch.zeros(1, 1, size, size) if "--condition" in arguments else None
    assert torch.isfinite(sampler.sample(1, steps=1, condition=condition).images).all()


@pytest.mark.slow
@pytest.mark.parametrize("example", [e for e in examples("train") if e.startswith("torchrun")])
def test_torchrun_example(example: str, tmp_path: Path) -> None:
    arguments = train_arguments(example, tmp_path)
    arguments[0] = shutil.which("torchrun", path=str(Path(sys.executable).parent)) or "torchrun"
    result = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("step 2") == 1, "only the first process reports"
    assert (tmp_path / arguments[arguments.index("-o") + 1] / "model" / "unet" / "config.json").exists()


# sample ---------------------------------------------------------------------------------------------------------------


FIELDS = {"out", "images", "shape", "seed", "solver", "rows", "nfe", "backend", "device", "dtype", "seconds",
          "img_steps_per_s"}  # fmt: skip


def test_sample_with_the_built_in_model(tmp_path: Path) -> None:
    arguments = [
        "sample", "fashion-mnist", "--n", "3", "--steps", "2", "--labels", "9,0", "--guidance", "2", "--seed", "5",
        "--device", "cpu", "--json", "--out", "deep/boots.png",
    ]  # fmt: skip
    command = [sys.executable, "-m", "fastdiff", *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    said = json.loads(result.stdout)
    assert said.keys() == FIELDS
    assert {k: said[k] for k in ("out", "images", "shape", "seed", "solver", "rows", "nfe", "device", "dtype")} == {
        "out": "deep/boots.png",
        "images": 3,
        "shape": [1, 32, 32],
        "seed": 5,
        "solver": "ddim",
        "rows": 2,
        "nfe": 4,
        "device": "cpu",
        "dtype": "float32",
    }
    assert said["seconds"] > 0
    assert said["img_steps_per_s"] == pytest.approx(6 / said["seconds"], rel=0.1)
    expected = Sampler.from_pretrained("fashion-mnist", device="cpu").sample(
        3, steps=2, labels=[9, 0, 9], guidance=2.0, seed=5
    )
    with Image.open(tmp_path / "deep" / "boots.png") as picture:
        difference = np.asarray(picture).astype(int) - np.asarray(expected.grid()).astype(int)
    assert np.abs(difference).max() <= 1


def test_sample_says_what_it_did(model: str, call: Call) -> None:
    code, out, err = call("sample", model, "--n", "5", "--steps", "3", "--solver", "ddpm", "--out", "a.npz")
    assert (code, err) == (0, "")
    assert out.startswith("a.npz: 5 images, ddpm, 3 steps, 3 network evaluations each, seed 0\n")
    backend = Sampler.from_pretrained(model).backend
    assert re.search(rf"img-steps/s on \w+(:\d+)? \({backend}, float32\)", out)


def test_sample_options_reach_the_sampler(model: str, call: Call) -> None:
    code, _, err = call(
        "sample", model, "--n", "3", "--labels", "2", "--seed", "18446744073709551615", "--start-index", "7",
        "--steps", "4", "--eta", "0.5", "--spacing", "leading", "--guidance", "1.5", "--batch-size", "2",
        "--size", "4x12", "--dtype", "float64", "--backend", "eager", "--device", "cpu", "--out", "a.npz",
    )  # fmt: skip
    assert code == 0, err
    expected = Sampler.from_pretrained(model, dtype="float64", device="cpu").sample(
        3, labels=2, seed=2**64 - 1, start_index=7, steps=4, eta=0.5, spacing="leading", guidance=1.5, batch_size=2,
        size=(4, 12),
    )  # fmt: skip
    with np.load("a.npz", allow_pickle=False) as arrays:
        assert np.array_equal(arrays["images"], images.to_uint8(expected.images))
        assert arrays["labels"].tolist() == [2, 2, 2]
        assert arrays["seed"].item() == 2**64 - 1
        assert arrays["indices"].tolist() == [7, 8, 9]


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--solver", "unipc", "--order", "3", "--steps", "5"], {"solver": "unipc", "order": 3, "steps": 5}),
        (["--compat", "openai", "--spacing", "ddim5"], {"compat": "openai", "spacing": "ddim5"}),
    ],
    ids=["order", "compat"],
)
def test_options_of_solvers_reach_the_sampler(
    arguments: list[str], options: dict[str, Any], model: str, call: Call
) -> None:
    common = ["--n", "2", "--labels", "1", "--dtype", "float64", "--backend", "eager", "--device", "cpu"]
    code, _, err = call("sample", model, *common, *arguments, "--out", "a.npz")
    assert code == 0, err
    expected = Sampler.from_pretrained(model, dtype="float64", device="cpu").sample(2, labels=1, **options)
    with np.load("a.npz", allow_pickle=False) as arrays:
        assert np.array_equal(arrays["images"], images.to_uint8(expected.images))


def test_sample_from_an_image(model: str, call: Call) -> None:
    """The picture, shrunk to the model's size; a mask's white is drawn anew."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).resize((16, 16), Image.Resampling.NEAREST).save("large.png")
    Image.fromarray(pixels).save("in.png")
    white = np.zeros((8, 8), np.uint8)
    white[2:5, 3:7] = 255
    Image.fromarray(white).save("mask.png")
    options = ("--n", "2", "--labels", "1", "--steps", "4", "--backend", "eager")
    code, out, err = call("sample", model, *options, "--image", "in.png", "--strength", "0.5", "-o", "a.npz")
    assert code == 0, err
    assert "2 steps" in out
    sampler = Sampler.from_pretrained(model, backend="eager", device="cpu")
    image = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
    expected = sampler.sample(2, labels=1, steps=4, image=image, strength=0.5)
    assert np.array_equal(np.load("a.npz")["images"], images.to_uint8(expected.images))
    code, _, err = call("sample", model, *options, "--image", "in.png", "--mask", "mask.png", "-o", "b.npz")
    assert code == 0, err
    drawn = np.load("b.npz")["images"]
    assert np.array_equal(drawn[:, white == 0], np.broadcast_to(pixels, (2, 8, 8, 3))[:, white == 0])
    assert not np.array_equal(drawn[:, white > 0], np.broadcast_to(pixels, (2, 8, 8, 3))[:, white > 0])
    assert call("sample", model, *options, "--image", "large.png", "-o", "c.png")[0] == 0

    Path("text.png").write_text("no image")
    bomb = Path("in.png").read_bytes()
    Path("bomb.png").write_bytes(bomb[:16] + struct.pack(">II", 60000, 60000) + bomb[24:])
    Image.new("L", (4, 4)).save("small.png")
    Image.new("L", (8, 8)).save("black.png")
    for arguments, needles in {
        ("--image", "none.png"): ("none.png", "no such file"),
        ("--image", "text.png"): ("--image text.png", "cannot be read"),
        ("--image", "bomb.png"): ("--image bomb.png", "cannot be read"),
        ("--image", "small.png"): ("--image small.png", "4x4", "smaller than 8x8"),
        ("--image", "in.png", "--strength", "2"): ("strength=2.0", "at most 1"),
        ("--strength", "0.5"): ("strength needs image=",),
        ("--mask", "mask.png"): ("mask needs image=",),
        ("--image", "in.png", "--mask", "black.png"): ("0 everywhere",),
    }.items():
        assert_refused(call("sample", model, *options, "-o", "d.png", *arguments), needles)


def test_sample_into_a_folder(model: str, call: Call) -> None:
    code, out, _ = call("sample", model, "--n", "3", "--steps", "1", "--start-index", "99", "--out", "some/folder")
    assert code == 0
    assert "some/folder: 3 images" in out
    assert sorted(p.name for p in Path("some/folder").iterdir()) == ["000099.png", "000100.png", "000101.png"]


def test_per_class_has_a_row_for_each_class(model: str, call: Call) -> None:
    options = ["sample", model, "--per-class", "3", "--steps", "2", "--n", "77"]
    assert call(*options, "--out", "a.npz")[0] == 0
    assert call(*options, "--out", "a.png")[0] == 0
    with np.load("a.npz", allow_pickle=False) as arrays:
        labels, pictures = arrays["labels"], arrays["images"]
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    with Image.open("a.png") as picture:
        grid = np.asarray(picture)
    assert grid.shape == (CLASSES * 10 + 2, 3 * 10 + 2, 3)
    for label in range(CLASSES):
        for column in range(3):
            cell = grid[2 + 10 * label : 10 + 10 * label, 2 + 10 * column : 10 + 10 * column]
            assert np.array_equal(cell, pictures[3 * label + column])


def test_what_happens_to_an_image_is_said(model: str, call: Call, caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.new("RGBA", (8, 8), (200, 9, 9, 90 * i)) for i in range(3)]
    frames[0].save("in.png", save_all=True, append_images=frames[1:])
    arguments = ("sample", model, "--n", "1", "--steps", "2", "--labels", "1", "--out", "a.png", "--image")
    assert call(*arguments, "in.png")[0] == 0
    assert "--image in.png: it has 3 pages or frames, of which the first alone is used" in caplog.text
    assert "--image in.png: its alpha channel is composited over white" in caplog.text
    Image.fromarray(np.full((8, 8), 4095, np.uint16)).save("deep.png")
    assert call(*arguments, "deep.png")[0] == 0
    assert "--image deep.png: its 16-bit values reach 4095 of 65535 alone, so that it is dark" in caplog.text
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save("float.tif")
    assert_refused(call(*arguments, "float.tif"), ("float.tif cannot be read: floating-point pixels",))


def test_an_image_with_alpha(call: Call, caplog: pytest.LogCaptureFixture) -> None:
    """A network of images with alpha keeps that of the picture, shrunk with it; another picture is opaque."""
    config = dataclasses.replace(TINY_CLASSES, in_channels=4, out_channels=4, num_class_embeds=None, null_label=None)
    checkpoint.save_folder("clear", random_unet(config), NoiseSchedule("linear", 100, beta_end=0.1))
    pixels = np.full((16, 16, 4), (200, 9, 90, 255), np.uint8)
    pixels[:, ::2] = (0, 255, 0, 0)  # invisible, so that its colour is not mixed into the others
    Image.fromarray(pixels).save("clear.png")
    Image.fromarray(pixels[..., :3]).save("opaque.png")
    options = ("sample", "clear", "--n", "1", "--steps", "4", "--backend", "eager", "--strength", "0.25", "-o", "a.npz")
    sampler = Sampler.from_pretrained("clear", backend="eager", device="cpu")
    shrunk = {
        "clear.png": Image.fromarray(pixels),
        "opaque.png": Image.fromarray(pixels[..., :3]),
    }
    for name, picture in shrunk.items():
        code, _, err = call(*options, "--image", name)
        assert code == 0, err
        small = picture.resize((8, 8), Image.Resampling.LANCZOS).convert("RGBA")
        expected = sampler.sample(1, steps=4, image=small, strength=0.25)
        assert np.array_equal(np.load("a.npz")["images"], images.to_uint8(expected.images))
    mixed = np.array(Image.fromarray(pixels).resize((8, 8), Image.Resampling.LANCZOS))[4, 4, :3]
    assert np.abs(mixed.astype(int) - (200, 9, 90)).max() <= 1
    assert "alpha" not in caplog.text
    five = dataclasses.replace(config, in_channels=5, out_channels=5)
    checkpoint.save_folder("five", random_unet(five), NoiseSchedule("linear", 100, beta_end=0.1))
    assert_refused(call("sample", "five", *options[2:], "--image", "clear.png"), ("5 channels", "no pictures"))


@pytest.mark.parametrize("name", ["film.gif", "film.webp"])
def test_animate(name: str, model: str, call: Call) -> None:
    code, _, err = call("sample", model, "--n", "4", "--steps", "6", "--animate", name, "--out", "a.png")
    assert (code, err) == (0, "")
    with Image.open(name) as film, Image.open("a.png") as last:
        assert film.n_frames == 6
        assert film.size == last.size == (22, 22)
        film.seek(5)
        difference = np.asarray(film.convert("RGB")).astype(int) - np.asarray(last).astype(int)
        assert np.abs(difference).mean() < 25, "the film ends with the picture, up to its format's colours"


def test_animate_shows_the_first_chunk(model: str, call: Call) -> None:
    code, _, err = call(
        "sample", model, "--n", "3", "--steps", "2", "--batch-size", "2", "--animate", "film.gif", "--out", "a.png"
    )
    assert (code, err) == (0, "")
    with Image.open("film.gif") as film:
        assert (film.n_frames, film.size) == (2, (22, 12))


# info -----------------------------------------------------------------------------------------------------------------


def test_info_of_the_built_in_model(tmp_path: Path) -> None:
    result = shell(tmp_path, "info", "--solver", "ddim", "--steps", "4", "--json")
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert {k: said[k] for k in ("model", "image", "classes", "null_label", "prediction")} == {
        "model": "fashion-mnist",
        "image": [1, 32, 32],
        "classes": 10,
        "null_label": 10,
        "prediction": "v_prediction",
    }
    sampler = Sampler.from_pretrained("fashion-mnist", device="cpu")
    assert said["parameters"] == sum(p.numel() for p in sampler.unet.parameters())
    program = plan(lower(sampler.unet, (32, 32)), 1)
    assert said["gflop_per_image_step"] == round(program.to_dict()["flops"] / 1e9, 4)
    assert said["schedule"]["beta_schedule"] == "squaredcos_cap_v2"
    table = StepTable.from_json(json.dumps(said["table"]))
    assert table == solvers.ddim(NoiseSchedule("cosine"), 4, prediction="v_prediction")


def test_info(model: str, call: Call) -> None:
    code, out, err = call("info", model, "--solver", "ddpm", "--steps", "5")
    assert (code, err) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in out.split("\n\n")[0].splitlines())
    unet = random_unet(TINY_CLASSES)
    assert int(lines["parameters"]) == sum(p.numel() for p in unet.parameters())
    assert json.loads(lines["image"]) == [3, 8, 8]
    assert (lines["classes"], lines["null_label"], lines["prediction"]) == ("4", "4", "epsilon")
    assert json.loads(lines["schedule"])["num_train_timesteps"] == 100
    assert json.loads(lines["unet"]) == unet.config.to_dict()
    table = out.split("\n\n")[1].splitlines()
    assert table[0].startswith("ddpm: 5 steps, 5 rows")
    assert len(table) == 7
    said = json.loads(call("info", model, "--json")[1])
    assert not {"table", "program"} & set(said)
    assert said["unet"] == unet.config.to_dict()


def test_info_program(model: str, call: Call) -> None:
    layout = plan(lower(random_unet(TINY_CLASSES), (8, 8)), 3)
    code, out, err = call("info", model, "--program", "--batch-size", "3")
    assert (code, err) == (0, "")
    printed = out.split("\n\n")[1].splitlines()
    methods = {op.dst: choose_method(op, layout.program, 3) for op in layout.program.ops if isinstance(op, Conv)}
    assert "\n".join(printed) == layout.text(methods) != str(layout)
    assert {"winograd4", "direct"} <= set(methods.values())
    assert len(printed) == len(layout.program.ops) + 2
    for line, op in zip(printed[1:], layout.program.ops, strict=False):
        assert line.startswith(type(op).__name__.lower())
        assert f"  {op.dst}" in line
    assert f"{layout.size / 2**20:.1f} MiB" in printed[-1]
    said = json.loads(call("info", model, "--program", "--batch-size", "3", "--json")[1])["program"]
    assert said == layout.to_dict(methods)
    assert {op["name"]: op["method"] for op in said["ops"] if op["method"]} == methods
    assert said["arena"] == layout.size
    assert said["flops"] == 3 * sum(map(layout.program.flops, layout.program.ops))
    code, out, err = call("info", model, "--program", "--batch-size", "0")
    assert code != 0
    assert "--batch-size 0" in err


# Bad input ------------------------------------------------------------------------------------------------------------


def assert_refused(result: Result, needles: tuple[str, ...]) -> None:
    code, out, err = result
    assert code == 2, (out, err)
    assert out == ""
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    assert all(needle in err for needle in needles), err


BAD_SAMPLE = [
    (["--steps", "0"], ("steps=0", "from 1 to 100")),
    (["--steps", "101"], ("steps=101", "from 1 to 100")),
    (["--seed", "-1"], ("-1", "2^64 - 1")),
    (["--seed", "18446744073709551616"], ("18446744073709551616", "2^64 - 1")),
    (["--size", "33"], ("33x33", "multiples of the network's stride, 2")),
    (["--size", "0"], ("size=0", "at least 1")),
    (["--size", "8x8x8"], ("--size 8x8x8", "24x40")),
    (["--size", "big"], ("--size big", "24x40")),
    (["--size", "100000x10000"], ("100000x10000", "GiB")),
    (["--labels", "99"], ("label 99", "0 to 3")),
    (["--labels", "0,4"], ("label 4", "0 to 3")),
    (["--labels", "cat"], ("--labels cat", "whole numbers")),
    (["--labels", ""], ("--labels", "whole numbers")),
    (["--out", "a.xyz"], ("a.xyz", ".png", ".npz")),
    (["--animate", "a.mp4"], ("a.mp4", ".gif or .webp")),
    (["--per-class", "0"], ("--per-class 0", "at least 1")),
    (["--n", "0"], ("n=0", "at least 1")),
    (["--n", "-3", "--labels", "1"], ("n=-3", "at least 1")),
    (["--n", "1000000000000"], ("n=1000000000000", "GiB")),
    (["--n", "1000000000000", "--labels", "0,1"], ("n=1000000000000", "GiB")),
    (["--per-class", "1000000000000"], ("n=4000000000000", "GiB")),
    (["--solver", "euler9"], ("euler9", "ddim, ddpm")),
    (["--eta", "-1"], ("eta=-1.0", "positive")),
    (["--variance", "beta"], ("variance='beta'", "ddpm")),
    (["--order", "2"], ("order=2", "unipc")),
    (["--compat", "openai", "--spacing", "trailing"], ("spacing='trailing'", "timestep_respacing")),
    (["--compat", "jax"], ("compat='jax'", "diffusers, openai, ho")),
    (["--spacing", "log"], ("spacing='log'", "trailing")),
    (["--guidance", "nan", "--labels", "1"], ("guidance=nan", "finite")),
    (["--guidance", "2"], ("guidance=2.0", "labels")),
    (["--start-index", "-1"], ("start_index=-1", "from 0")),
    (["--batch-size", "0"], ("batch_size=0", "at least 1")),
    (["--backend", "tensorrt"], ("tensorrt", "auto, eager, compiled")),
    (["--dtype", "float8"], ("float8", "float32, bfloat16, float16")),
    (["--device", "toaster"], ("toaster",)),
]


@pytest.mark.parametrize(("arguments", "needles"), BAD_SAMPLE, ids=lambda value: " ".join(value))
def test_bad_sample_arguments(arguments: list[str], needles: tuple[str, ...], model: str, call: Call) -> None:
    assert_refused(call("sample", model, "--out", "a.png", *arguments), needles)
    assert not list(Path().iterdir()), "something was written"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device")
def test_a_device_that_is_not_there(model: str, call: Call) -> None:
    assert_refused(call("sample", model, "--device", "cuda"), ("device='cuda'",))


def test_bad_input_in_a_shell(tmp_path: Path) -> None:
    result = shell(tmp_path, "sample", "fashion-minst", "--steps", "0")
    assert_refused((result.returncode, result.stdout, result.stderr), ("fashion-minst", "built in: fashion-mnist"))


def test_unknown_models(call: Call) -> None:
    for command in ("sample", "info"):
        assert_refused(call(command, "nothing-like-it"), ("nothing-like-it", "fashion-mnist"))
    Path("model.pt").write_bytes(b"\x80\x02")
    assert_refused(call("sample", "model.pt"), ("model.pt", "pickles that would run code are refused"))
    Path("empty").mkdir()
    assert_refused(call("sample", "empty"), ("empty", "config.json"))


NASTY = "x\x1b[2J\x1b]0;t\x07\u202e\r\x9b"


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", NASTY], ["info", NASTY], [NASTY], [f"--{NASTY}"], ["sample", f"--{NASTY}"], ["sample", "a", NASTY],
        ["sample", "--steps", NASTY], ["sample", "--out", f"{NASTY}.xyz"], ["sample", "--solver", NASTY],
        ["sample", "--labels", NASTY], ["sample", "--image", NASTY], ["train", NASTY], ["convert", NASTY, NASTY],
        ["bench", "--engines", NASTY], ["sample", f"-{NASTY}"], ["sample", f"--steps={NASTY}"],
    ],
    ids=repr,
)  # fmt: skip
def test_errors_interpret_no_argument(arguments: list[str], call: Call) -> None:
    code, out, err = call(*arguments)
    assert code != 0
    assert not {"\x1b", "\x07", "\r", "\x9b", "\u202e"} & set(out + err), err


def test_names_in_files_reach_no_terminal(model: str, call: Call) -> None:
    """They are those of keys, tensors, files, classes and settings."""
    shutil.copytree(model, "copy")
    configs = [p for p in Path("copy").rglob("config.json")]
    config = json.loads(configs[0].read_text())
    for nasty in ({NASTY: 1}, {"_class_name": NASTY}, {"down_block_types": [NASTY]}, {"act_fn": NASTY}):
        configs[0].write_text(json.dumps(config | nasty))
        code, out, err = call("info", "copy")
        assert code != 0
        assert all(line.isprintable() for line in (out + err).split("\n")), err
    configs[0].write_text(json.dumps(config))
    (weights,) = Path("copy").rglob("*.safetensors")
    save_file({**load_file(weights), NASTY: torch.ones(1)}, weights)
    code, out, err = call("info", "copy")
    assert code != 0
    assert "cannot be printed" in err
    assert all(line.isprintable() for line in (out + err).split("\n")), err
    torch.save({**load_file(Path(model).rglob("*.safetensors").__next__()), NASTY: torch.ones(1)}, "w.pt")
    Path("config.json").write_text(json.dumps(config))
    code, out, err = call("info", "w.pt")
    assert code != 0
    assert all(line.isprintable() for line in (out + err).split("\n")), err
    nasty = Path(NASTY)
    nasty.mkdir()
    (nasty / f"{NASTY}.png").write_bytes(b"no picture")
    code, out, err = call("train", str(nasty), "--out", "out", "--steps", "1")
    assert code != 0
    assert all(line.isprintable() for line in (out + err).split("\n")), err


def test_files_that_cannot_be_written(model: str, call: Call) -> None:
    """The error comes before the work, as the folder of a result is made first."""
    Path("file").write_text("in the way")
    assert_refused(call("sample", model, "--steps", "1", "--out", "file/a.png"), ("file",))
    assert_refused(call("sample", model, "--steps", "1", "--animate", "file/a.gif"), ("file",))
    Path("a.png").mkdir()
    assert_refused(call("sample", model, "--steps", "1", "--n", "1", "--out", "a.png"), ("a.png",))
    assert Path("file").read_text() == "in the way"
    assert [p.name for p in Path().glob(".*")] == []


def test_bad_info_arguments(model: str, call: Call) -> None:
    assert_refused(call("info", model, "--solver", "euler9"), ("euler9", "ddim, ddpm"))
    assert_refused(call("info", model, "--solver", "ddim", "--steps", "0"), ("steps=0", "from 1 to 100"))
    assert_refused(call("info", model, "--steps", "4"), ("--steps 4", "--solver"))


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        (["nowhere"], ("nowhere",)),
        (["photos", "--size", "33"], ("33", "stride")),
        (["photos", "--size", "32", "--attention", "5"], ("--attention 5", "32, 16, 8")),
        (["photos", "--size", "32", "--channels", "wide"], ("--channels wide", "whole numbers")),
        (["photos", "--size", "32", "--groups", "7"], ("norm_num_groups=7", "64")),
        (["photos", "--size", "32", "--steps", "0"], ("steps=0", "from 1 to 2**62")),
        (["photos", "--size", "32", "--lr", "-1"], ("lr=-1.0", "positive")),
        (["photos", "--size", "32", "--schedule", "wave"], ("wave", "linear, scaled_linear, cosine, sigmoid")),
        (["photos", "--size", "32", "--prediction", "noise"], ("noise", "epsilon")),
        (["photos", "--size", "32", "--fit", "stretch"], ("stretch", "crop", "pad")),
        (["photos", "--size", "32", "--labels", "labels.gz"], ("photos", "IDX")),
        (["photos", "--size", "32", "--config", "none.json"], ("none.json",)),
        (["photos", "--size", "32", "--device", "toaster"], ("toaster",)),
        (["photos", "--size", "32", "--seed", "-1"], ("-1", "2^64 - 1")),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_train_arguments(arguments: list[str], needles: tuple[str, ...], call: Call, tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    assert_refused(call("train", *arguments, "--out", "run"), needles)
    assert not Path("run").exists()


def test_usage_errors_are_no_tracebacks(call: Call) -> None:
    for arguments in (["sample", "--n", "many"], ["sample", "--colour"], ["paint"], ["train"]):
        code, out, err = call(*arguments)
        assert code == 2
        assert out == ""
        assert "Usage:" in err
        assert "Traceback" not in err


def test_numbers_that_become_nan_are_an_error(model: str, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = random_unet(TINY_CLASSES)
    with torch.no_grad():
        broken.conv_out.bias[0] = torch.nan
    loaded: Any = checkpoint.load(model)
    monkeypatch.setattr("fastdiff.checkpoints.load", lambda _: dataclasses.replace(loaded, unet=broken))
    assert_refused(call("sample", model, "--n", "2", "--steps", "1"), ("2 of 2 images", "NaN", "index 0, 1"))
