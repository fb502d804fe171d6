"""Training in two processes gives what one process gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.training.toys import (
    log_of,
    python,
    toy_trainer,
    toy_unet,
    weights_of,
)

RANKED = """
import os, sys
from tests.training.toys import toy_trainer, toy_unet

out, rank = sys.argv[1], os.environ["RANK"]
toy_trainer(f"{out}/rank-{rank}", steps=4, accumulate=2, log_every=1, sample_every=4).fit()
"""


@pytest.mark.slow  # two processes, and one that starts them; make bulk-check runs it
def test_two_processes_train_as_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    script = tmp_path / "ranked.py"
    script.write_text(RANKED)
    two = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, tmp_path)
    assert two.returncode == 0, two.stderr
    assert not (tmp_path / "rank-1").exists()  # only rank 0 writes
    assert {path.name for path in (tmp_path / "rank-0").iterdir()} >= {"checkpoint.safetensors", "log.jsonl", "model"}

    one = toy_trainer(tmp_path / "one", steps=4, accumulate=2, log_every=1)
    one.fit()
    tensors = load_file(tmp_path / "rank-0" / "checkpoint.safetensors")
    alone = load_file(tmp_path / "one" / "checkpoint.safetensors")
    start = dict(toy_unet().named_parameters())
    for name, expected in alone.items():
        assert float((tensors[name] - expected).norm()) <= 2e-3 * float(expected.norm()) + 1e-6, name
    moved = max(float((alone[f"model.{name}"] - p.detach()).abs().max()) for name, p in start.items())
    assert moved > 1e-3
    for a, b in zip(log_of(tmp_path / "rank-0"), log_of(tmp_path / "one"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)

    resumed = toy_trainer(tmp_path / "rank-0", steps=6, accumulate=2, log_every=1)
    resumed.fit()
    assert "1 processes instead of 2" in caplog.text
    one = toy_trainer(tmp_path / "one", steps=6, accumulate=2, log_every=1)
    one.fit()
    for (name, a), b in zip(weights_of(resumed).items(), weights_of(one).values(), strict=True):
        assert float((a - b).norm()) <= 4e-3 * float(b.norm()) + 1e-6, name
