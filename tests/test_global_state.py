"""Global state of torch, NumPy and Python changes no result, raises nothing, and is left as it was."""

from __future__ import annotations

import ast
import contextlib
import copy
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch._inductor.config  # here, as it changes the environment when it is imported
from PIL import Image

import fastdiff
from fastdiff import checkpoints, data, evaluation
from fastdiff.backends.native import extension
from fastdiff.errors import BackendError, InvalidArgument, ModifiedError
from fastdiff.modes import exact_products
from fastdiff.sampler import Sampler
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import EDMSchedule
from fastdiff.solvers.registry import SOLVERS
from fastdiff.training import TrainConfig, Trainer
from fastdiff.unet import UNet
from tests.support.global_state import BFLOAT16, FLOAT32, QUICK, STATES, State, default_dtype, precision, snapshot
from tests.support.paths import ROOT
from tests.support.unets import change, diffusers_twin, random_unet
from tests.training.toys import Toys, toy_unet

needs_native = pytest.mark.skipif(extension() is None, reason="the native engine is not built")

# One level with attention: enough for every kind of operation.
SMALL = change(block_out_channels=(8,), down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",))
CLASSES = {"num_class_embeds": 5, "null_label": 4}
MODELS = {
    "plain": {},
    "classes": CLASSES,
    "image": {**CLASSES, "class_image": "add"},
    "before": {**CLASSES, "class_before_mlp": True},
}


class Other(diffusers.DDIMPipeline):
    """A pipeline whose loop fastdiff does not know, so that it runs the network alone."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


class Files:
    """Models and data on disk, and tensors of a user, made once in the default state."""

    def __init__(self, root: Path):
        self.root = root
        for name, changes in MODELS.items():
            checkpoints.save_folder(root / name, random_unet(change(SMALL, **changes), 0), NoiseSchedule("cosine"))
        torch.save(checkpoints.load(root / "plain").unet.state_dict(), root / "weights.pt")
        (root / "config.json").write_bytes((root / "plain" / "unet" / "config.json").read_bytes())
        pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
        np.savez(root / "data.npz", images=pixels, labels=np.arange(12) % 3)
        for i, image in enumerate(pixels):
            path = root / "photos" / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        self._toy = toy_unet()
        twin = diffusers_twin(random_unet(SMALL, 0))
        self._pipelines = [kind(twin, diffusers.DDIMScheduler()) for kind in (diffusers.DDIMPipeline, Other)]
        generator = torch.Generator().manual_seed(0)
        self.x = torch.rand((3, 3, 8, 8), generator=generator) * 2 - 1
        self.features = torch.randn((90, 6), generator=generator), torch.randn((80, 6), generator=generator)
        self.garments = torch.rand((4, 1, 32, 32), generator=generator) * 2 - 1
        self.mask = torch.zeros(8, 8)
        self.mask[:, :4] = 1.0

    @torch.inference_mode(False)
    def pipelines(self) -> list[Any]:
        """Return new copies of two pipelines, of which fastdiff runs the whole loop, and the network alone."""
        return copy.deepcopy(self._pipelines)

    @torch.inference_mode(False)
    def toy(self) -> UNet:
        """Return a new copy of a network to train."""
        return copy.deepcopy(self._toy)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("files"))


# ---- public actions, each of which begins with files and plain tensors -----------------------------------------------

Action = Callable[[Files, Path], Any]
ACTIONS: dict[str, Action] = {}
EAGER: dict[
    str, float
] = {}  # actions whose numbers are those of PyTorch's own kernels, and what its rounding amounts to


def action(name: str, eager: float | None = None) -> Callable[[Action], Action]:
    def add(function: Action) -> Action:
        ACTIONS[name] = function
        if eager is not None:
            EAGER[name] = eager
        return function

    return add


@action("load")
def load(files: Files, out: Path) -> Any:
    found = [checkpoints.load(files.root / name) for name in ("plain", "weights.pt")]
    assert all(p.requires_grad and not p.is_inference() for loaded in found for p in loaded.unet.parameters())
    return [(loaded.unet.state_dict(), loaded.schedule, loaded.prediction, loaded.scheduler_config) for loaded in found]


@action("convert and save")
def convert(files: Files, out: Path) -> Any:
    checkpoints.convert(files.root / "classes", out / "model.safetensors")
    checkpoints.load(files.root / "plain").unet.save_pretrained(out / "unet")
    return [path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()]


SCHEDULES = (
    NoiseSchedule(), NoiseSchedule("cosine", 100), NoiseSchedule("sigmoid", 50), NoiseSchedule("scaled_linear"),
    NoiseSchedule(rescale_zero_terminal_snr=True), NoiseSchedule("custom", betas=(0.1, 0.2, 0.999)), EDMSchedule(),
)  # fmt: skip


def tables_of(all_steps: tuple[int, ...], spacings: tuple[str | None, ...]) -> Iterator[Any]:
    for schedule, (_, solver) in itertools.product(SCHEDULES, SOLVERS.items()):
        for steps, spacing in itertools.product(all_steps, spacings):
            options = {} if spacing is None or "spacing" not in solver.shared else {"spacing": spacing}
            try:
                yield str(solver.function(schedule, steps, **options))
            except fastdiff.FastdiffError as e:
                yield str(e)
    for schedule in SCHEDULES[:-1]:
        again = NoiseSchedule.from_scheduler_config(schedule.to_scheduler_config())
        yield again.snr, again.variances, again.posterior(2, 1), repr(again)


@action("tables")
def tables(files: Files, out: Path) -> Any:
    return list(tables_of((3,), (None, "karras")))


@action("network", eager=FLOAT32)
def network(files: Files, out: Path) -> Any:
    if torch.is_autocast_enabled("cpu"):
        return None  # it follows autocast, as every module does
    unet = checkpoints.load(files.root / "plain").unet
    return [unet(files.x, t).detach() for t in (999, 999.5, 0.1, torch.tensor([1, 2, 3], device="cpu"))]


def log_p(x0: torch.Tensor, indices: range) -> torch.Tensor:
    return -((x0.flatten(1) @ x0.new_ones(192, 2)) ** 2).sum(1)


def calls(files: Files, every: bool) -> list[tuple[str, dict[str, Any]]]:
    """Return names of models and options of `Sampler.sample`."""

    def noise(row: int | None, indices: range) -> torch.Tensor:
        return files.x[: len(indices)] * (1.0 if row is None else 0.1 * row)

    few = [
        ("classes", {"labels": [0, 1, 2], "guidance": 2.0, "eta": 0.5, "solver": "ddim"}),
        ("before", {"solver": "plms", "labels": np.array([1, 2, 3])}),
        ("image", {"solver": "heun", "steps": 2, "labels": [2, 1, 0], "guidance": 1.5, "guidance_rescale": 0.5}),
        ("classes", {"guide": log_p}),
        ("plain", {"image": files.x, "mask": files.mask, "solver": "ddpm"}),
    ]
    return (
        few
        if not every
        else [
            *few,
            ("classes", {"solver": "dpmpp_2m_sde", "guidance": [1.0, 2.0, 3.0], "labels": 1}),
            ("plain", {"solver": "ddpm", "batch_size": 2}),
            ("plain", {"solver": "unipc", "clip": None}),
            ("plain", {"solver": "lcm", "noise": files.x}),
            ("plain", {"solver": "deis", "order": 3, "spacing": "karras"}),
            ("plain", {"image": files.x, "mask": files.mask, "repaint": (2, 2)}),
            ("plain", {"image": files.x[0], "strength": 0.5, "solver": "dpmpp_2m"}),
            ("plain", {"solver": "ddpm", "noise": noise}),
        ]
    )


def drawn(files: Files, backend: str, every: bool = False) -> list[Any]:
    found: list[Any] = []
    samplers = {name: Sampler.from_pretrained(files.root / name, backend=backend) for name in MODELS}
    for model, options in calls(files, every):
        output = samplers[model].sample(3, **{"steps": 3, **options})
        assert not output.images.is_inference()
        found += [output.images, output.labels, str(output.table)]
    sampler = samplers["plain"]
    events = [(event.x, event.x0) for event in sampler.stream(3, steps=2)]
    noise = sampler.invert(files.x, steps=1, iterations=2)
    sampler.sample(3, steps=1, callback=lambda event: found.append(event.x0))
    return [*found, events, noise, sampler.interpolate(3, (1, noise[0]), steps=1).images]


@action("native")
def native(files: Files, out: Path) -> Any:
    return drawn(files, "native")


@action("eager", eager=FLOAT32)
def eager(files: Files, out: Path) -> Any:
    found = drawn(files, "eager")
    sampler = Sampler(checkpoints.load(files.root / "classes").unet, backend="eager")
    found.append(sampler.sample(2, steps=2, guide=log_p, guide_through="network", labels=1).images)
    return found


@action("eager in bfloat16", eager=BFLOAT16)
def half(files: Files, out: Path) -> Any:
    sampler = Sampler(checkpoints.load(files.root / "classes").unet, backend="eager", dtype="bfloat16")
    return sampler.sample(2, steps=2, labels=np.array([1, 2])).images


@action("pictures, native")
def pictures(files: Files, out: Path) -> Any:
    images = files.x.clone()
    images[0, 0, 0, 0] = math.nan
    data.save_picture(data.grid(images), out / "grid.png")
    data.animate(data.to_pil(images), out / "all.gif")
    output = Sampler.from_pretrained(files.root / "plain", backend="native").sample(2, steps=1)
    output.save(out / "a.npz")
    output.save(out / "folder")
    arrays = np.load(out / "a.npz")
    paths = sorted(path for path in out.rglob("*") if path.suffix in (".png", ".gif"))
    return [path.read_bytes() for path in paths] + [arrays[name] for name in arrays]


@action("data")
def opened(files: Files, out: Path) -> Any:
    found: list[Any] = []
    for images in (
        data.load_data(files.root / "data.npz"),
        data.load_data(files.root / "photos", size=4, channels=1),
        data.load_data(files.root / "photos", size=16, fit="pad"),
    ):
        found += [*images.__getitems__([3, 1, 2]), images.class_names, images.size]
    return found


SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler", "LCMScheduler",
              "EulerAncestralDiscreteScheduler", "EDMEulerScheduler", "PNDMScheduler")  # fmt: skip


@action("scheduler")
def scheduler(files: Files, out: Path) -> Any:
    found = []
    for name in SCHEDULERS:
        config = {"_class_name": name, "skip_prk_steps": True} if name == "PNDMScheduler" else {"_class_name": name}
        steps = fastdiff.Scheduler.from_config(config)
        steps.set_timesteps(4)
        generator = torch.Generator("cpu").manual_seed(0)
        x = files.x * steps.init_noise_sigma
        for t in steps.timesteps:
            result = steps.step(0.5 * steps.scale_model_input(x, t), t, x, generator=generator)
            x = result.prev_sample
        found += [steps.timesteps, x, result.pred_original_sample]
        if steps.schedule is not None:
            t = torch.tensor([5, 10, 20], device="cpu")
            found += [steps.add_noise(files.x, files.x, t), steps.get_velocity(files.x, files.x, t)]
    return found


def accelerated(files: Files, backend: str) -> Iterator[Any]:
    for pipeline in files.pipelines():
        pipeline.set_progress_bar_config(disable=True)
        fastdiff.accelerate(pipeline, backend=backend)
        generator = torch.Generator("cpu").manual_seed(0)
        yield pipeline(batch_size=2, num_inference_steps=3, generator=generator, eta=0.5, output_type="np").images


@action("accelerate, native")
def accelerate(files: Files, out: Path) -> Any:
    if torch.is_autocast_enabled("cpu"):
        return None  # see below
    return list(accelerated(files, "native"))


@action("accelerate, eager", eager=FLOAT32)
def accelerate_eager(files: Files, out: Path) -> Any:
    if torch.is_autocast_enabled("cpu"):
        return None
    return list(accelerated(files, "eager"))


def trained(files: Files, out: Path, precision: str) -> Any:
    settings = {"batch_size": 4, "lr": 1e-3, "lr_warmup": 1, "log_every": 1, "sample_every": 2, "precision": precision}

    def trainer(steps: int) -> Trainer:
        config = TrainConfig(steps=steps, hflip=True, min_snr_gamma=5.0, lr_decay="none", **settings)
        return Trainer(files.toy(), Toys(), out, config, NoiseSchedule("cosine", 3), device="cpu")

    trainer(2).fit()
    resumed = trainer(3)
    resumed.fit()
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    weights = resumed.unet.state_dict(), resumed.ema.state_dict()
    return (
        *weights,
        [line["loss"] for line in lines],
        [str(path.relative_to(out)) for path in sorted(out.rglob("*.*[a-z]"))],
    )


@action("train", eager=FLOAT32)
def train(files: Files, out: Path) -> Any:
    return trained(files, out, "fp32")


@action("train in bfloat16", eager=BFLOAT16)
def train_bf16(files: Files, out: Path) -> Any:
    return trained(files, out, "bf16")


@action("metrics")
def metrics(files: Files, out: Path) -> Any:
    return [tuple(vars(estimate).values()) for estimate in evaluation.measure(*files.features).values()]


@action("features", eager=FLOAT32)
def features(files: Files, out: Path) -> Any:
    judge = evaluation.Classifier.load()
    assert all(not p.is_inference() for p in judge.parameters())
    return *judge.judge(files.garments), evaluation.features()(files.garments)


SLOW: dict[str, Action] = {
    "every table": lambda files, out: list(tables_of((1, 4, 50), (None, "karras", "exponential", "quadratic"))),
    "every call, native": lambda files, out: drawn(files, "native", every=True),
    "every call, eager": lambda files, out: drawn(files, "eager", every=True),
}
EAGER["every call, eager"] = FLOAT32


# ---- the crossing ----------------------------------------------------------------------------------------------------


def same(a: Any, b: Any, rounding: float = 0.0, where: str = "result") -> None:
    """Assert that two results are equal in every bit, or differ by at most ``rounding``, a root mean square."""
    assert type(a) is type(b), where
    if isinstance(a, (torch.Tensor, np.ndarray)):
        a, b = (v.detach().numpy() if isinstance(v, torch.Tensor) else v for v in (a, b))
        assert (a.dtype, a.shape) == (b.dtype, b.shape), where
        if rounding and a.dtype.kind == "f":
            assert math.sqrt(np.square(a - b).mean()) <= rounding, where
        else:
            assert a.tobytes() == b.tobytes(), f"{where}: {np.abs(a.astype(float) - b.astype(float)).max()}"
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            same(*pair, rounding, f"{where}[{i}]")
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], rounding, f"{where}[{key!r}]")
    elif isinstance(a, float):
        assert abs(a - b) <= rounding, where
    else:
        assert a == b, where


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return {}


def check(name: str, state: State, files: Files, expected: dict[str, Any], folder: Path) -> None:
    act = ACTIONS.get(name) or SLOW[name]
    if state.watches and "native" in name:
        # Such a mode sees PyTorch's operations, and may change what they do. The engine runs none, so it refuses.
        with state.enter(), pytest.raises((BackendError, ModifiedError), match="the mode Passing"):
            act(files, folder / "found")
        return
    if name not in expected:
        expected[name] = act(files, folder / "expected")
    with state.enter():
        before = snapshot()
        found = act(files, folder / "found")
        after = snapshot()
    assert [key for key in before if before[key] != after[key]] == []
    if found is not None:
        same(expected[name], found, max(EAGER[name], state.rounds) if name in EAGER and state.rounds else 0.0)


@pytest.mark.parametrize(
    ("name", "state"), [(name, state) for i, name in enumerate(ACTIONS) for state in [*QUICK][i % 3 :: 3]]
)
def test_state_changes_nothing(name, state, files, expected, tmp_path):
    """Every action in a third of these states, each of them with a third of the actions; the slow test has all."""
    check(name, QUICK[state], files, expected, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", [*ACTIONS, *SLOW])
def test_every_state_changes_nothing(name, state, files, expected, tmp_path):
    check(name, STATES[state], files, expected, tmp_path)


# ---- what is made in one state and used in another -------------------------------------------------------------------


def test_what_inference_mode_made_can_be_trained_and_differentiated(files, tmp_path):
    with torch.inference_mode():
        unet, own = checkpoints.load(files.root / "classes").unet, UNet(toy_unet().config)
        sampler = Sampler.from_pretrained(files.root / "classes", backend="eager")
        image = sampler.sample(1, steps=1).images
    (unet(image, 5, torch.tensor([1])).sum() + image.requires_grad_().sum()).backward()
    assert all(p.grad is not None for p in (*unet.parameters(), image))
    assert sampler.sample(1, steps=1, guide=log_p, guide_through="network").images.isfinite().all()
    Trainer(own, Toys(), tmp_path, TrainConfig(steps=1, batch_size=2, sample_every=0), device="cpu").fit()


@pytest.mark.parametrize("backend", ["eager", pytest.param("native", marks=needs_native)])
def test_a_stream_may_change_its_mode_between_rows(files, backend):
    sampler = Sampler.from_pretrained(files.root / "plain", backend=backend)
    expected = [event.x for event in sampler.stream(2, steps=4, solver="unipc")]
    for first, second in itertools.permutations((torch.inference_mode, torch.enable_grad), 2):
        events = Sampler.from_pretrained(files.root / "plain", backend=backend).stream(2, steps=4, solver="unipc")
        found = []
        for enter in (first, second, first, second):
            with enter():
                found.append(next(events).x)
        same(expected, found)
    with torch.inference_mode():  # tables and packed weights that another mode made
        same(expected, [event.x for event in sampler.stream(2, steps=4, solver="unipc")])


def test_gradients_flow_through_a_scheduler_that_inference_mode_began(files):
    steps = fastdiff.Scheduler.from_config({"_class_name": "UniPCMultistepScheduler"})
    with torch.inference_mode():
        steps.set_timesteps(4)
        x = files.x
        for t in steps.timesteps[:2]:
            x = steps.step(0.5 * x, t, x).prev_sample
    x, weight = x.clone(), torch.tensor(0.5, requires_grad=True)
    for t in steps.timesteps[2:]:
        x = steps.step(weight * x, t, x).prev_sample
    x.sum().backward()
    assert float(weight.grad) != 0.0


def test_weights_of_inference_mode_are_refused_where_gradients_are_needed(files, tmp_path):
    with torch.inference_mode():
        unet, toy = copy.deepcopy(checkpoints.load(files.root / "plain").unet), copy.deepcopy(files.toy())
    sampler = Sampler(unet, backend="eager")
    assert sampler.sample(1, steps=1).images.isfinite().all()
    with pytest.raises(BackendError, match="inference_mode"):
        sampler.sample(1, steps=1, guide=log_p, guide_through="network")
    with pytest.raises(InvalidArgument, match="inference_mode"):
        Trainer(toy, Toys(), tmp_path, device="cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_new_network_does_not_depend_on_the_default_dtype(dtype):
    config = change(SMALL, **CLASSES)
    for made in (config, change(config, class_before_mlp=True), change(config, class_image="add")):
        torch.manual_seed(3)
        expected = UNet(made).state_dict()
        with default_dtype(dtype):
            torch.manual_seed(3)
            found = UNet(made).state_dict()
        same(dict(expected), dict(found))


def test_a_new_network_is_on_the_default_device():
    with torch.device("meta"):
        unet = UNet(change(SMALL, **CLASSES))
    assert {(p.device.type, p.dtype) for p in unet.parameters()} == {("meta", torch.float32)}


@pytest.mark.parametrize("backend", ["eager", pytest.param("native", marks=needs_native)])
def test_a_named_backend_refuses_a_pipeline_under_autocast(files, backend):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(BackendError, match="autocast is on"):
        list(accelerated(files, backend))


# ---- errors leave the state as it was --------------------------------------------------------------------------------


def interrupt(*_: Any) -> Any:
    raise KeyboardInterrupt


def failing(files: Files, out: Path) -> Iterator[Callable[[], Any]]:
    """Yield calls that raise, at different depths."""
    sampler = Sampler.from_pretrained(files.root / "classes", backend="eager")
    poisoned = Sampler.from_pretrained(files.root / "plain", backend="eager")
    torch.nn.init.constant_(poisoned.unet.conv_out.bias, math.nan)
    trainer = Trainer(files.toy(), Toys(), out, TrainConfig(steps=2, batch_size=2), device="cpu")
    trainer.data.__getitems__ = interrupt
    yield lambda: checkpoints.load(files.root / "nothing")
    yield lambda: checkpoints.load(files.root / "data.npz")
    yield lambda: sampler.sample(2, steps=2, callback=interrupt)
    yield lambda: sampler.sample(2, steps=2, guide=interrupt)
    yield lambda: sampler.sample(2, steps=2, noise=interrupt)
    yield lambda: sampler.sample(2, steps=0)
    yield lambda: poisoned.sample(2, steps=2)
    yield trainer.fit
    yield lambda: evaluation.measure(files.features[0], files.features[1][:, :2])


@pytest.mark.parametrize("state", QUICK)
def test_errors_leave_the_state_as_it_was(files, state, tmp_path):
    with QUICK[state].enter():
        for call in failing(files, tmp_path):
            before = snapshot()
            with pytest.raises((fastdiff.FastdiffError, KeyboardInterrupt)):
                call()
            assert [key for key, value in snapshot().items() if value != before[key]] == []


def test_products_are_exact_for_as_long_as_needed():
    backend = torch.backends.mkldnn.matmul
    with precision("medium"):
        with contextlib.suppress(KeyError), exact_products():
            assert backend.fp32_precision == "ieee"
            raise KeyError
        assert (backend.fp32_precision, torch.get_float32_matmul_precision()) == ("bf16", "medium")
    with exact_products():
        assert backend.fp32_precision in ("none", "ieee")


# ---- every factory call names what it makes --------------------------------------------------------------------------

FACTORIES = {
    "zeros", "ones", "empty", "full", "arange", "range", "linspace", "logspace", "eye", "rand", "randn", "randint",
    "randperm", "tensor", "as_tensor", "asarray", "scalar_tensor", "tril_indices", "triu_indices", "empty_strided",
    "frombuffer", "hann_window", "sparse_coo_tensor",
}  # fmt: skip
LAYERS = {"Conv2d", "Linear", "GroupNorm", "BatchNorm2d", "LayerNorm", "Embedding", "Conv1d", "ConvTranspose2d"}


def unnamed(source: str) -> Iterator[str]:
    """Yield the calls whose result depends on torch's default dtype or device."""
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
        ):
            of, name, given = node.func.value.id, node.func.attr, {keyword.arg for keyword in node.keywords}
            needed = {"dtype", "device"} if (of, name) in {("torch", f) for f in FACTORIES} else set()
            needed |= {"dtype"} if of == "nn" and name in LAYERS else set()
            if needed - given or ((of, name) == ("torch", "Generator") and not node.args):
                yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("folder", ["fastdiff", "kernels", "recipes", "examples"])
def test_factory_calls_name_dtype_and_device(folder):
    paths = [path for path in (ROOT / folder).rglob("*.py") if "kernels" not in path.relative_to(ROOT).parts[1:]]
    assert paths
    found = [f"{path.relative_to(ROOT)}, {call}" for path in paths for call in unnamed(path.read_text("utf-8"))]
    assert found == []


def test_unnamed_calls_are_found():
    source = "torch.zeros(3)\ntorch.tensor(1, dtype=x)\nnn.Linear(1, 2)\ntorch.Generator()\nnp.zeros(3)\nx.zeros(1)"
    assert [call.split(":")[0] for call in unnamed(source)] == ["line 1", "line 2", "line 3", "line 4"]
