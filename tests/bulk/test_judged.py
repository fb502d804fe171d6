"""`evaluate` judges the images of a job's folder, as it judges an .npz of the same images."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fastdiff import bulk, cli
from fastdiff.bulk import job as jobs
from fastdiff.errors import DataError, InvalidArgument, JobError
from fastdiff.evaluation import evaluate
from fastdiff.evaluation.classifier import CLASS_NAMES
from fastdiff.sampler import Sampler
from tests.bulk.jobs import draw, tiny
from tests.bulk.test_verify_export import flip
from tests.support.unets import TINY_CLASSES, change

N = 26


def gray(names: Any = CLASS_NAMES) -> Sampler:
    """Make a sampler of ten classes, 1 x 32 x 32, those of the judge."""
    config = change(TINY_CLASSES, sample_size=32, in_channels=1, out_channels=1, num_class_embeds=11, null_label=10)
    return tiny(config, class_names=names)


@pytest.mark.parametrize("format", ["npz", "imagefolder"])
def test_a_job_is_judged_as_its_arrays(tmp_path: Path, mnist: Path, format: str) -> None:
    """A shard of the job has more images than `evaluate` keeps in a part, which must not matter."""
    draw(gray(), tmp_path / "job", n=N, shard_size=9, format=format, labels=[9, 2, 2])
    bulk.export(tmp_path / "job", adm=tmp_path / "all.npz")
    with np.load(tmp_path / "all.npz") as file:
        np.savez(tmp_path / "named.npz", images=file["arr_0"], labels=file["arr_1"], class_names=CLASS_NAMES)
    job = evaluate(samples=tmp_path / "job", data=mnist, out=tmp_path / "out")
    arrays = evaluate(samples=tmp_path / "named.npz", data=mnist, out=tmp_path / "out")
    assert (job["n"], job["metrics"], job["accuracy"]) == (N, arrays["metrics"], arrays["accuracy"])
    assert job["accuracy"] is not None
    assert job["summary"]["samples"]["size"] == [32, 32]
    fewer = evaluate(samples=tmp_path / "job", n=20, data=mnist, out=tmp_path / "out")
    assert fewer["n"] == 20


def test_jobs_of_other_classes_or_none(tmp_path: Path, mnist: Path) -> None:
    draw(gray([f"kind {i}" for i in range(10)]), tmp_path / "other", n=N)
    draw(gray(None), tmp_path / "unnamed", n=N)
    draw(gray(), tmp_path / "none", n=N, labels=None)
    for name in ("other", "unnamed", "none"):
        report = evaluate(samples=tmp_path / name, data=mnist, out=tmp_path / "out")
        assert report["accuracy"] is None
    told = evaluate(samples=tmp_path / "unnamed", data=mnist, out=tmp_path / "out", labels_of="fashion-mnist")
    assert told["accuracy"] is not None


def test_an_unfinished_job_is_refused_unless_its_first_images_are_asked_for(tmp_path: Path, mnist: Path) -> None:
    draw(gray(), tmp_path / "job", n=N, shard_size=4)
    whole = evaluate(samples=tmp_path / "job", n=20, data=mnist, out=tmp_path / "out")
    (tmp_path / "job" / "shards" / "000005.json").unlink()
    with pytest.raises(JobError, match=r"1 of 7 shards is missing.* generate.* n=20 .*judges the images before"):
        evaluate(samples=tmp_path / "job", data=mnist, out=tmp_path / "out")
    with pytest.raises(JobError, match="is missing"):
        evaluate(samples=tmp_path / "job", n=21, data=mnist, out=tmp_path / "out")
    assert evaluate(samples=tmp_path / "job", n=20, data=mnist, out=tmp_path / "out") == whole
    (tmp_path / "job" / "shards" / "000000.npz").unlink()
    with pytest.raises(JobError, match=r"2 of 7 shards are missing[^=]*$"):
        evaluate(samples=tmp_path / "job", data=mnist, out=tmp_path / "out")
    with pytest.raises(DataError, match="holds 26 images, 27 are needed"):
        evaluate(samples=tmp_path / "job", n=27, data=mnist, out=tmp_path / "out")


def test_what_is_wrong_with_a_job_is_named(tmp_path: Path, mnist: Path) -> None:
    draw(gray(), tmp_path / "job", n=N, shard_size=9)

    def run(error: type[Exception], match: str, name: str, **options: Any) -> None:
        with pytest.raises(error, match=match):
            evaluate(samples=tmp_path / name, **{"data": mnist, "out": tmp_path / "out", **options})

    run(DataError, r"job/shards is part of the job .*job; give the folder of the job", "job/shards")
    run(DataError, "give the folder of the job", "job/shards", n=20)
    for option, value in (("frames", "all"), ("profile", "srgb"), ("layout", "NHWC")):
        run(InvalidArgument, f"{option}='{value}' is for .*job", "job", data_options={option: value})
    run(InvalidArgument, "frame' is unknown", "job", data_options={"frame": "all"})
    flip(jobs.read(tmp_path / "job").path(1), random.Random(0))
    run(JobError, r"000001\.npz: .*fastdiff verify .* --redraw", "job")
    (tmp_path / "job" / "job.json").write_text("{}")
    run(JobError, r"job\.json: the objects settings and call", "job")
    draw(tiny(), tmp_path / "colour", n=N)
    run(DataError, "8x8", "colour", fit="crop")
    assert not (tmp_path / "out").exists()


def test_a_job_may_be_the_real_images(tmp_path: Path, mnist: Path) -> None:
    """As where many steps are what few steps are compared with; classes of real images are nobody's."""
    draw(gray(), tmp_path / "real", n=N, steps=2)
    draw(gray(), tmp_path / "made", n=N)
    for name in ("real", "made"):
        bulk.export(tmp_path / name, adm=tmp_path / f"{name}.npz")
    job = evaluate(samples=tmp_path / "made", data=tmp_path / "real", held_out=tmp_path / "made", out=tmp_path / "out")
    arrays = evaluate(samples=tmp_path / "made.npz", data=tmp_path / "real.npz", out=tmp_path / "out")
    assert job["metrics"] == arrays["metrics"]
    assert (job["held_out"]["n"], job["real_images"]) == (N, N)


def test_the_command(tmp_path: Path, mnist: Path) -> None:
    draw(gray(), tmp_path / "job", n=N)
    arguments = ["eval", "--samples", str(tmp_path / "job"), "--data", str(mnist), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.app, [*arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["n"] == N
    (tmp_path / "job" / "shards" / "000000.json").unlink()
    result = CliRunner().invoke(cli.app, arguments)
    assert isinstance(result.exception, JobError)
