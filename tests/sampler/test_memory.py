"""The memory of a run: forecast, refused where there is too little, and not more than the images and a chunk."""

from __future__ import annotations

import json

import pytest
import torch

from fastdiff import memory
from fastdiff.errors import InvalidArgument
from fastdiff.sampler import Sampler
from fastdiff.sampler.output import SampleOutput
from tests.support.checkpoints import needs_posix, run_python
from tests.support.unets import TINY, random_unet

# A network that takes no memory of its own, in a process whose peak can be measured and limited.
CHILD = """
import json, resource, sys, torch
import fastdiff
from fastdiff.errors import FastdiffError

class Zero(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(()))
    def forward(self, x, t):
        return x * 0

def status(name):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

n = 320
sampler = fastdiff.Sampler(Zero(), shape=(3, 256, 256), backend="eager")
sampler.sample(16, steps=1, batch_size=16)
"""


@pytest.mark.parametrize(
    ("free", "n", "needles"),
    [
        (1 << 20, 1, ["size=512x512", "one image needs"]),
        (400 << 20, 600, ["n=600", "the images need 1800 MiB", "draw fewer at a time"]),
        (0, 1, ["size=512x512", "0 MiB more"]),
    ],
)
def test_too_little_memory_is_said_before_the_work(monkeypatch, free, n, needles):
    monkeypatch.setattr(memory, "free", lambda: free)
    sampler = Sampler(random_unet(TINY), backend="eager")
    with pytest.raises(InvalidArgument) as caught:
        sampler.request(n, size=512, labels=None)
    assert all(needle in str(caught.value) for needle in needles)
    monkeypatch.setattr(memory, "free", lambda: None)  # a system that does not say
    sampler.request(n, size=512)


@pytest.mark.slow
@needs_posix
def test_a_run_takes_the_memory_of_its_images(tmp_path):
    """The images, and a chunk's state; joining and checking them took four times as much. Saving takes less yet."""
    code = (
        CHILD
        + """
    def peak():
        open("/proc/self/clear_refs", "w").write("5")
        return status("VmRSS")

    before = peak()
    output = sampler.sample(n, steps=1, batch_size=16)
    sampled = (status("VmHWM") - before) / output.images.nbytes
    before = peak()
    output.save(sys.argv[1] + "/a.npz")
    saved = (status("VmHWM") - before) / output.images.nbytes
    print(json.dumps([sampled, saved]))
    """.replace("\n    ", "\n")
    )
    sampled, saved = json.loads(run_python(code, tmp_path).stdout)
    assert 0.9 < sampled < 1.6
    assert saved < 0.6


@needs_posix
def test_a_limit_of_the_process_is_foreseen():
    """The forecast has 192 MiB for one image of a network that is not known."""
    code = (
        CHILD
        + """
    result = 4 * n * 3 * 256 * 256
    now = status("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (now + (192 << 20) + result // 2, -1))
    try:
        sampler.sample(n, steps=1, batch_size=16)
    except FastdiffError as e:
        print(e)
    resource.setrlimit(resource.RLIMIT_AS, (now + 4 * result, -1))  # threads reserve addresses, too
    print(len(sampler.sample(n, steps=1, batch_size=16).images))
    """.replace("\n    ", "\n")
    )
    message, count = run_python(code).stdout.splitlines()
    assert "n=320: the images need 240 MiB" in message
    assert count == "320"


def test_pictures_in_blocks_are_those_of_the_whole(tmp_path, monkeypatch):
    images = torch.rand(7, 3, 8, 8) * 2.2 - 1.1
    output = SampleOutput(images, 0, 5, None, 1, None)
    whole = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    monkeypatch.setattr("fastdiff.data.pictures.BLOCK", 400)
    output.save(tmp_path / "folder")
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == [f"{i:06d}.png" for i in range(5, 12)]
    from PIL import Image

    from fastdiff.data.pictures import to_uint8

    assert (to_uint8(images) == whole).all()
    assert (torch.from_numpy(whole[2]) == torch.tensor(list(Image.open(tmp_path / "folder" / "000007.png").getdata()))
            .reshape(8, 8, 3)).all()  # fmt: skip
