"""Workers get resources that the cluster has; too many workers are an error."""

from __future__ import annotations

import pytest

from pipelines.cluster.resources import fitting_workers, worker_resources
from skipvision.errors import ResourceError

LAPTOP = [{"CPU": 2.0}]
CLUSTER = [{"CPU": 8.0}, {"CPU": 16.0, "GPU": 2.0}, {"CPU": 16.0, "GPU": 1.0}]


def test_a_worker_runs_on_one_node():
    assert fitting_workers(CLUSTER, {"CPU": 8.0, "GPU": 0.0}) == 5
    assert fitting_workers(CLUSTER, {"CPU": 9.0}) == 2
    assert fitting_workers(CLUSTER, {"CPU": 1.0, "GPU": 1.0}) == 3


def test_cpus_are_shared_equally_and_existing_gpus_are_used():
    assert worker_resources(LAPTOP, 1, None, None) == {"CPU": 2.0, "GPU": 0.0}
    assert worker_resources(LAPTOP, 2, None, None) == {"CPU": 1.0, "GPU": 0.0}
    assert worker_resources(CLUSTER, 3, None, None) == {"CPU": 8.0, "GPU": 1.0}
    assert worker_resources(CLUSTER, 2, None, None) == {"CPU": 16.0, "GPU": 1.0}
    assert worker_resources(CLUSTER, 5, None, 0) == {"CPU": 8.0, "GPU": 0.0}
    assert worker_resources(CLUSTER, 2, 4, 1) == {"CPU": 4.0, "GPU": 1.0}


def test_workers_that_do_not_fit_raise_an_error():
    with pytest.raises(ResourceError, match=r"3 workers with 1 CPU and 0 GPU .* holds 2 \(its nodes: 2 CPU"):
        worker_resources(LAPTOP, 3, None, None)
    with pytest.raises(ResourceError, match="the cluster holds 0"):
        worker_resources(LAPTOP, 1, None, 1)
    with pytest.raises(ResourceError, match=r"4 workers with 1 CPU and 1 GPU .* holds 3"):
        worker_resources(CLUSTER, 4, None, None)
