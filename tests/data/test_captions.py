"""Captions of folders of images, and a training from them on the command line."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff import cli
from fastdiff.data import load_data
from fastdiff.errors import DataError, InvalidArgument

TEXTS = {"a/1.png": "a red square", "a/2.png": "a green  square", "b/3.png": "ein Quadrat, blau \N{LARGE BLUE SQUARE}"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images in sub-folders, with a text file beside each and a table of other captions."""
    root = tmp_path / "pictures"
    for i, (name, text) in enumerate(TEXTS.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 80 * i, np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"  {text}\n", encoding="utf-8")
    lines = [json.dumps({"file_name": name, "text": f"table: {text}", "more": 1}) for name, text in TEXTS.items()]
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return root


def test_captions_beside_images(folder):
    data = load_data(folder, captions="txt")
    assert data.captions is not None
    assert list(data.captions) == list(TEXTS.values())
    assert data.captions[1:] == list(TEXTS.values())[1:]
    assert data.digest != load_data(folder).digest
    assert load_data(folder).captions is None
    (folder / "a" / "1.txt").write_text("another text")
    assert load_data(folder, captions="txt").digest != data.digest


def test_captions_of_a_table(folder):
    data = load_data(folder, captions="metadata.jsonl")
    assert data.captions is not None
    assert list(data.captions) == [f"table: {text}" for text in TEXTS.values()]


def test_the_caption_of_an_unreadable_image_is_that_of_the_image_in_its_place(folder):
    data = load_data(folder, captions="txt")
    (folder / "a" / "2.png").write_bytes(b"damaged")  # after the data were opened
    images, _ = data.__getitems__([1])
    assert torch.equal(images[0], data.__getitems__([2])[0][0])
    assert data.captions is not None
    assert data.captions[1] == TEXTS["b/3.png"]


def test_captions_that_are_missing_or_damaged(folder):
    (folder / "a" / "2.txt").write_text("  \n")
    (folder / "b" / "3.txt").unlink()
    with pytest.raises(DataError, match=r"2 of 3 images have no caption, the first is a/2\.png; each needs a text"):
        load_data(folder, captions="txt")
    (folder / "a" / "2.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match=r"2\.txt cannot be read as UTF-8"):
        load_data(folder, captions="txt")
    (folder / "a" / "2.txt").write_text("x" * (1 << 17))
    with pytest.raises(DataError, match=r"2\.txt has more than 65536 bytes"):
        load_data(folder, captions="txt")
    table = folder / "metadata.jsonl"
    for line in ("{", "[]", '{"file_name": "a/1.png"}', '{"file_name": 3, "text": "x"}', "[" * 100_000):
        table.write_text(f"\n{line}\n")
        with pytest.raises(DataError, match=r"metadata\.jsonl, line 2: an object with"):
            load_data(folder, captions="metadata.jsonl")
    table.write_text('{"file_name": "a/1.png", "text": "x"}\n')
    with pytest.raises(DataError, match="2 of 3 images have no caption"):
        load_data(folder, captions="metadata.jsonl")
    with pytest.raises(DataError, match=r"none\.jsonl cannot be read"):
        load_data(folder, captions="none.jsonl")
    for wrong in ("json", 3, True):
        with pytest.raises(InvalidArgument, match="captions="):
            load_data(folder, captions=wrong)  # type: ignore[arg-type]


def test_captions_are_for_folders(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(InvalidArgument, match=r"captions='txt' is for files of images, but .* is an \.npz file"):
        load_data(tmp_path / "x.npz", captions="txt")


def test_train_and_sample_on_the_command_line(folder, tmp_path, monkeypatch, capsys):
    """A model is trained from captions, a second call resumes it, and ``sample --prompt`` draws from it."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["fastdiff", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0)

    out = tmp_path / "run"
    arguments = ["train", str(folder), "--captions", "txt", "--caption-tokens", "16", "--out", str(out), "--channels"]
    arguments += ["16,32", "--groups", "8", "--batch-size", "3", "--layers", "1", "--sample-every", "0", "--steps"]
    assert run(*arguments, "2") == 0, capsys.readouterr().err
    assert run(*arguments, "3") == 0, capsys.readouterr().err
    assert (out / "model" / "text_encoder" / "config.json").exists()
    picture = tmp_path / "drawn.png"
    assert run("sample", str(out), "--prompt", "a red square", "-n", "2", "--steps", "2", "-o", str(picture)) == 0
    assert Image.open(picture).mode == "RGB"
    assert run("sample", str(out), "-n", "2", "-o", str(picture)) == 2
    assert "prompts" in capsys.readouterr().err
    shutil.rmtree(out)
    assert run(*arguments, "1", "--class-depth", "1") == 2
    assert "--captions takes the place of classes" in capsys.readouterr().err
