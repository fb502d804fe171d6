"""Bulk jobs of a model that reads text, and scripts that start workers without a guard."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from fastdiff import NoiseSchedule, Sampler, bulk, checkpoints
from fastdiff.bulk import job as jobs
from fastdiff.data.pictures import to_uint8
from fastdiff.errors import InvalidArgument, JobError
from tests.bulk.jobs import saved
from tests.support.captioned import network_and_encoder
from tests.support.paths import ROOT

PROMPTS = ["a dog", "a red car", "snow"]
CALL = {"steps": 2, "guidance": 2.0, "negative": "night", "shard_size": 4, "batch_size": 2}


@pytest.fixture(scope="module")
def sampler():
    unet, encoder = network_and_encoder()
    return Sampler(unet, NoiseSchedule(), text_encoder=encoder)


def test_images_are_the_samplers(sampler, tmp_path):
    bulk.generate(sampler, 10, tmp_path / "a", prompts=PROMPTS, **CALL)
    asked = [PROMPTS[i % 3] for i in range(10)]
    want = to_uint8(sampler.sample(10, prompts=asked, negative="night", guidance=2.0, steps=2, batch_size=2).images)
    found = [np.load(tmp_path / "a" / "shards" / f"{i:06d}.npz") for i in range(3)]
    np.testing.assert_array_equal(np.concatenate([file["images"] for file in found]), want)
    assert [text for file in found for text in file["prompts"].tolist()] == asked
    assert bulk.verify(tmp_path / "a").good
    with pytest.raises(JobError, match="prompts: "):
        bulk.generate(sampler, 10, tmp_path / "a", prompts=PROMPTS[:2], **CALL)


@pytest.mark.parametrize("format", ["webdataset", "imagefolder"])
def test_the_prompt_is_beside_each_image(sampler, tmp_path, format):
    bulk.generate(sampler, 4, tmp_path / "a", prompts=PROMPTS, format=format, **CALL)
    if format == "webdataset":
        with tarfile.open(tmp_path / "a" / "shards" / "000000.tar") as archive:
            facts = [json.load(archive.extractfile(f"{i:09d}.json")) for i in range(4)]
    else:
        lines = (tmp_path / "a" / "shards" / "000000" / "metadata.jsonl").read_text().splitlines()
        facts = [json.loads(line) for line in lines]
    assert [fact["prompt"] for fact in facts] == [*PROMPTS, PROMPTS[0]]


def test_another_encoder_is_another_model(sampler, tmp_path):
    bulk.generate(sampler, 4, tmp_path / "a", prompts="a dog", **CALL)
    unet, encoder = network_and_encoder()
    encoder.norm.weight.data.mul_(1.5)
    with pytest.raises(JobError, match="model: "):
        bulk.generate(Sampler(unet, NoiseSchedule(), text_encoder=encoder), 4, tmp_path / "a", prompts="a dog", **CALL)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "prompts= is needed"),
        ([], "prompts="),
        (["a"] * 11, "a list of 1 to 10 texts"),
        (["a dog", 3], "prompts"),
        ("dog " * 100, "100 pieces of words"),
        (b"dog", "prompts="),
    ],
)
def test_refused_prompts(sampler, tmp_path, prompts, message):
    with pytest.raises(InvalidArgument, match=message):
        bulk.generate(sampler, 10, tmp_path / "a", prompts=prompts, **CALL)
    assert not (tmp_path / "a").exists()


@pytest.mark.slow  # 11 s: two processes that import torch
def test_workers_draw_from_a_file_of_prompts(sampler, tmp_path):
    """The command with a worker writes the images of a sampler that has loaded the same folder."""
    checkpoints.save_folder(tmp_path / "model", sampler.unet, sampler.schedule, text_encoder=sampler.text_encoder)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    arguments = ["generate", str(tmp_path / "model"), "-n", "6", "-o", "job", "--workers", "1", "--steps", "2"]
    arguments += ["--prompts", "prompts.txt", "--negative", "night", "--guidance", "2", "--batch-size", "2"]
    subprocess.run(
        [sys.executable, "-m", "fastdiff", *arguments], cwd=tmp_path, check=True, env=_environment(), timeout=600
    )
    job = jobs.read(tmp_path / "job")
    assert job.settings["prompts"] == PROMPTS
    images = np.concatenate([np.load(job.path(shard))["images"] for shard in job.shards])
    asked = [PROMPTS[i % 3] for i in range(6)]
    want = sampler.sample(6, prompts=asked, negative="night", guidance=2.0, steps=2, batch_size=2).images
    assert np.abs(images.astype(int) - to_uint8(want)).max() <= 1


@pytest.mark.slow
def test_a_script_without_a_guard_gets_an_error_that_says_so(tmp_path):
    model = saved(tmp_path / "model")
    (tmp_path / "script.py").write_text(
        f"from fastdiff import bulk\nbulk.generate({model!r}, 4, 'job', steps=1, workers=1, labels=None)\n"
    )
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, env=_environment(), timeout=600
    )
    assert done.returncode == 1
    assert "InvalidArgument: generate starts processes" in done.stderr
    assert '__name__ == "__main__":' in done.stderr
    assert "bootstrapping" not in done.stderr


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
