import os

import pytest
import torch

from fastdiff.backends.native import threads


@pytest.fixture
def groups(tmp_path):
    """Writes control groups, and gives the arguments of `quotas`."""

    def write(own: str, files: dict[str, str]):
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "cgroup", tmp_path / "own"

    return write


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, [1.5]),
        ("0::/\n", {"cpu.max": "max 100000\n"}, []),
        ("0::/pod/me\n", {"pod/me/cpu.max": "max 100000\n", "pod/cpu.max": "400000 100000\n"}, [4.0]),
        ("0::/docker/abc\n", {"cpu.max": "50000 100000\n"}, [0.5]),  # the path outside the container
        (
            "12:cpu,cpuacct:/x\n3:memory:/x\n",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "200000\n", "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n"},
            [2.0],
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, []),
    ],
)
def test_quotas_of_control_groups(groups, own, files, expected):
    assert threads.quotas(*groups(own, files)) == expected


def test_no_control_groups(tmp_path):
    assert threads.quotas(tmp_path, tmp_path / "none") == []


def test_the_number_is_the_least_of_what_there_is(monkeypatch):
    monkeypatch.setattr(threads, "quotas", lambda: [])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert threads.number() == 6
    monkeypatch.setattr(threads, "quotas", lambda: [16.0, 2.5])
    assert threads.number() == 3
    monkeypatch.setattr(threads, "quotas", lambda: [0.2])
    assert threads.number() == 1
