"""``fastdiff train`` trains a U-Net on images."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastdiff.cli.options import JsonOption, read_numbers, read_size
from fastdiff.errors import InvalidArgument

if TYPE_CHECKING:
    from fastdiff.training import ImageData
    from fastdiff.unet import UNetConfig


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
    unconditional: Annotated[bool, typer.Option(help="Ignore the labels of the data.")] = False,
    init: Annotated[
        str | None, typer.Option(help="Start from this model's network and weights instead of the options below.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A U-Net config.json (diffusers keys); replaces the network options below.")
    ] = None,
    channels: Annotated[str, typer.Option(help="Channels at each resolution.")] = "64,128,256",
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
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default: cuda where there is one).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of initial weights, order and noise.")] = 0,
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
    from fastdiff.checkpoints import load
    from fastdiff.checkpoints.reading import read_json
    from fastdiff.training import load_data

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
    if (
        given is not None
        and given.schedule is not None
        and (given.schedule != noise or given.scheduler_config.get("prediction_type") != prediction)
    ):
        raise InvalidArgument(
            f"--init {init}: it was trained with another --schedule, --timesteps or --prediction; use those of "
            f"`fastdiff info {init}`"
        )
    unet_config = UNetConfig.from_dict(read_json(config)) if config is not None else None
    images = load_data(data, labels=labels, size=None if size is None else read_size(size), fit=fit)
    if given is not None:
        unet = given.unet
    else:
        if unet_config is None:
            unet_config = _network(
                images, read_numbers("--channels", channels), layers,
                read_numbers("--attention", attention) if attention else [], head_dim, groups, dropout, scale_shift,
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


def _network(
    data: ImageData, channels: list[int], layers: int, attention: list[int], head_dim: int | None, groups: int,
    dropout: float, scale_shift: bool, class_image: str | None, unconditional: bool,
) -> UNetConfig:  # fmt: skip
    """Return the configuration of the U-Net that the options describe, for this data."""
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
