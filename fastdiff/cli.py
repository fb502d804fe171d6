"""The command line: ``fastdiff sample | train | info | convert | bench | eval | trilemma``. Heavy imports wait."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastdiff import __version__
from fastdiff.errors import FastdiffError, InvalidArgument

if TYPE_CHECKING:
    from torch import Tensor

    from fastdiff.training import ImageData
    from fastdiff.unet_config import UNetConfig

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Samples from diffusion U-Nets, as fast as the hardware allows.",
)

ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A built-in name (fashion-mnist), a diffusers folder, or a checkpoint file."),
]
# fastdiff.request.SOLVERS, which must not be imported for --help
SOLVER_HELP = (
    "auto, ddim, ddpm, dpmpp_1, dpmpp_2m, dpmpp_3m, dpmpp_2m_sde, unipc, euler, euler_ancestral, heun, lms, deis, "
    "plms, lcm or consistency."
)
RealOption = Annotated[
    Path | None,
    typer.Option(
        help="Real images: a folder, an .npz, an IDX file, or a folder with MNIST's four files "
        "(default: Fashion-MNIST, where it is installed)."
    ),
]
FitOption = Annotated[
    str | None, typer.Option(help="crop or pad real images to the size (default: pad MNIST's files, else crop).")
]
FeaturesOption = Annotated[
    str, typer.Option(help="Whose: fashion-mnist, a classifier's file, or a .pth of Inception's weights.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, for machines.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def sample(
    model: ModelArgument = "fashion-mnist",
    n: Annotated[int, typer.Option("--n", "-n", help="How many images.")] = 16,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="A picture (grid), an .npz, or a folder of PNGs (no suffix).")
    ] = Path("samples.png"),
    per_class: Annotated[
        int | None, typer.Option(help="This many images of every class, a row each; replaces --n and --labels.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="A class for all images, or a comma-separated list that is repeated.")
    ] = None,
    solver: Annotated[str, typer.Option(help=SOLVER_HELP)] = "ddim",
    steps: Annotated[
        int | None, typer.Option(help="Steps of the solver (default: 50; ddpm: all timesteps; auto: 20; lcm: 4).")
    ] = None,
    eta: Annotated[float, typer.Option(help="Noise of ddim: 0 none, 1 as much as ddpm.")] = 0.0,
    variance: Annotated[str | None, typer.Option(help="Noise of ddpm: posterior, beta, none, learned_range.")] = None,
    order: Annotated[int | None, typer.Option(help="Of unipc and deis (1-3) and lms (1-4).")] = None,
    spacing: Annotated[
        str | None,
        typer.Option(help="trailing, leading, linspace, quadratic, karras or exponential (default: the model's)."),
    ] = None,
    compat: Annotated[
        str | None,
        typer.Option(help="diffusers, openai or ho: what that code base's loop draws, --spacing in its terms."),
    ] = None,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale; 1 is off.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Image i depends on (seed, i) only.")] = 0,
    start_index: Annotated[int, typer.Option(help="The first image's index.")] = 0,
    size: Annotated[str | None, typer.Option(help="Height and width, as 32 or 24x40 (default: the model's).")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images in flight (default: by the network's size).")] = None,
    backend: Annotated[str, typer.Option(help="auto, native, eager, compiled or triton.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps (default: cuda where there is one).")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, bfloat16-fast (native) or float16 (default: the model's).")
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="Start from this picture, shrunk and cropped to the size, in place of noise.")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="Share of the steps that --image goes through (default: 0.8; with --mask: all)."),
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="White where --image is drawn anew; what is black stays.")] = None,
    quality: Annotated[
        float | None,
        typer.Option(
            help="In place of --solver and --steps: 1.1 is the fewest network evaluations within 1.1 times the best "
            "measured distance."
        ),
    ] = None,
    deadline: Annotated[
        float | None,
        typer.Option(help="In place of --solver and --steps: the best measured setting that takes so many seconds."),
    ] = None,
    animate: Annotated[Path | None, typer.Option(help="Also write the denoising as a .gif or .webp.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Draw images from a model.

    Examples:

    fastdiff sample fashion-mnist --per-class 8 --out out/samples.png

    fastdiff sample --n 4 --labels 9 --guidance 2 --animate boots.gif -o boots.png

    fastdiff sample --n 100 --solver ddpm --steps 100 --out samples.npz

    fastdiff sample --per-class 8 --guidance 2 --quality 1.1 --out samples.png

    fastdiff sample --n 8 --labels 9 --image in.png --strength 0.6 -o out.png
    """
    from fastdiff import SampleOutput, Sampler
    from fastdiff.images import PICTURES, grid
    from fastdiff.images import animate as write_animation
    from fastdiff.request import image_size

    if out.suffix.lower() not in (*PICTURES, ".npz", ""):
        raise InvalidArgument(
            f"--out {out}: unknown suffix; allowed: {', '.join((*PICTURES, '.npz'))}, or none for a folder"
        )
    if animate is not None and animate.suffix.lower() not in (".gif", ".webp"):
        raise InvalidArgument(f"--animate {animate}: a .gif or .webp file is needed")
    for path in (out, animate):  # a folder that cannot be made says so before the work
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    height_width = None if size is None else _size(size)
    for path in (image, mask):
        if path is not None and not path.is_file():
            raise InvalidArgument(f"{path}: no such file")
    sampler = Sampler.from_pretrained(model, backend=backend, device=device, dtype=dtype)
    columns = None
    chosen: list[int] | None = None
    if per_class is not None:
        classes = sampler.info.classes
        if classes is None or per_class < 1:
            raise InvalidArgument(
                f"--per-class {per_class}: a class-conditional model and a number of at least 1 are needed"
            )
        n, columns = classes * per_class, per_class
        image_size(n, height_width, sampler.info)  # too many images are refused before their labels are made
        chosen = [label for label in range(classes) for _ in range(per_class)]
    elif labels is not None:
        given = _numbers("--labels", labels)
        image_size(n, height_width, sampler.info)
        chosen = [given[i % len(given)] for i in range(n)]
    options: dict[str, Any] = {
        "solver": solver, "steps": steps, "eta": eta, "variance": variance, "order": order, "spacing": spacing,
        "compat": compat, "guidance": guidance,
        "seed": seed, "start_index": start_index, "size": height_width,
        "batch_size": batch_size, "labels": chosen, "strength": strength,
        "quality": quality, "deadline_s": deadline,
    }  # fmt: skip
    if image is not None or mask is not None:
        shape = image_size(n, height_width, sampler.info)
        if image is not None:
            options["image"] = _picture("--image", image, sampler.info.channels, shape)
        if mask is not None:
            options["mask"] = (_picture("--mask", mask, 1, shape) > 0).float()
    show = sys.stderr.isatty() and not as_json
    started = time.perf_counter()
    if animate is None:
        output: SampleOutput = sampler.sample(n, progress=show, **options)
    else:
        frames = []

        def keep(event: Any) -> None:
            if event.indices.start == start_index:  # the first chunk is shown
                frames.append(grid(event.x, columns))

        output = sampler.sample(n, progress=show, callback=keep, **options)
        write_animation(frames, animate)
    seconds = time.perf_counter() - started
    output.save(out, columns)
    rows = len(output.table)
    result = {
        "out": str(out),
        "images": n,
        "shape": list(output.images.shape[1:]),
        "seed": output.seed,
        "solver": output.table.solver,
        "rows": rows,
        "nfe": output.nfe,
        "backend": sampler.backend,
        "device": str(sampler.device),
        "dtype": str(sampler.dtype).removeprefix("torch."),
        "seconds": round(seconds, 3),
        "img_steps_per_s": round(n * rows / seconds, 2),
    }
    if as_json:
        print(json.dumps(result))
        return
    print(
        f"{out}: {n} images, {output.table.solver}, {rows} steps, {output.nfe} network evaluations each, "
        f"seed {output.seed}"
    )
    print(
        f"{seconds:.1f} s, {n * rows / seconds:.1f} img-steps/s on {result['device']} "
        f"({result['backend']}, {result['dtype']})"
    )


@app.command()
def train(
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="A folder of images, an .npz, or an IDX (MNIST) file, .gz or not.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="Folder for checkpoints, log and samples; an interrupted run there is resumed."
        ),
    ],
    labels: Annotated[Path | None, typer.Option(help="IDX file of labels, for an IDX file of images.")] = None,
    size: Annotated[str | None, typer.Option(help="Image size, as 32 or 24x40 (default: the data's).")] = None,
    fit: Annotated[
        str, typer.Option(help="crop: centre-crop and shrink larger images; pad: put smaller ones on black.")
    ] = "crop",
    unconditional: Annotated[bool, typer.Option(help="Ignore the labels that the data has.")] = False,
    init: Annotated[
        str | None, typer.Option(help="Start from this model's network and weights instead of the options below.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A U-Net config.json (diffusers keys); replaces the network options below.")
    ] = None,
    channels: Annotated[str, typer.Option(help="Width of each resolution.")] = "64,128,256",
    layers: Annotated[int, typer.Option(help="Residual blocks per resolution.")] = 2,
    attention: Annotated[
        str, typer.Option(help="Feature-map heights that get attention, as 16,8; empty for none.")
    ] = "16",
    head_dim: Annotated[int | None, typer.Option(help="Channels of an attention head (default: one head).")] = None,
    groups: Annotated[int, typer.Option(help="Groups of GroupNorm.")] = 32,
    dropout: Annotated[float, typer.Option(help="Dropout in the residual blocks.")] = 0.0,
    scale_shift: Annotated[
        bool, typer.Option(help="Time and class scale and shift each block (FiLM) instead of being added.")
    ] = False,
    class_image: Annotated[
        str | None, typer.Option(help="add, multiply or concat: the class joins the input image instead.")
    ] = None,
    schedule: Annotated[str, typer.Option(help="linear, scaled_linear, cosine or sigmoid.")] = "linear",
    timesteps: Annotated[int, typer.Option(help="Length of the noise schedule.")] = 1000,
    prediction: Annotated[str, typer.Option(help="epsilon, sample or v_prediction.")] = "epsilon",
    min_snr_gamma: Annotated[
        float | None, typer.Option(help="Min-SNR weighting of the loss, as 5 (default: none).")
    ] = None,
    label_dropout: Annotated[float, typer.Option(help="Share of labels dropped, for guidance.")] = 0.1,
    steps: Annotated[int, typer.Option(help="Updates.")] = 100_000,
    batch_size: Annotated[int, typer.Option(help="Images per update, over all processes.")] = 128,
    accumulate: Annotated[int, typer.Option(help="Parts in which a batch is run.")] = 1,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 2e-4,
    lr_warmup: Annotated[int, typer.Option(help="Updates of linear warm-up.")] = 500,
    lr_decay: Annotated[str, typer.Option(help="cosine, linear or none.")] = "cosine",
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.0,
    grad_clip: Annotated[float, typer.Option(help="Largest gradient norm.")] = 1.0,
    ema_decay: Annotated[float, typer.Option(help="Decay of the averaged weights that are sampled.")] = 0.9999,
    hflip: Annotated[bool, typer.Option(help="Mirror half of the images.")] = False,
    precision: Annotated[str, typer.Option(help="fp32 or bf16 (autocast).")] = "fp32",
    compile_: Annotated[bool, typer.Option("--compile", help="torch.compile the network.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default: cuda where there is one).")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, order, noise.")] = 0,
    log_every: Annotated[int, typer.Option(help="Updates between lines of log.jsonl.")] = 50,
    save_every: Annotated[int, typer.Option(help="Updates between checkpoints.")] = 1000,
    sample_every: Annotated[int, typer.Option(help="Updates between sample grids; 0 for none.")] = 1000,
    as_json: JsonOption = False,
) -> None:
    """Train a U-Net on images; classes are the sub-folders, the npz's labels, or the --labels file.

    Under torchrun the batch is shared by the processes. The result is OUT/model, a diffusers folder.

    Examples:

    fastdiff train photos --size 64 --out runs/photos --precision bf16 --compile

    fastdiff train images.gz --labels labels.gz --size 32 --fit pad -o runs/mnist

    torchrun --nproc-per-node 2 -m fastdiff train photos --size 64 -o runs/2
    """
    import torch

    from fastdiff import NoiseSchedule, TrainConfig, Trainer, UNet, UNetConfig
    from fastdiff.checkpoint import load
    from fastdiff.training import load_data
    from fastdiff.weights import read_json

    settings = TrainConfig(
        steps=steps, batch_size=batch_size, accumulate=accumulate, prediction=prediction, min_snr_gamma=min_snr_gamma,
        label_dropout=label_dropout, hflip=hflip, lr=lr, lr_warmup=lr_warmup, lr_decay=lr_decay,
        weight_decay=weight_decay, grad_clip=grad_clip, ema_decay=ema_decay, precision=precision, compile=compile_,
        seed=seed, log_every=log_every, save_every=save_every, sample_every=sample_every,
    )  # fmt: skip
    noise = NoiseSchedule(schedule, timesteps)
    if init is not None and config is not None:
        raise InvalidArgument("--init and --config both give the network; use one")
    given = None if init is None else load(init)
    if given is not None and (given.schedule != noise or given.scheduler_config.get("prediction_type") != prediction):
        raise InvalidArgument(
            f"--init {init}: it was trained with another --schedule, --timesteps or --prediction; use those of "
            f"`fastdiff info {init}`"
        )
    unet_config = UNetConfig.from_dict(read_json(config)) if config is not None else None
    images = load_data(data, labels=labels, size=None if size is None else _size(size), fit=fit)
    if given is not None:
        unet = given.unet
    else:
        if unet_config is None:
            unet_config = _network(
                images, _numbers("--channels", channels), layers,
                _numbers("--attention", attention) if attention else [], head_dim, groups, dropout, scale_shift,
                class_image, unconditional,
            )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            unet = UNet(unet_config).zero_residuals_()
    trainer = Trainer(unet, images, out, settings, noise, device=device)
    started = time.perf_counter()
    trainer.fit()
    if trainer.rank == 0:
        seconds = time.perf_counter() - started
        parameters = sum(p.numel() for p in unet.parameters())
        result = {
            "model": str(out / "model"),
            "step": trainer.step,
            "parameters": parameters,
            "seconds": round(seconds, 1),
        }
        print(json.dumps(result) if as_json else f"{out / 'model'}: step {trainer.step}, {seconds:.0f} s")


@app.command()
def info(
    model: ModelArgument = "fashion-mnist",
    solver: Annotated[str | None, typer.Option(help=f"Also print this solver's step table: {SOLVER_HELP}")] = None,
    steps: Annotated[int | None, typer.Option(help="Rows of that table.")] = None,
    program: Annotated[
        bool,
        typer.Option(
            "--program",
            help="Also print the network's fused operations, their memory, and the native engine's algorithms.",
        ),
    ] = False,
    n: Annotated[
        int | None,
        typer.Option(
            "--n", "-n", help="Also what this many images would cost: FLOPs, bytes, memory, seconds on this machine."
        ),
    ] = None,
    guidance: Annotated[float, typer.Option(help="Of the images of --n, as in `fastdiff sample`.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="Of the network for --n: float32, bfloat16 or bfloat16-fast.")] = "float32",
    backend: Annotated[str, typer.Option(help="For --n: native; of eager and compiled less is known.")] = "native",
    batch_size: Annotated[
        int | None, typer.Option(help="Rows that the operations are counted for (1), and images in flight for --n.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Describe a model: its network, schedule and cost, and a solver's step table.

    Examples:

    fastdiff info fashion-mnist

    fastdiff info fashion-mnist --solver ddim --steps 10

    fastdiff info fashion-mnist --program --batch-size 8

    fastdiff info fashion-mnist --n 50000 --steps 50 --dtype bfloat16
    """
    from fastdiff import Sampler, cost
    from fastdiff.backends import BACKENDS
    from fastdiff.backends.native import choose_method
    from fastdiff.lower import lower
    from fastdiff.plan import plan
    from fastdiff.program import Conv
    from fastdiff.request import Options, check, step_table
    from fastdiff.schedule import NoiseSchedule

    if steps is not None and solver is None and n is None:
        raise InvalidArgument(f"--steps {steps} needs --solver: it is the length of a solver's table; or --n")
    if batch_size is not None and batch_size < 1:
        raise InvalidArgument(f"--batch-size {batch_size}: at least 1 is needed")
    if backend not in BACKENDS:
        raise InvalidArgument(f"--backend {backend}: allowed: {', '.join(BACKENDS)}")
    sampler = Sampler.from_pretrained(model, device="cpu")
    height, width = sampler.info.size or (sampler.info.stride,) * 2
    rows = batch_size or 1
    layout = plan(lower(sampler.unet, (height, width)), rows)  # type: ignore[arg-type]  # from_pretrained: a UNet
    methods = {op.dst: choose_method(op, layout.program, rows) for op in layout.program.ops if isinstance(op, Conv)}
    operations = layout.to_dict(methods)
    table = None
    if solver is not None:
        table = step_table(
            Options(solver=solver, steps=steps), sampler.schedule, sampler.prediction, sampler._scheduler_config
        )
    config: Any = sampler.unet.config
    schedule = sampler.schedule
    levels = schedule.to_scheduler_config() if isinstance(schedule, NoiseSchedule) else dataclasses.asdict(schedule)
    result: dict[str, Any] = {
        "model": model,
        "parameters": sum(p.numel() for p in sampler.unet.parameters()),
        "image": [sampler.info.channels, height, width],
        "classes": sampler.info.classes,
        "null_label": sampler.info.null_label,
        "gflop_per_image_step": round(operations["flops"] / rows / 1e9, 4),
        "prediction": sampler.prediction,
        "schedule": {k: v for k, v in levels.items() if v is not None},
        "unet": config.to_dict(),
    }
    job = None
    if n is not None:
        options = Options(
            solver=solver or "ddim", steps=steps, guidance=guidance, batch_size=batch_size,
            labels=None if sampler.info.classes is None else 0, size=(height, width),
        )  # fmt: skip
        request = check(
            n, options, sampler.info, sampler.schedule, sampler.prediction, sampler._scheduler_config, backend
        )
        job = cost.estimate(
            sampler.unet, (height, width), n, request.nfe, request.batch_size, dtype,
            guided=request.nfe > len(request.table), backend=backend,
        )  # fmt: skip
    if as_json:
        result |= {} if table is None else {"table": json.loads(table.to_json())}
        result |= {} if job is None else {"cost": job.to_dict()}
        print(json.dumps(result | ({"program": operations} if program else {})))
        return
    for key, value in result.items():
        print(f"{key:22}{json.dumps(value) if isinstance(value, (dict, list)) else value}")
    if table is not None:
        print(f"\n{table}")
    if job is not None:
        print(f"\n{job}")
    if program:
        print(f"\n{layout.text(methods)}")


@app.command()
def trilemma(
    model: ModelArgument = "fashion-mnist",
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for images, results and picture; a later run goes on there.")
    ] = Path("out/trilemma"),
    n: Annotated[
        int | None,
        typer.Option("--n", "-n", help="Most images of a point (default: 5000 up to 20 evaluations, 2000 above)."),
    ] = None,
    nfe: Annotated[
        str | None, typer.Option(help="Network evaluations an image, as 4,10,50 (default: from 4 to 1000).")
    ] = None,
    solvers: Annotated[
        str | None,
        typer.Option(
            help="Settings: a solver, with -etaX, -gX (guidance) or -SPACING, as ddim,unipc-g2,ddim-eta1 "
            "(default: a dozen)."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="ddpm, ddim, unipc at 4, 10 and 50, 500 images each.")] = False,
    data: RealOption = None,
    held_out: Annotated[
        Path | None,
        typer.Option(help="Real images that the model never saw: the floor (default: MNIST's test files)."),
    ] = None,
    fit: FitOption = None,
    features: FeaturesOption = "fashion-mnist",
    batch_size: Annotated[int, typer.Option(help="Images in flight.")] = 64,
    backend: Annotated[str, typer.Option(help="auto, native, eager, compiled or triton.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps (default: cuda where there is one).")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, bfloat16-fast (native) or float16 (default: the model's).")
    ] = None,
    no_draw: Annotated[bool, typer.Option("--no-draw", help="Report the images that are there; draw none.")] = False,
    no_time: Annotated[
        bool, typer.Option("--no-time", help="Time no speeds; those of the last run in OUT stay.")
    ] = False,
    peer: Annotated[bool, typer.Option("--peer", help="Also time diffusers' DDPM loop (needs diffusers).")] = False,
    install: Annotated[
        bool,
        typer.Option("--install", help="Keep the result in MODEL's folder, for solver=auto, quality= and deadline_s=."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure quality, diversity and speed of a model's samples, by solver and number of network evaluations.

    Writes OUT/trilemma.json and, with matplotlib, OUT/trilemma.png. Hours of work, told before they begin; Ctrl-C loses
    minutes at most, and the same command goes on. Speeds are timed at the end, in turn.

    Examples:

    fastdiff trilemma fashion-mnist --quick

    fastdiff trilemma --solvers ddim,unipc-g2 --nfe 4,10 --n 1000 -o out/few
    """
    from fastdiff import Sampler
    from fastdiff.trilemma import report, run, speed
    from fastdiff.trilemma.picture import draw_picture, drawable
    from fastdiff.trilemma.plan import QUICK, plan

    if quick and (solvers, nfe, n) != (None, None, None):
        raise InvalidArgument("--quick is a plan of its own; leave out --solvers, --nfe and --n")
    if batch_size < 1 or (n is not None and n < run.MIN_IMAGES):
        raise InvalidArgument(
            f"--batch-size {batch_size}, --n {n}: 1 or more, and {run.MIN_IMAGES} or more, are needed"
        )

    def say(text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

    sampler = Sampler.from_pretrained(model, backend=backend, device=device, dtype=dtype)
    keys, nfes, most = QUICK if quick else (None, None, n)
    points = plan(
        sampler,
        solvers.split(",") if solvers is not None else keys,
        _numbers("--nfe", nfe) if nfe is not None else nfes,
        most,
    )
    judge = run.Judge.of(sampler, model, data, held_out, fit, features)
    if peer:
        speed.need_diffusers()
    if not drawable():
        say("matplotlib is not installed, so there will be no picture: pip install 'fastdiff[plot]'")
    try:
        if not no_draw:
            run.draw(sampler, out, points, batch_size, say)
        found = run.result(
            sampler, out, points, judge, say, model=model, batch=batch_size, timed=not no_time, peer=peer
        )
        if drawable():
            draw_picture(found, out / "trilemma.png")
        if install:
            say(f"wrote {run.install(found, sampler)}")
    except KeyboardInterrupt:
        say(f"interrupted: what is finished is kept in {out}, and the same command goes on from there")
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(found))
        return
    for line in (*report.table(found), *report.say_nearest(found["nearest"]), *report.say_peer(found.get("peer"))):
        print(line)


@app.command()
def convert(
    src: Annotated[
        str,
        typer.Argument(metavar="SRC", help="A model: a folder, a file, or a built-in name."),
    ],
    dst: Annotated[
        Path, typer.Argument(metavar="DST", help="A folder (diffusers), or a file: .safetensors, .pt, .ckpt.")
    ],
    to: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="diffusers (a folder), safetensors (one file), or the tensors of an original code base: ddpm, openai, "
            "openai-new, edm (default: by DST).",
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Of SRC: a published model, as adm-imagenet-64; an unknown one lists all.")
    ] = None,
    flags: Annotated[
        str | None, typer.Option(help="Of SRC, instead: its README's flags, as '--image_size 64 ...'.")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Of a folder's weights, as fp16.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="Which of a .pt's sets of weights (default: the averaged ones).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a model in another format; not one bit of a tensor changes, so there and back gives what was there.

    PyTorch files are read without running code in them.

    Examples:

    fastdiff convert fashion-mnist fashion.safetensors

    fastdiff convert cifar10.ckpt cifar10 --preset ddpm-cifar10-32

    fastdiff convert cifar10 back.ckpt --format ddpm
    """
    from fastdiff.convert import convert as run

    result = run(src, dst, to=to, preset=preset, flags=flags, variant=variant, weights=weights)
    if as_json:
        print(json.dumps(result))
        return
    print(f"{dst}: {result['format']}, {result['tensors']} tensors, {result['parameters']} parameters")
    if result["left_out"]:
        print(f"left out, as sampling does not hear them: {', '.join(result['left_out'])}")


@app.command()
def eval(
    model: ModelArgument = "fashion-mnist",
    n: Annotated[
        int | None, typer.Option("--n", "-n", help="How many images (default: 5000; with --samples: all).")
    ] = None,
    data: RealOption = None,
    held_out: Annotated[
        Path | None,
        typer.Option(help="Real images that the model never saw, to compare with (default: MNIST's test files)."),
    ] = None,
    fit: FitOption = None,
    samples: Annotated[
        Path | None, typer.Option(help="Judge these images instead of MODEL's: an .npz, or a folder.")
    ] = None,
    features: FeaturesOption = "fashion-mnist",
    solver: Annotated[str, typer.Option(help=SOLVER_HELP)] = "ddim",
    steps: Annotated[
        int | None, typer.Option(help="Steps of the solver (default: 50; ddpm: all timesteps; auto: 20; lcm: 4).")
    ] = None,
    eta: Annotated[float, typer.Option(help="Noise of ddim: 0 none, 1 as much as ddpm.")] = 0.0,
    variance: Annotated[str | None, typer.Option(help="Noise of ddpm: posterior, beta, none, learned_range.")] = None,
    spacing: Annotated[
        str | None,
        typer.Option(help="trailing, leading, linspace, quadratic, karras or exponential (default: the model's)."),
    ] = None,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale; 1 is off.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Image i depends on (seed, i) only; its class is i mod classes.")] = 0,
    batch_size: Annotated[int | None, typer.Option(help="Images in flight (default: by the network's size).")] = None,
    backend: Annotated[str, typer.Option(help="auto, native, eager, compiled or triton.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps (default: cuda where there is one).")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, bfloat16-fast (native) or float16 (default: the model's).")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for images, features and report.json; a later run goes on.")
    ] = Path("out/eval"),
    as_json: JsonOption = False,
) -> None:
    """Measure how good a model's samples are: Frechet and kernel distance, precision, recall.

    Each has a 95 % interval, and stands beside the same number for held-out real images.

    Examples:

    fastdiff eval fashion-mnist --n 2000 --solver unipc --steps 10

    fastdiff eval --samples samples.npz --out out/judged
    """
    from fastdiff.evaluation import evaluate, progress_on_stderr, table

    if samples is None:
        sampled = {"batch_size": batch_size, "eta": eta, "guidance": guidance, "seed": seed, "solver": solver,
                   "spacing": spacing, "steps": steps, "variance": variance}  # fmt: skip
    else:
        sampled = {}
    report = evaluate(
        model, samples=samples, n=n, data=data, held_out=held_out, fit=fit, features_of=features, out=out,
        backend=backend, device=device, dtype=dtype, options=sampled, progress=progress_on_stderr(),
    )  # fmt: skip
    print(json.dumps(report) if as_json else table(report))


@app.command()
def bench(
    model: ModelArgument = "fashion-mnist",
    batches: Annotated[str | None, typer.Option(help="Batch sizes (default: 1,8,32; --quick: 1,16).")] = None,
    engines: Annotated[
        str | None, typer.Option(help="Which, as native,openvino; an unknown one lists all (default: all).")
    ] = None,
    network_only: Annotated[bool, typer.Option(help="The network without the update.")] = False,
    guidance: Annotated[
        float | None, typer.Option(help="Guided steps, of two network rows an image (default: unguided).")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda (not tried yet).")] = "cpu",
    quick: Annotated[bool, typer.Option(help="Short turns, fewer rounds, no engine that compiles first.")] = False,
    rounds: Annotated[
        int | None, typer.Option(help="At most so many; fewer where ratios settle (default: 40; --quick: 25).")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Keep the result here, as JSON; an unfinished one there is gone on with.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="An earlier --save: exit code 1 where a ratio fell beyond the noise.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the speeds, into a .png.")] = None,
    job: Annotated[
        bool, typer.Option("--job", help="Instead: seconds of a whole sampling job, diffusers' own and fastdiff's.")
    ] = False,
    n: Annotated[int, typer.Option("--n", "-n", help="Images of the job.")] = 16,
    steps: Annotated[int, typer.Option(help="DDIM steps of the job.")] = 50,
    profile: Annotated[bool, typer.Option("--profile", help="Instead: where the native engine's time goes.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure how fast a network runs here, beside the other ways to run it that are installed.

    MODEL may also be ddpm-cifar10-32 or ddpm-celebahq-256: with random weights.

    Engines take turns, each in a process of its own. Every one is first compared with float64; one that is wrong gets
    no speed, and the exit code is 1. Ratios are to one peer, with a 95 % interval; the last line of a batch says
    whether the machine was too noisy.

    Examples:

    fastdiff bench --quick

    fastdiff bench --batches 1,8 --save new.json --plot new.png

    fastdiff bench --batches 8 --engines native,diffusers --compare new.json

    fastdiff bench ddpm-cifar10-32 --job
    """
    from fastdiff.bench import command

    sys.exit(
        command.run(
            model, batches=None if batches is None else _numbers("--batches", batches),
            engines=None if engines is None else [name.strip() for name in engines.split(",")],
            network_only=network_only, guidance=guidance, device=device, quick=quick, rounds=rounds, save=save,
            compare=compare, plot=plot, job=(n, steps) if job else None, profile=profile, as_json=as_json,
        )
    )  # fmt: skip


def _picture(option: str, path: Path, channels: int, size: tuple[int, int]) -> Tensor:
    """A picture file as floats [channels, *size] in [-1, 1], centre-cropped and shrunk where it is larger."""
    import torch

    from fastdiff.training.pixels import convert, fit_to, misfit, open_image, pixels_of, why

    if channels not in (1, 3):
        raise InvalidArgument(f"{option} {path}: this model's images have {channels} channels, so they are no pictures")
    try:
        with open_image(path) as opened:
            pixels = convert(pixels_of(opened)[None], channels)
    except Exception as e:  # decoders meet damaged files with whatever they stumble over
        raise InvalidArgument(f"{option} {path} cannot be read: {why(e).splitlines()[0]}") from e
    wrong = misfit((pixels.shape[1], pixels.shape[2]), size, "crop")
    if wrong is not None:
        raise InvalidArgument(
            f"{option} {path} is {pixels.shape[1]}x{pixels.shape[2]}, smaller than {size[0]}x{size[1]}"
        )
    fitted = torch.from_numpy(fit_to(pixels, size, "crop").copy())
    return fitted[0].permute(2, 0, 1).float() / 127.5 - 1.0


def _network(
    data: ImageData, channels: list[int], layers: int, attention: list[int], head_dim: int | None, groups: int,
    dropout: float, scale_shift: bool, class_image: str | None, unconditional: bool,
) -> UNetConfig:  # fmt: skip
    """The U-Net that the options describe, for this data."""
    from fastdiff import UNetConfig

    heights = [data.size[0] >> level for level in range(len(channels))]
    unknown = sorted(set(attention) - set(heights))
    if unknown:
        raise InvalidArgument(f"--attention {unknown[0]}: the feature maps are {', '.join(map(str, heights))} high")
    has = [height in attention for height in heights]
    classes = None if unconditional else data.num_classes
    return UNetConfig(
        sample_size=data.size[0] if data.size[0] == data.size[1] else data.size,
        in_channels=data.channels,
        out_channels=data.channels,
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in has),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(has)),
        attention_head_dim=head_dim,
        norm_num_groups=groups,
        dropout=dropout,
        resnet_time_scale_shift="scale_shift" if scale_shift else "default",
        # diffusers' scale-shift networks have no norm before the mid attention unless this is set; ADM's have one.
        attn_norm_num_groups=groups if scale_shift else None,
        num_class_embeds=None if classes is None else classes + 1,
        null_label=classes,
        class_image=class_image if classes is not None else None,
    )


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as e:
        raise InvalidArgument(f"{option} {text}: whole numbers separated by commas are needed") from e


def _size(text: str) -> int | tuple[int, int]:
    try:
        sides = [int(part) for part in text.lower().split("x")]
    except ValueError as e:
        raise InvalidArgument(f"--size {text}: a number, or height x width as in 24x40, is needed") from e
    if len(sides) not in (1, 2):
        raise InvalidArgument(f"--size {text}: a number, or height x width as in 24x40, is needed")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def main() -> None:
    """Entry point: fastdiff's own errors and those of files are one line on standard error, exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        app()
    except (FastdiffError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
