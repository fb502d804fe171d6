"""Compare the eager network in NHWC and NCHW: the reason why `Sampler.from_pretrained` converts weights to NHWC.

pytest benchmarks/test_layout.py -s
"""

from __future__ import annotations

import functools
import statistics
from typing import Any

import torch

import fastdiff
from fastdiff.bench.timing import mean_seconds

BATCH, STEPS, ROUNDS = 32, 4, 7


def test_nhwc_against_nchw(benchmark: Any) -> None:
    unets = {name: fastdiff.UNet.from_pretrained("fashion-mnist") for name in ("nchw", "nhwc")}
    unets["nhwc"].to(memory_format=torch.channels_last)
    schedule = fastdiff.NoiseSchedule("cosine")
    samplers = {
        name: fastdiff.Sampler(u, schedule, prediction="v_prediction", backend="eager") for name, u in unets.items()
    }
    speed: dict[str, list[float]] = {name: [] for name in samplers}

    def interleaved() -> None:
        for name, sampler in samplers.items():
            run = functools.partial(sampler.sample, BATCH, steps=STEPS, labels=1)
            speed[name].append(BATCH * STEPS / mean_seconds(run))

    benchmark.pedantic(interleaved, rounds=ROUNDS, warmup_rounds=1)
    medians = {name: statistics.median(values[1:]) for name, values in speed.items()}
    ratio = medians["nhwc"] / medians["nchw"]
    benchmark.extra_info |= {"img_steps_per_s": medians, "ratio": ratio, "threads": torch.get_num_threads()}
    print(f"{medians} img-steps/s with {torch.get_num_threads()} threads: NHWC is {ratio:.2f} times NCHW")
