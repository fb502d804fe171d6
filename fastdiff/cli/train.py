"""``fastdiff train`` trains a U-Net on images."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastdiff.checks import shown
from fastdiff.cli.options import (
    AlphaOption,
    FramesOption,
    ImageChannelsOption,
    JsonOption,
    LayoutOption,
    ProfileOption,
    ValueRangeOption,
    flags_in_errors,
    in_flags,
    read_numbers,
    read_range,
    read_size,
)
from fastdiff.errors import InvalidArgument, printable

if TYPE_CHECKING:
    from fastdiff.checkpoints import Pretrained
    from fastdiff.schedule import NoiseSchedule
    from fastdiff.solvers import FlowSchedule
    from fastdiff.text import CaptionEncoder
    from fastdiff.training import ImageData, Trainer
    from fastdiff.unet import UNetCondition, UNetConfig

LONG = 48 * 3600.0  # seconds of a run that should not surprise anyone
TEXT_CHANNELS, TEXT_HEAD = 128, 32  # of the states of captions; of a head of attention to them


def train(
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="A folder of images, an .npz, .tar, Parquet or IDX file, .gz or not.")
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
    value_range: ValueRangeOption = None,
    frames: FramesOption = None,
    alpha: AlphaOption = None,
    profile: ProfileOption = None,
    layout: LayoutOption = None,
    image_channels: ImageChannelsOption = None,
    condition: Annotated[
        Path | None,
        typer.Option(help="Folder of images that the network goes by, paired with DATA's by the names of the files."),
    ] = None,
    condition_channels: Annotated[
        int | None, typer.Option(help="Channels of the --condition images, 1 or 3 (default: theirs).")
    ] = None,
    class_depth: Annotated[
        int | None, typer.Option(help="Levels of sub-folders that name a class (default: 1; 0 for no classes).")
    ] = None,
    class_names: Annotated[
        str | None, typer.Option(help="Names of the classes in the order of their numbers, separated by commas.")
    ] = None,
    unconditional: Annotated[bool, typer.Option(help="Ignore the labels of the data.")] = False,
    captions: Annotated[
        str | None,
        typer.Option(
            help="Train a model that reads prompts: txt for a text file beside each image, or a .jsonl file of the "
            "folder with file_name and text."
        ),
    ] = None,
    caption_tokens: Annotated[int, typer.Option(help="Pieces of words that a caption may have, and 2.")] = 64,
    init: Annotated[
        str | None,
        typer.Option(help="Start from this model's network, weights and noise schedule instead of the options below."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A U-Net config.json (diffusers keys); replaces the network options below.")
    ] = None,
    channels: Annotated[
        str | None,
        typer.Option(help="Channels at each resolution (default: 64,128,256; of images above 64, more resolutions)."),
    ] = None,
    layers: Annotated[int, typer.Option(help="Residual blocks per resolution.")] = 2,
    attention: Annotated[
        str | None,
        typer.Option(
            help="Feature-map heights that get attention, as 16,8; empty for none (default: the largest up to 16)."
        ),
    ] = None,
    head_dim: Annotated[int | None, typer.Option(help="Channels of an attention head (default: one head).")] = None,
    groups: Annotated[
        int | None, typer.Option(help="Groups of GroupNorm (default: the most up to 32 that divide --channels).")
    ] = None,
    dropout: Annotated[float, typer.Option(help="Dropout in the residual blocks.")] = 0.0,
    scale_shift: Annotated[
        bool, typer.Option(help="Time and class scale and shift each block (FiLM) instead of being added.")
    ] = False,
    class_image: Annotated[
        str | None, typer.Option(help="add, multiply or concat: the class joins the input image instead.")
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(help="linear, scaled_linear, cosine, sigmoid, or flow for flow matching (default: linear)."),
    ] = None,
    timesteps: Annotated[int | None, typer.Option(help="Length of the noise schedule (default: 1000).")] = None,
    prediction: Annotated[
        str | None,
        typer.Option(help="epsilon, sample, v_prediction or flow_prediction (default: epsilon; the last of a flow)."),
    ] = None,
    shift: Annotated[
        float | None, typer.Option(help="Shift of a flow's noise levels, above 1 for large images (default: 1).")
    ] = None,
    flow_sigmas: Annotated[
        str | None, typer.Option(help="Noise levels of a flow: logit_normal or uniform (default: logit_normal).")
    ] = None,
    min_snr_gamma: Annotated[
        float | None, typer.Option(help="Min-SNR weighting of the loss, as 5 (default: none).")
    ] = None,
    label_dropout: Annotated[float, typer.Option(help="Share of labels that are dropped, for guidance.")] = 0.1,
    steps: Annotated[int, typer.Option(help="Updates of the weights.")] = 100_000,
    batch_size: Annotated[int, typer.Option(help="Images per update, over all processes.")] = 128,
    accumulate: Annotated[int, typer.Option(help="Parts that a batch is divided into, to save memory.")] = 1,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 2e-4,
    lr_warmup: Annotated[int, typer.Option(help="Updates of linear warm-up.")] = 500,
    lr_decay: Annotated[str, typer.Option(help="cosine, linear or none.")] = "cosine",
    weight_decay: Annotated[float, typer.Option(help="Weight decay of AdamW.")] = 0.0,
    grad_clip: Annotated[float, typer.Option(help="Bound of the gradient norm.")] = 1.0,
    ema_decay: Annotated[float, typer.Option(help="Decay of the averaged weights that are sampled.")] = 0.9999,
    hflip: Annotated[bool, typer.Option(help="Mirror half of the images.")] = False,
    precision: Annotated[str, typer.Option(help="fp32 or bf16 (autocast).")] = "fp32",
    compile_: Annotated[bool, typer.Option("--compile", help="torch.compile the network.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option(help="Compute activations twice instead of keeping them: less memory, more time.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default: cuda where there is one).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of initial weights, order and noise.")] = 0,
    accept_changes: Annotated[
        bool, typer.Option(help="Resume with another learning rate, batch size or the like than the run began with.")
    ] = False,
    log_every: Annotated[int, typer.Option(help="Updates between lines of log.jsonl.")] = 50,
    save_every: Annotated[int, typer.Option(help="Updates between checkpoints.")] = 1000,
    sample_every: Annotated[int, typer.Option(help="Updates between sample grids; 0 for none.")] = 1000,
    as_json: JsonOption = False,
) -> None:
    """Train a U-Net on images; classes are the sub-folders, the npz's labels, or the --labels file.

    Under torchrun the batch is shared by the processes. The result is OUT/model, a diffusers folder.

    Examples:

    fastdiff train photos --size 64 --out runs/photos --precision bf16 --compile

    fastdiff train colour --condition gray --size 64 -o runs/colouring

    fastdiff train images.gz --labels labels.gz --size 32 --fit pad -o runs/mnist

    torchrun --nproc-per-node 2 -m fastdiff train photos --size 64 -o runs/2
    """
    # long: a statement for each step of the command, with its many options
    import torch

    from fastdiff import TrainConfig, Trainer, UNet, UNetConfig
    from fastdiff.checkpoints import load
    from fastdiff.checkpoints.reading import read_json
    from fastdiff.data.datasets import open_data
    from fastdiff.data.pairs import open_pairs
    from fastdiff.data.pixels import Reading
    from fastdiff.data.summary import duration
    from fastdiff.files import write_text
    from fastdiff.training.lock import locked

    if init is not None and config is not None:
        raise InvalidArgument("--init and --config both give the network; use one")
    given = None if init is None else load(init)
    noise, predicted = _process(schedule, timesteps, prediction, shift, given)
    settings = TrainConfig(
        steps=steps, batch_size=batch_size, accumulate=accumulate, prediction=predicted, min_snr_gamma=min_snr_gamma,
        label_dropout=label_dropout, hflip=hflip, lr=lr, lr_warmup=lr_warmup, lr_decay=lr_decay,
        weight_decay=weight_decay, grad_clip=grad_clip, ema_decay=ema_decay, precision=precision, compile=compile_,
        gradient_checkpointing=gradient_checkpointing, seed=seed, log_every=log_every, save_every=save_every,
        sample_every=sample_every, flow_sigmas=flow_sigmas,
    )  # fmt: skip
    unet_config = UNetConfig.from_dict(read_json(config)) if config is not None else None
    if captions is not None and (init is not None or config is not None or class_image is not None or scale_shift):
        raise InvalidArgument(
            "--captions makes a network of its own; leave out --init, --config, --class-image and --scale-shift"
        )
    if captions is not None and condition is not None:
        raise InvalidArgument("--captions and --condition both say what an image is drawn from; use one")
    if captions is not None and (class_depth or class_names is not None or labels is not None):
        raise InvalidArgument(
            "--captions takes the place of classes; leave out --class-depth, --class-names and --labels"
        )
    if unconditional and (class_depth or class_names is not None):
        raise InvalidArgument("--unconditional ignores classes; leave out --class-depth and --class-names")
    if out.is_dir() and os.environ.get("RANK", "0") == "0":
        with locked(out):  # before the data are read, which may take minutes
            pass
    if condition is None and condition_channels is not None:
        raise InvalidArgument("--condition-channels needs --condition")
    reading = Reading(read_range(value_range), frames, alpha, profile)
    with flags_in_errors():
        images: ImageData = open_data(
            data, reading, labels=labels, size=None if size is None else read_size(size), channels=image_channels,
            fit=fit, layout=layout,
            class_depth=0 if unconditional or captions is not None else class_depth,
            class_names=None if class_names is None else [name.strip() for name in class_names.split(",")],
            captions=captions,
        )  # fmt: skip
    encoder = None
    unet: UNet | UNetCondition
    drawn = images.channels
    if condition is not None:
        with flags_in_errors():
            pictures = open_data(
                condition, reading, size=images.size, channels=condition_channels, fit=fit, class_depth=0
            )
            images = open_pairs(images, pictures)
    if given is not None:
        unet = given.unet
    else:
        if unet_config is None:
            unet_config = _network(
                images, None if channels is None else read_numbers("--channels", channels), layers,
                [] if attention == "" else None if attention is None else read_numbers("--attention", attention),
                head_dim, groups, dropout, scale_shift, class_image, unconditional or captions is not None, drawn,
            )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if captions is None:
                unet = UNet(unet_config).zero_residuals_()
            else:
                unet, encoder = _captioned(unet_config, head_dim or TEXT_HEAD, caption_tokens)
    with flags_in_errors():
        trainer = Trainer(unet, images, out, settings, noise, device=device, text_encoder=encoder)
    summary: dict[str, Any] = {}

    def begin() -> None:
        summary.update(_summary(trainer, data, None if given is None else given.class_names))
        write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
        print("\n".join(_lines(summary)), file=sys.stderr, flush=True)

    started = time.perf_counter()
    with _stopping(trainer) as received:
        trainer.fit(begin, accept_changes)
    if trainer.step < settings.steps:
        if trainer.rank == 0:
            saved = f"step {trainer.step} of {settings.steps} is saved in {printable(trainer.checkpoint_path)}"
            text = f"{saved}; the same command goes on from there, and `fastdiff sample {printable(out)}` draws from it"
            print("stopped:", text if trainer.step else "nothing was trained yet", file=sys.stderr, flush=True)
        raise typer.Exit(128 + (received or [signal.SIGTERM])[0])
    if trainer.rank == 0:
        seconds = time.perf_counter() - started
        parameters = sum(p.numel() for p in unet.parameters())
        result = {
            "model": str(out / "model"),
            "step": trainer.step,
            "parameters": parameters,
            "seconds": round(seconds, 1),
            "summary": summary,
        }
        text = f"{printable(out / 'model')}: step {trainer.step}, {duration(seconds)}"
        text += f"; `fastdiff sample {printable(out)}` draws from it"
        print(json.dumps(result) if as_json else text)


def _process(
    schedule: str | None,
    timesteps: int | None,
    prediction: str | None,
    shift: float | None,
    given: Pretrained | None,
) -> tuple[NoiseSchedule | FlowSchedule, str]:
    """Return the noise schedule and the prediction that the options name; either of them may say that it is a flow.

    Without any of the options they are those of the model ``given`` to start from, if it has some.
    """
    if given is None or given.schedule is None or given.prediction is None:
        return _named_process(schedule, timesteps, prediction, shift)
    known: tuple[Any, str] = given.schedule, given.prediction
    named = (schedule, timesteps, prediction, shift)
    if any(option is not None for option in named) and _named_process(*named) != known:
        raise InvalidArgument(
            f"--init {given.path}: it was trained with another --schedule, --timesteps, --shift or --prediction "
            f"({shown(known[0])}, {known[1]}); leave them out to go on with its own"
        )
    return known


def _named_process(
    schedule: str | None, timesteps: int | None, prediction: str | None, shift: float | None
) -> tuple[NoiseSchedule | FlowSchedule, str]:
    from fastdiff import NoiseSchedule
    from fastdiff.solvers import FlowSchedule

    timesteps = 1000 if timesteps is None else timesteps
    if schedule == "flow" or (schedule is None and prediction == "flow_prediction"):
        return FlowSchedule(1.0 if shift is None else shift, timesteps), prediction or "flow_prediction"
    if shift is not None:
        raise InvalidArgument("--shift moves the noise levels of a flow; it needs --schedule flow")
    return NoiseSchedule(schedule or "linear", timesteps), prediction or "epsilon"


@contextlib.contextmanager
def _stopping(trainer: Trainer) -> Iterator[list[int]]:
    """Let the first Ctrl-C or SIGTERM stop the training with a checkpoint; a second one acts as usual, at once.

    Yields the numbers of the signals that have come.
    """
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: object) -> None:
        received.append(number)
        trainer.stop()
        restore()
        text = "\nstopping after this update and saving; once more ends at once, without saving\n"
        os.write(2, text.encode())  # a print could meet itself half-way in the interrupted code

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    if threading.current_thread() is not threading.main_thread():  # only it may handle signals
        yield received
        return
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup and the like keep their meaning
            signal.signal(number, stop)
    try:
        yield received
    finally:
        restore()


def _summary(trainer: Trainer, data: Path, initial_names: tuple[str, ...] | None) -> dict[str, Any]:
    """Describe what a run will do, ready for JSON; ``initial_names`` are those of the classes of --init."""
    from fastdiff.data.summary import describe

    config, unet = trainer.config, trainer.unet
    described = describe(trainer.data, data)
    for entry in described["skipped_files"]:
        entry["reason"] = in_flags(entry["reason"])
    warnings = [in_flags(text) for text in described.pop("warnings")]
    seconds, left = trainer.seconds_per_update(), max(config.steps - trainer.step, 0)
    return {
        "data": described,
        "network": {
            "parameters": sum(p.numel() for p in unet.parameters()),
            "sample_size": list(trainer.data.size),
            "classes": unet.config.num_classes,
            "class_names": trainer.class_names and list(trainer.class_names),
        },
        "device": str(trainer.device),
        "precision": config.precision,
        "compiled": config.compile,
        "processes": trainer.world,
        "updates": left,
        "batch_size": config.batch_size,
        "epochs": round(left * config.batch_size / len(trainer.data), 2),
        "seconds_per_update": round(seconds, 4),
        "seconds": round(left * seconds, 1),
        "warnings": [*warnings, *_doubts(trainer, initial_names, left * seconds)],
    }


def _doubts(trainer: Trainer, initial_names: tuple[str, ...] | None, seconds: float) -> list[str]:
    """Return what is doubtful about a run of so many seconds, besides its data."""
    from fastdiff.data.summary import duration

    config, classes = trainer.config, trainer.unet.config.num_classes
    warnings: list[str] = []
    if len(trainer.data) < config.batch_size:
        warnings.append(
            f"{len(trainer.data)} images are fewer than a batch of {config.batch_size}: each is drawn several times in "
            "every update; --batch-size sets another"
        )
    if config.steps <= config.lr_warmup:
        warnings.append(
            f"the learning rate still rises when the run ends: its warm-up takes {config.lr_warmup} updates, the run "
            f"{config.steps}; --lr-warmup sets another"
        )
    if classes is None and trainer.data.num_classes is not None:
        warnings.append("the network has no classes, so the data's labels are ignored; --unconditional accepts that")
    if classes is not None and classes > (trainer.data.num_classes or 0):
        warnings.append(
            f"the network has {classes} classes, the data {trainer.data.num_classes}: the others are not trained; "
            "another --config or --init, or the options of the network, have as many"
        )
    names = trainer.class_names
    if initial_names is not None and names is not None and initial_names != names:
        i = next((i for i, pair in enumerate(zip(initial_names, names, strict=False)) if len({*pair}) > 1), 0)
        warnings.append(
            f"class {i} is {initial_names[i]} in the model of --init and {names[i]} in the data; --class-names sets "
            "the order"
        )
    if seconds > LONG:
        warnings.append(
            f"the run takes about {duration(seconds)} on this device: --steps makes it shorter, --batch-size and "
            "--channels an update; it may be stopped at any time (Ctrl-C), sampled, and resumed"
        )
    return warnings


def _lines(summary: dict[str, Any]) -> list[str]:
    """Format the summary for people."""
    from fastdiff.data.summary import data_lines, duration, line, warning_lines

    network, size = summary["network"], "x".join(map(str, summary["network"]["sample_size"]))
    classes = "no classes" if network["classes"] is None else f"{network['classes']} classes"
    each = summary["seconds_per_update"]
    processes = f", {summary['processes']} processes" if summary["processes"] > 1 else ""
    return [
        *data_lines("data", summary["data"]),
        line("network", f"{network['parameters']:,} parameters, images of {size}, {classes}"),
        line("device", f"{summary['device']}, {summary['precision']}{processes}"),
        line(
            "time",
            f"about {duration(summary['seconds'])} for {summary['updates']:,} updates of {summary['batch_size']} "
            f"images ({summary['epochs']:g} times all images, {duration(each)} each), without samples and checkpoints"
            + (" and before compilation" if summary["compiled"] else ""),
        ),
        *warning_lines(summary["warnings"]),
    ]


MAX_ATTENTION = 16  # height of the largest map that gets attention by default: its cost grows with the fourth power


def _channels(size: tuple[int, int]) -> list[int]:
    """Return the default channels: three resolutions, and more for images above 64, down to maps of 8 to 16."""
    channels = [64, 128, 256]
    halvings = len(channels) - 1
    while min(size) >> halvings > MAX_ATTENTION and not any(side % (2 << halvings) for side in size):
        halvings += 1
        channels.insert(1, 128)
    return channels


def _network(
    data: ImageData, channels: list[int] | None, layers: int, attention: list[int] | None, head_dim: int | None,
    groups: int | None, dropout: float, scale_shift: bool, class_image: str | None, unconditional: bool,
    drawn: int | None = None,
) -> UNetConfig:  # fmt: skip
    """Return the configuration of the U-Net that the options describe, for this data.

    It draws ``drawn`` of the data's channels, if not all: the others are a condition image.
    """
    from fastdiff import UNetConfig

    if channels is None:
        channels = _channels(data.size)
    groups = math.gcd(32, *channels) if groups is None else groups
    heights = [data.size[0] >> level for level in range(len(channels))]
    if attention is None:
        attention = [height for height in heights if height <= MAX_ATTENTION][:1]
    unknown = sorted(set(attention) - set(heights))
    if unknown:
        raise InvalidArgument(f"--attention {unknown[0]}: the feature maps are {', '.join(map(str, heights))} high")
    has = [height in attention for height in heights]
    classes = None if unconditional else data.num_classes
    return UNetConfig(
        sample_size=data.size[0] if data.size[0] == data.size[1] else data.size,
        in_channels=data.channels,
        out_channels=data.channels if drawn is None else drawn,
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


def _captioned(config: UNetConfig, head_dim: int, tokens: int) -> tuple[UNetCondition, CaptionEncoder]:
    """Return a network with attention to captions where ``config`` has attention, and the encoder of the captions."""
    from fastdiff import UNetCondition, UNetConditionConfig
    from fastdiff.text import CaptionEncoder, CaptionEncoderConfig

    reads = [kind.startswith("Attn") for kind in config.down_block_types]
    assert config.norm_num_groups is not None, "_network chooses a number"
    condition = UNetConditionConfig(
        sample_size=config.sample_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=tuple("CrossAttnDownBlock2D" if r else "DownBlock2D" for r in reads),
        up_block_types=tuple("CrossAttnUpBlock2D" if r else "UpBlock2D" for r in reversed(reads)),
        attention_head_dim=tuple(max(c // head_dim, 1) for c in config.block_out_channels),
        norm_num_groups=config.norm_num_groups,
        dropout=config.dropout,
        cross_attention_dim=TEXT_CHANNELS,
        use_linear_projection=True,
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=TEXT_CHANNELS,
    )
    encoder = CaptionEncoder(CaptionEncoderConfig(channels=TEXT_CHANNELS, tokens=tokens))
    return UNetCondition(condition).zero_residuals_(), encoder
