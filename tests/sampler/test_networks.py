"""Networks that a sampler takes, diffusers' pipelines, and the files that its output writes."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from PIL import Image
from torch import Tensor

from fastdiff import solvers
from fastdiff.backends import Spec, native
from fastdiff.backends.native import extension
from fastdiff.core.state import State, TableBank
from fastdiff.errors import (
    BackendError,
    CheckpointError,
    InvalidArgument,
)
from fastdiff.sampler import Sampler
from fastdiff.schedule import NoiseSchedule
from fastdiff.unet import UNetConfig
from tests.sampler.by_hand import (
    ROUNDED,
    SCHEDULE,
    SHAPE,
    TINY_LEARNED,
    Probe,
    T,
    assert_close,
    by_hand,
    initial,
    leading,
    sampler_of,
    trailing,
)
from tests.support.unets import TINY, TINY_CLASSES, change, diffusers_twin, random_unet

# Networks -------------------------------------------------------------------------------------------------------------


BACKENDS = ["eager", pytest.param("native", marks=pytest.mark.skipif(extension() is None, reason="not built"))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 3), (3, 9), (3, 4)])
def test_an_output_that_is_no_prediction_of_the_image_is_refused(inputs: int, outputs: int, backend: str) -> None:
    unet = random_unet(change(in_channels=inputs, out_channels=outputs))
    sampler = Sampler(unet, SCHEDULE, backend=backend)
    message = f"gives {outputs} channels for images of {inputs} channels; {inputs} are needed, or {2 * inputs}"
    for call in (sampler.sample, lambda n, steps: list(sampler.stream(n, steps=steps))):
        with pytest.raises(InvalidArgument, match=message):
            call(2, steps=2)
    with pytest.raises(InvalidArgument, match=f"shape=.* has {outputs} channels; the network takes {inputs}"):
        Sampler(unet, SCHEDULE, backend=backend, shape=(outputs, 8, 8))


@pytest.mark.parametrize(("inputs", "outputs"), [(6, 3), (4, 3), (3, 1), (64, 1)])
def test_an_output_of_fewer_channels_needs_a_condition(inputs: int, outputs: int) -> None:
    """As where a condition is concatenated to the input (SR3, Palette)."""
    unet = random_unet(change(in_channels=inputs, out_channels=outputs))
    sampler = Sampler(unet, SCHEDULE)
    message = f"takes {inputs} channels and gives {outputs}, so it needs condition= with {inputs - outputs} channels"
    for call in (sampler.sample, lambda n, steps: list(sampler.stream(n, steps=steps))):
        with pytest.raises(InvalidArgument, match=message):
            call(2, steps=2)
    with pytest.raises(InvalidArgument, match=f"shape=.* has {outputs} channels; the network takes {inputs}"):
        Sampler(unet, SCHEDULE, shape=(outputs, 8, 8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_learned_variance_has_twice_the_channels(backend: str) -> None:
    sampler = Sampler(random_unet(change(out_channels=6)), SCHEDULE, backend=backend)
    assert sampler.sample(2, solver="ddpm", steps=2, variance="learned_range").images.shape == (2, 3, 8, 8)


def test_a_network_that_adds_its_condition_itself() -> None:
    """Its configuration is that of the network inside, so ``shape`` counts."""

    class Conditioned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = random_unet(change(in_channels=6))
            self.config = self.unet.config

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.unet(torch.cat([x, torch.ones_like(x)], dim=1), t)

    sampler = Sampler(Conditioned(), SCHEDULE, shape=(3, 8, 8))
    assert sampler.sample(2, steps=2).images.shape == (2, 3, 8, 8)


@pytest.mark.skipif(extension() is None, reason="not built")
def test_the_engine_itself_refuses_channels_that_do_not_fit() -> None:
    unet = random_unet(change(in_channels=6))
    runner = native.prepare(unet, Spec(1, (6, 8, 8), torch.float32, torch.device("cpu")))
    bank = TableBank([solvers.ddim(SCHEDULE, 2)], torch.device("cpu"))
    state = State.create(torch.zeros(1, 6, 8, 8), bank)
    with pytest.raises(BackendError, match="gives 3 channels; 6 are needed, or 12"):
        runner.step(state)
    runner.forward(state)  # which needs no update
    assert state.out is not None
    assert state.out.shape == (1, 3, 8, 8)
    with pytest.raises(InvalidArgument, match="gave 3 channels; 6 are needed, or 12"):
        runner.update(state)
    for shape in ((1, 3, 8, 8), (1, 6, 16, 8), (1, 6, 8)):
        state.x = torch.zeros(shape)
        with pytest.raises(BackendError, match="x is"):
            runner.forward(state)


def test_a_network_of_diffusers() -> None:
    config = dataclasses.replace(TINY, num_class_embeds=5)
    unet = random_unet(config)
    twin = diffusers_twin(unet).train()
    sampler = Sampler(twin, SCHEDULE)
    assert (sampler.info.channels, sampler.info.size, sampler.info.classes) == (3, (8, 8), 5)
    out = sampler.sample(3, steps=4, labels=[0, 4, 2])
    x = initial(0, range(3))
    assert_close(
        out.images, lambda dtype: by_hand(unet, x, trailing(4), labels=[0, 4, 2], dtype=dtype)[-1][0]
    )  # fmt: skip
    assert twin.training
    with pytest.raises(InvalidArgument, match="labels from 0 to 4"):
        sampler.sample(3, steps=4)
    with pytest.raises(InvalidArgument, match="null_label"):
        sampler.sample(3, steps=4, labels=1, guidance=2.0)


def test_a_plain_module() -> None:
    class Wrapped(Probe):
        def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Any:
            return types.SimpleNamespace(sample=super().forward(x, t, class_labels))

    for probe in (Probe(), Wrapped()):
        sampler = Sampler(probe, SCHEDULE, shape=(1, 5, 7))
        out = sampler.sample(2, steps=3, labels=[12, 7])
        assert [call[2].tolist() for call in probe.calls] == [[12, 7]] * 3
        x = initial(0, range(2), (1, 5, 7))
        assert_close(out.images, lambda dtype, x=x: by_hand(Probe(), x, trailing(3), dtype=dtype)[-1][0])
        sampler.sample(1, steps=1, size=(2, 3))
        assert probe.calls[-1][0].shape == (1, 1, 2, 3)
        assert probe.calls[-1][2] is None


def test_a_plain_module_with_the_wrong_output() -> None:
    class Gray(Probe):
        def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
            return super().forward(x, t)[:, :1]

    with pytest.raises(InvalidArgument, match="gave 1 channels; 3 are needed"):
        Sampler(Gray(), SCHEDULE, shape=SHAPE).sample(1, steps=1)


def save_pipeline(path: Path, scheduler: Any, config: UNetConfig = TINY) -> DDPMPipeline | DDIMPipeline:
    kind = DDPMPipeline if isinstance(scheduler, DDPMScheduler) else DDIMPipeline
    pipeline = kind(diffusers_twin(random_unet(config)), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(path)
    return pipeline


COSINE = {"num_train_timesteps": T, "beta_schedule": "squaredcos_cap_v2"}


@pytest.mark.parametrize(
    ("scheduler", "ddim", "ddpm"),
    [
        (
            DDPMScheduler(**COSINE, prediction_type="v_prediction", clip_sample=False, variance_type="fixed_large",
                          timestep_spacing="leading", steps_offset=1),
            {"prediction": "v_prediction", "clip": None, "spacing": "leading", "steps_offset": 1},
            {"prediction": "v_prediction", "clip": None, "spacing": "leading", "steps_offset": 1, "variance": "beta"},
        ),
        (
            DDPMScheduler(**COSINE, prediction_type="sample", clip_sample_range=2.5,
                          timestep_spacing="linspace", steps_offset=1),
            {"prediction": "sample", "clip": 2.5, "spacing": "linspace"},
            {"prediction": "sample", "clip": 2.5, "spacing": "linspace"},
        ),
        (
            DDIMScheduler(**COSINE, set_alpha_to_one=False, timestep_spacing="trailing"),
            {"set_alpha_to_one": False},
            {},
        ),
        (
            DDPMScheduler(**COSINE, variance_type="learned_range"),
            {"spacing": "leading"},
            {"spacing": "leading", "variance": "learned_range"},
        ),
    ],
    ids=["v", "sample", "ddim", "learned"],
)  # fmt: skip
def test_scheduler_configurations_of_diffusers(
    tmp_path: Path, scheduler: Any, ddim: dict[str, Any], ddpm: dict[str, Any]
) -> None:
    learned = scheduler.config.get("variance_type") == "learned_range"
    save_pipeline(tmp_path, scheduler, TINY_LEARNED if learned else TINY)
    sampler = Sampler.from_pretrained(tmp_path, device="cpu")
    schedule = NoiseSchedule("cosine", T)
    assert sampler.schedule == schedule
    assert sampler.sample(1, steps=10).table == solvers.ddim(schedule, 10, **ddim)
    assert sampler.sample(1, solver="ddpm", steps=10).table == solvers.ddpm(schedule, 10, **ddpm)
    # What the call says counts more.
    own = sampler.sample(1, steps=10, clip=0.75, spacing="quadratic").table
    assert {row.c for row in own.rows} == {0.75}
    assert own.timesteps == tuple(solvers.timesteps(schedule, 10, "quadratic"))
    if learned:
        plain = sampler.sample(1, solver="ddpm", steps=10, variance="posterior").table
        assert not plain.learned_variance


def test_scheduler_configurations_that_are_refused(tmp_path: Path) -> None:
    save_pipeline(tmp_path / "threshold", DDPMScheduler(num_train_timesteps=T, thresholding=True))
    dynamic = Sampler.from_pretrained(tmp_path / "threshold").sample(1, solver="ddpm", steps=2).table
    assert dynamic == solvers.ddpm(NoiseSchedule(timesteps=T), 2, spacing="leading", threshold=(0.995, 1.0))
    save_pipeline(tmp_path / "log", DDPMScheduler(num_train_timesteps=T, variance_type="fixed_small_log"))
    sampler = Sampler.from_pretrained(tmp_path / "log")
    with pytest.raises(InvalidArgument, match=r"fixed_small_log.*give variance="):
        sampler.sample(1, solver="ddpm", steps=2)
    sampler.sample(1, solver="ddpm", steps=2, variance="posterior")
    with pytest.raises(CheckpointError, match="nowhere"):
        Sampler.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({"clip_sample": False}, {}),
        ({"clip_sample": False, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}, {}),
        ({"clip_sample": True, "prediction_type": "sample"}, {"use_clipped_model_output": True}),
        ({"clip_sample": True}, {"use_clipped_model_output": True}),
    ],
)
def test_whole_ddim_pipelines_of_diffusers(tmp_path: Path, options: dict[str, Any], call: dict[str, Any]) -> None:
    """A sampler of the folder that a pipeline saved draws the pipeline's pictures, with default options."""
    pipeline = save_pipeline(tmp_path, DDIMScheduler(num_train_timesteps=T, beta_end=0.1, **options))
    sampler = Sampler.from_pretrained(tmp_path, device="cpu")
    compare_with_ddim_pipeline(pipeline, sampler, options, call, steps=10)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_eps_of_the_output_is_diffusers_default(tmp_path: Path, prediction: str) -> None:
    """With clipping, diffusers keeps the network's eps; ddim(eps_from="output") does so too."""
    options = {"clip_sample": True, "prediction_type": prediction}
    pipeline = save_pipeline(tmp_path, DDIMScheduler(num_train_timesteps=T, beta_end=0.1, **options))
    sampler = Sampler.from_pretrained(tmp_path, device="cpu")
    table = solvers.ddim(
        sampler.schedule, 10, spacing="leading", prediction=prediction, eps_from="output"
    )  # fmt: skip
    compare_with_ddim_pipeline(pipeline, sampler, options, {}, solver=table)


def compare_with_ddim_pipeline(
    pipeline: DDIMPipeline, sampler: Sampler, options: dict[str, Any], call: dict[str, Any], **run: Any
) -> None:
    shape = (3, *SHAPE)
    expected = pipeline(
        3, generator=torch.Generator().manual_seed(0), num_inference_steps=10, output_type="np", **call
    ).images  # fmt: skip
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out = sampler.sample(3, noise=x, **run)
    exact = by_hand(
        sampler.unet,
        x,
        trailing(10) if "timestep_spacing" in options else leading(10),
        schedule=sampler.schedule,
        prediction=options.get("prediction_type", "epsilon"),
        clip=1.0 if options["clip_sample"] else None,
        eps_from="clipped" if call else "output",
    )[-1][0]

    def picture(images: Tensor) -> np.ndarray:
        return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()

    reference_error = np.abs(expected - picture(exact)).max()
    assert reference_error < 1e-3
    assert np.abs(picture(out.images) - picture(exact)).max() <= ROUNDED * (reference_error + 2.0**-22)
    assert picture(exact).std() > 0.05


def test_whole_ddpm_pipelines_of_diffusers(tmp_path: Path) -> None:
    """Compare ancestral sampling whose noise is drawn from one torch generator, in the pipeline's order."""
    pipeline = save_pipeline(tmp_path, DDPMScheduler(num_train_timesteps=T, beta_end=0.1, variance_type="fixed_large"))
    expected = pipeline(3, generator=torch.Generator().manual_seed(0), num_inference_steps=10, output_type="np").images
    generator = torch.Generator().manual_seed(0)
    drawn: list[Tensor] = []

    def draw(row: int | None, indices: range) -> Tensor:
        drawn.append(torch.randn((len(indices), *SHAPE), generator=generator))
        return drawn[-1]

    sampler = Sampler.from_pretrained(tmp_path, device="cpu")
    out = sampler.sample(3, solver="ddpm", steps=10, noise=draw)
    exact = by_hand(
        sampler.unet, drawn[0], leading(10), schedule=sampler.schedule, variance="beta",
        z=lambda row: drawn[1 + row],
    )[-1][0]  # fmt: skip
    exact_picture = (exact / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    picture = (out.images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    reference_error = np.abs(expected - exact_picture).max()
    assert reference_error < 1e-3
    assert np.abs(picture - exact_picture).max() <= ROUNDED * (reference_error + 2.0**-22)


def test_the_built_in_model() -> None:
    sampler = Sampler.from_pretrained("fashion-mnist", device="cpu")
    info = sampler.info
    assert (info.channels, info.size, info.classes, info.null_label) == (1, (32, 32), 10, 10)
    assert sampler.prediction == "v_prediction"
    assert sampler.schedule == NoiseSchedule("cosine")
    out = sampler.sample(2, steps=2, labels=[0, 9], guidance=[1.0, 2.0])
    assert out.images.shape == (2, 1, 32, 32)
    assert out.images.abs().max() <= 1.0
    assert out.nfe == 4


# Output ---------------------------------------------------------------------------------------------------------------


def test_saving(tmp_path: Path) -> None:
    sampler = sampler_of(TINY_CLASSES)
    out = sampler.sample(5, steps=2, seed=2**64 - 1, start_index=98, labels=[3, 1, 0, 2, 3])
    bytes_ = ((out.images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()

    out.save(tmp_path / "deep" / "grid.png", columns=5)
    with Image.open(tmp_path / "deep" / "grid.png") as picture:
        assert (picture.mode, picture.size) == ("RGB", (5 * 10 + 2, 12))
        assert np.array_equal(np.asarray(picture)[2:10, 12:20], bytes_[1])

    out.save(str(tmp_path / "images.npz"))
    with np.load(tmp_path / "images.npz", allow_pickle=False) as arrays:
        assert set(arrays.files) == {"images", "seed", "indices", "labels"}
        assert np.array_equal(arrays["images"], bytes_)
        assert arrays["seed"].item() == 2**64 - 1
        assert arrays["indices"].tolist() == [98, 99, 100, 101, 102]
        assert arrays["labels"].tolist() == [3, 1, 0, 2, 3]

    out.save(tmp_path / "folder")
    files = sorted(path.name for path in (tmp_path / "folder").iterdir())
    assert files == ["000098.png", "000099.png", "000100.png", "000101.png", "000102.png"]
    with Image.open(tmp_path / "folder" / "000101.png") as picture:
        assert np.array_equal(np.asarray(picture), bytes_[3])

    with pytest.raises(InvalidArgument, match=r"images\.tiff2: unknown suffix; allowed: \.png, .*\.npz"):
        out.save(tmp_path / "images.tiff2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "folder", "images.npz"]


def test_saving_one_image_or_none_of_its_labels(tmp_path: Path) -> None:
    out = sampler_of().sample(1, steps=1)
    for suffix in (".png", ".jpg", ".jpeg", ".webp", ".gif", ".PNG"):
        out.save(tmp_path / f"one{suffix}")
        with Image.open(tmp_path / f"one{suffix}") as picture:
            assert picture.size == (8, 8), "one image is saved as it is"
    out.save(tmp_path / "one.npz")
    with np.load(tmp_path / "one.npz", allow_pickle=False) as arrays:
        assert set(arrays.files) == {"images", "seed", "indices"}


def test_output_as_pictures() -> None:
    out = sampler_of().sample(5, steps=1)
    assert [(p.mode, p.size) for p in out.to_pil()] == [("RGB", (8, 8))] * 5
    assert out.grid().size == (3 * 10 + 2, 2 * 10 + 2)
    assert out.grid(columns=5).size == (5 * 10 + 2, 10 + 2)
