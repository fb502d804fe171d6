"""Models whose process is unknown or unsupported are refused; what a configuration says is what is sampled with."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastdiff
from fastdiff import solvers
from fastdiff.checkpoints import convert, load, save_folder, schedule_of
from fastdiff.checkpoints.saving import scheduler_of
from fastdiff.errors import ConfigError, InvalidArgument
from fastdiff.files import write_text
from fastdiff.schedule import PREDICTIONS, NoiseSchedule
from fastdiff.solvers import EDMSchedule
from fastdiff.solvers.compat.diffusers import SCHEDULERS
from tests.support.schedulers import scheduler_module
from tests.support.unets import TINY, random_unet

UNSUPPORTED = (
    "FlowMatchLCMScheduler", "FlowMapEulerDiscreteScheduler", "KarrasVeScheduler",
    "DDPMWuerstchenScheduler", "IPNDMScheduler", "CMStochasticIterativeScheduler", "RePaintScheduler",
    "CogVideoXDDIMScheduler", "MyScheduler", "",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    save_folder(tmp_path / "model", random_unet(TINY), NoiseSchedule())
    return tmp_path / "model"


def rewrite(folder, change, name="scheduler/scheduler_config.json"):
    """Change a JSON file of the folder; a value of None removes the key."""
    path = folder / name
    config = {k: v for k, v in {**json.loads(path.read_text()), **change}.items() if v is not None}
    write_text(path, json.dumps(config))


def sampler(folder, **options):
    return fastdiff.Sampler.from_pretrained(folder, device="cpu", backend="eager", **options)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_schedulers_are_refused(folder, name):
    rewrite(folder, {"_class_name": name})
    rewrite(folder, {"scheduler": ["diffusers", name]}, "model_index.json")
    with pytest.raises(ConfigError, match=r"scheduler_config.json: scheduler .*_class_name"):
        sampler(folder)
    fastdiff.UNet.from_pretrained(folder)  # the network itself is fine


@pytest.mark.parametrize("name", sorted(SCHEDULERS.keys() - {"CMStochasticIterativeScheduler"}))
def test_supported_schedulers_keep_their_own_defaults(folder, name):
    write_text(folder / "scheduler" / "scheduler_config.json", json.dumps({"_class_name": name}))
    rewrite(folder, {"scheduler": ["diffusers", name]}, "model_index.json")
    loaded = load(folder)
    theirs = getattr(scheduler_module(name), name)()
    if not name.startswith(("EDM", "FlowMatch")):
        assert abs(loaded.schedule.alphas_cumprod - theirs.alphas_cumprod.double().numpy()).max() < 1e-4
    clips = theirs.config.get("clip_sample", False)
    table = sampler(folder).request(1, steps=2, size=8).table
    assert (table.rows[0].c == float("inf")) == (not clips)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas"),
        (
            {
                "_class_name": "EulerDiscreteScheduler",
                "timestep_type": "continuous",
                "prediction_type": "v_prediction",
            },
            "timestep_type",
        ),
        ({"_class_name": None}, "_class_name"),
        ({"_class_name": 3}, "_class_name"),
        ({"beta_schedule": "laplace"}, "beta_schedule"),
        ({"clip_sample_range": "x"}, "clip_sample_range"),
        ({"clip_sample": "yes"}, "clip_sample"),
        ({"steps_offset": 0.5}, "steps_offset"),
        ({"variance_type": []}, "variance_type"),
    ],
)
def test_values_that_change_the_process_are_refused(folder, change, word):
    rewrite(folder, change)
    (folder / "model_index.json").unlink()
    with pytest.raises(ConfigError, match=word) as caught:
        sampler(folder)
    assert "scheduler_config.json" in str(caught.value)


def test_a_model_without_a_scheduler_needs_one(folder, tmp_path):
    (folder / "scheduler" / "scheduler_config.json").unlink()
    for model in (folder, folder / "unet", folder / "unet" / "diffusion_pytorch_model.safetensors"):
        with pytest.raises(ConfigError, match=r"no scheduler_config.json.*schedule="):
            sampler(model)
        loaded = load(model)
        assert (loaded.schedule, loaded.prediction) == (None, None)
        given = sampler(model, schedule=NoiseSchedule("cosine"), prediction="v_prediction")
        assert (given.schedule, given.prediction) == (NoiseSchedule("cosine"), "v_prediction")
    for target in (tmp_path / "folder", tmp_path / "file.safetensors"):
        convert(folder, target)  # which invents no scheduler
        with pytest.raises(ConfigError, match="no scheduler_config"):
            sampler(target)
    assert not (tmp_path / "folder" / "model_index.json").exists()


def test_options_that_do_not_exist(folder):
    with pytest.raises(InvalidArgument, match="from_pretrained has no option stepz"):
        sampler(folder, stepz=3)


def test_model_index_decides_as_in_diffusers(folder, caplog):
    rewrite(folder, {"scheduler": ["diffusers", "DDIMScheduler"]}, "model_index.json")
    with caplog.at_level(logging.WARNING, "fastdiff"):
        assert load(folder).scheduler_config["_class_name"] == "DDIMScheduler"
    assert "model_index.json names the scheduler 'DDIMScheduler', its file 'DDPMScheduler'" in caplog.text
    rewrite(folder, {"scheduler": ["my_code", "DDPMScheduler"]}, "model_index.json")
    with pytest.raises(ConfigError, match=r"model_index.json.*'my_code'"):
        load(folder)
    rewrite(folder, {"scheduler": ["diffusers", "DDPMScheduler"]}, "model_index.json")
    rewrite(folder, {"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]}, "model_index.json")
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fastdiff"):
        load(folder)
    assert "'LDMPipeline' has 'vqvae' besides" in caplog.text


def test_unknown_keys_are_named(folder, caplog):
    rewrite(folder, {"snr_shift_scale": 3.0, "rebase": 1, "_private": 1})
    rewrite(folder, {"decay": 0.999, "_private": 1}, "unet/config.json")
    with caplog.at_level(logging.WARNING, "fastdiff"):
        load(folder)
    assert "'rebase', 'snr_shift_scale'" in caplog.text
    assert "'decay'" in caplog.text
    assert "_private" not in caplog.text
    rewrite(folder, {"_class_name": "fastdiff.UNet"}, "unet/config.json")  # whose keys are fastdiff's own
    with pytest.raises(ConfigError, match="unknown U-Net configuration keys: decay"):
        load(folder)


# What is saved is what is read ----------------------------------------------------------------------------------------

number = st.floats(1e-5, 0.5)
noise_schedules = st.one_of(
    st.builds(
        lambda kind, T, ends, zero: NoiseSchedule(kind, T, min(ends), max(ends), rescale_zero_terminal_snr=zero),
        st.sampled_from(["linear", "scaled_linear", "cosine", "sigmoid"]), st.integers(2, 60),
        st.tuples(st.floats(1e-4, 0.4), st.floats(1e-4, 0.4)), st.booleans(),
    ),
    st.builds(
        lambda betas, start: NoiseSchedule("custom", beta_start=start, beta_end=0.5, betas=tuple(betas)),
        st.lists(number, min_size=1, max_size=20), number,
    ),
)  # fmt: skip
edm_schedules = st.builds(
    EDMSchedule, st.floats(1e-3, 0.1), st.floats(1.0, 200.0), st.floats(0.1, 5.0), st.floats(1.0, 9.0)
)


@given(
    case=st.one_of(
        st.tuples(noise_schedules, st.sampled_from(PREDICTIONS)),
        st.tuples(edm_schedules, st.sampled_from(["edm", "v_prediction"])),
    )
)
def test_a_scheduler_configuration_is_read_as_it_was_written(case):
    assert schedule_of(json.loads(json.dumps(scheduler_of(*case)))) == case


@pytest.mark.parametrize(
    "case",
    [
        (NoiseSchedule("custom", beta_start=0.2, beta_end=0.5, betas=[0.1, 0.3]), "sample"),
        (EDMSchedule(rho=5.0), "edm"),
    ],
    ids=["discrete", "edm"],
)
def test_a_saved_model_is_read_as_it_was(tmp_path, case):
    unet = random_unet(TINY)
    save_folder(tmp_path / "a", unet, *case)
    convert(tmp_path / "a", tmp_path / "b.safetensors")
    convert(tmp_path / "b.safetensors", tmp_path / "c")
    for name in ("a", "b.safetensors", "c"):
        read = load(tmp_path / name)
        assert (read.schedule, read.prediction) == case
        assert read.unet.config == unet.config
        assert read.scheduler_config == load(tmp_path / "a").scheduler_config
        assert all(torch.equal(v, read.unet.state_dict()[k]) for k, v in unet.state_dict().items())


@pytest.mark.parametrize(
    ("schedule", "prediction", "word"),
    [
        (NoiseSchedule(), "edm", "prediction='edm'"),
        (NoiseSchedule(), None, "prediction=None"),
        (EDMSchedule(), "epsilon", "prediction='epsilon'"),
        (EDMSchedule(time_scale=1000.0), "edm", "time_scale=1000.0"),
        (None, "epsilon", "schedule=None"),
    ],
)
def test_what_cannot_be_saved(tmp_path, schedule, prediction, word):
    with pytest.raises((InvalidArgument, ConfigError), match=word):
        save_folder(tmp_path / "model", random_unet(TINY), schedule, prediction)
    assert not (tmp_path / "model").exists()


def test_degenerate_levels_are_refused_before_they_are_run(folder):
    rewrite(folder, {"trained_betas": [0.9999] * 8, "clip_sample": False})
    with pytest.raises(InvalidArgument, match="multiplies noise by"):
        sampler(folder).sample(1, steps=8)
    assert solvers.ddim(NoiseSchedule("cosine", 4000), 50, clip=None)  # the largest of the usual ones
