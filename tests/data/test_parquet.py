"""Parquet files of images, as Hugging Face's data sets have them."""

from __future__ import annotations

import builtins
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastdiff.data import load_data
from fastdiff.errors import DataError, InvalidArgument

RNG = np.random.default_rng(0)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pictures(n: int, size: int = 8, channels: int = 3) -> list[np.ndarray]:
    shape = (size, size) if channels == 1 else (size, size, channels)
    return [RNG.integers(0, 256, shape, np.uint8) for _ in range(n)]


def write(path: Path, images: list[Any], names: list[str] | None = None, **columns: list[Any]) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"image": images, **columns})
    if names is not None:
        info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, path, row_group_size=3)
    return path


def rows(images: list[np.ndarray]) -> list[dict[str, Any]]:
    return [{"bytes": png(p), "path": f"{i}.png"} for i, p in enumerate(images)]


def test_images_labels_and_names(tmp_path: Path) -> None:
    images = pictures(7)
    path = write(tmp_path / "a.parquet", rows(images), ["cat", "dog", "bird"], label=[2, 1, 0, 1, 2, 0, 0])
    data = load_data(path)
    found, labels = data.__getitems__(range(7))
    assert np.array_equal(found.numpy(), np.stack(images).transpose(0, 3, 1, 2))
    assert labels is not None
    assert labels.tolist() == [2, 1, 0, 1, 2, 0, 0]
    assert data.class_names == ("cat", "dog", "bird")
    assert load_data(path, class_depth=0).num_classes is None
    assert load_data(path, class_names=["a", "b", "c"]).class_names == ("a", "b", "c")


def test_a_folder_of_shards_and_a_column_of_bytes_alone(tmp_path: Path) -> None:
    images = pictures(70)
    for shard in (1, 0):
        part = images[35 * shard : 35 * shard + 35]
        write(tmp_path / f"train-0000{shard}-of-00002.parquet", [png(p) for p in part])
    data = load_data(tmp_path)
    assert np.array_equal(data.__getitems__(range(70))[0].numpy(), np.stack(images).transpose(0, 3, 1, 2))
    assert data.labels is None
    write(tmp_path / "test-00000-of-00001.parquet", rows(pictures(1)))
    with pytest.raises(DataError, match="has the splits test, train"):
        load_data(tmp_path)


def test_broken_rows_are_left_out_and_named(tmp_path: Path) -> None:
    images = [
        *rows(pictures(1, 16)), {"bytes": png(pictures(1)[0])[:60], "path": None},
        {"bytes": None, "path": "there.png"}, {"bytes": b"no image", "path": None}, None,
        *rows(pictures(1, 4)), *rows(pictures(1, 8, 1)),
    ]  # fmt: skip
    data = load_data(write(tmp_path / "a.parquet", images, label=[0] * 7), size=8)
    assert (len(data), data.channels) == (2, 3)
    reasons = {str(file.relative_to(tmp_path)): reason for file, reason in data.skipped}
    assert set(reasons) == {f"a.parquet/row {i}" for i in (1, 2, 3, 4, 5)}
    assert "there.png" in reasons["a.parquet/row 2"]
    assert "no image" in reasons["a.parquet/row 4"]


@pytest.mark.parametrize(
    ("label", "said"),
    [([0, -1], "row 1: label '-1'"), (["a", "b"], "row 0: label 'a'"), ([0, None], "1 of 2 images have no label")],
)
def test_labels_that_are_no_classes(tmp_path: Path, label: list[Any], said: str) -> None:
    path = write(tmp_path / "a.parquet", rows(pictures(2)), label=label)
    with pytest.raises(DataError, match=said):
        load_data(path)
    assert len(load_data(path, class_depth=0)) == 2


def test_what_is_not_such_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = write(tmp_path / "a.parquet", rows(pictures(2)))
    for options, said in (
        ({"frames": "all"}, "frames='all' is for folders"),
        ({"labels": path}, "label file of an IDX"),
    ):
        with pytest.raises(InvalidArgument, match=said):
            load_data(path, **options)
    with pytest.raises(InvalidArgument, match="class_names= needs labels"):
        load_data(path, class_names=["a"])
    pq.write_table(pa.table({"picture": [b"x"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="no column image or img or images; it has picture"):
        load_data(tmp_path / "b.parquet")
    pq.write_table(pa.table({"image": [3]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="the column image holds int64"):
        load_data(tmp_path / "c.parquet")
    whole = path.read_bytes()
    for name, content in (("cut", whole[:-20]), ("torn", whole[:50] + bytes(len(whole) - 54) + whole[-4:])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="no Parquet file, or is damaged"):
            load_data(tmp_path / name)


def test_without_pyarrow_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(300) + b"PAR1")
    imported = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match="pip install pyarrow"):
        load_data(tmp_path / "a.parquet")
