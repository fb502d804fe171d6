"""Measure the decoders of autoencoders: the native engine beside diffusers and OpenVINO, in turns, on random weights.

    python benchmarks/decode.py --kind kl --pixels 256 --rounds 3
    python benchmarks/decode.py --kind tiny --pixels 512

``kl`` is the decoder of Stable Diffusion 1 and 2, ``tiny`` that of TAESD. Nothing else should run meanwhile. It prints
JSON: the median seconds of each, the ratio of the fastest peer's to the engine's in each round, and the errors against
float64 (at a quarter of the pixels, as that takes long).
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.backends.native import NativeCoder
from fastdiff.bench import machine, timing
from fastdiff.bench.networks import randomize_
from fastdiff.unet.decoder import Decoder, DecoderConfig
from fastdiff.unet.tiny_decoder import TinyDecoder, TinyDecoderConfig

STABLE_DIFFUSION: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}


def decoders(kind: str) -> tuple[torch.nn.Module, Decoder | TinyDecoder]:
    """Return diffusers' decoder and fastdiff's, with the same random weights."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    vae = AutoencoderTiny() if kind == "tiny" else AutoencoderKL(**STABLE_DIFFUSION)
    theirs = randomize_(vae.decoder).eval().requires_grad_(False)
    ours: Decoder | TinyDecoder
    if kind == "tiny":
        ours = TinyDecoder(TinyDecoderConfig.from_dict(vae.config))
    else:
        ours = Decoder(DecoderConfig.from_dict(vae.config))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours.eval().requires_grad_(False)


def openvino(module: torch.nn.Module, z: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the module as OpenVINO runs it, in float32."""
    import openvino as ov

    options = {
        "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }  # fmt: skip
    converted = ov.convert_model(module, example_input=z, input=[tuple(z.shape)])
    request = ov.Core().compile_model(converted, "CPU", options).create_infer_request()
    return lambda z: torch.from_numpy(request.infer({0: z.numpy()}, share_outputs=True)[0])


@torch.no_grad()
def measure(kind: str, pixels: int, rounds: int) -> dict[str, Any]:
    """Measure all contenders in turns."""
    theirs, ours = decoders(kind)
    last = decoders(kind)[0].to(memory_format=torch.channels_last)
    z = torch.randn(1, 4, pixels // 8, pixels // 8, generator=torch.Generator().manual_seed(0))
    small = z[:, :, : pixels // 16, : pixels // 16].contiguous()
    exact = theirs.double()(small.double())
    theirs.float()
    contenders: dict[str, Callable[[Tensor], Tensor]] = {
        "native": NativeCoder(ours),
        "diffusers": theirs,
        "diffusers-last": lambda z: last(z.contiguous(memory_format=torch.channels_last)),
    }
    try:
        contenders["openvino"] = openvino(theirs, z)
    except ImportError as e:
        print(f"openvino is left out: {e}")
    errors = {
        name: float((run(small).double() - exact).norm() / exact.norm())
        for name, run in contenders.items()
        if name != "openvino"  # which was compiled for the other size
    }
    ways = {name: functools.partial(run, z) for name, run in contenders.items()}
    seconds = timing.in_turn(ways, rounds)
    peers = [name for name in contenders if name != "native"]
    ratios = [min(seconds[name][i] for name in peers) / seconds["native"][i] for i in range(rounds)]
    return {
        "decoder": kind,
        "pixels": pixels,
        "machine": machine.header(),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "errors": errors,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("kl", "tiny"), default="kl")
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print(json.dumps(measure(given.kind, given.pixels, given.rounds), indent=1))


if __name__ == "__main__":
    main()
