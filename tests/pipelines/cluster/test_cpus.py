"""Usable CPUs follow from affinity and quotas, not from the machine."""

from __future__ import annotations

import os

import pytest

from pipelines.cluster.cpus import usable_cpus


@pytest.fixture
def cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def test_affinity_counts(cpus, tmp_path):
    assert usable_cpus(tmp_path, tmp_path / "none") == 8


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [
        ("max 100000", "250000 100000", 2),
        ("300000 100000", "max 100000", 3),
        ("50000 100000", "400000 100000", 1),
        ("max 100000", "max 100000", 8),
        ("max 100000", "1600000 100000", 8),
    ],
)
def test_the_smallest_quota_counts(cpus, tmp_path, outer, inner, expected):
    groups, own = tmp_path / "cgroup", tmp_path / "own"
    (groups / "a" / "b").mkdir(parents=True)
    (groups / "a" / "cpu.max").write_text(f"{outer}\n")
    (groups / "a" / "b" / "cpu.max").write_text(f"{inner}\n")
    own.write_text("4:memory:/x\n0::/a/b\n")
    assert usable_cpus(groups, own) == expected
