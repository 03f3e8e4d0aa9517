"""A cluster is never asked for more workers than it can hold."""

from __future__ import annotations

import pytest

from pipelines.cluster.resources import fitting_workers, worker_resources
from skipvision.errors import ResourceError

LAPTOP = [{"CPU": 2.0}]
CLUSTER = [{"CPU": 8.0}, {"CPU": 16.0, "GPU": 2.0}, {"CPU": 16.0, "GPU": 1.0}]


# ------------------------------------------------------------------------------------------- workers


def test_no_worker_is_split_over_nodes():
    assert fitting_workers(CLUSTER, {"CPU": 8.0, "GPU": 0.0}) == 5
    assert fitting_workers(CLUSTER, {"CPU": 9.0}) == 2
    assert fitting_workers(CLUSTER, {"CPU": 1.0, "GPU": 1.0}) == 3


def test_cpus_are_shared_out_and_gpus_used_where_there_are_any():
    assert worker_resources(LAPTOP, 1, None, None) == {"CPU": 2.0, "GPU": 0.0}
    assert worker_resources(LAPTOP, 2, None, None) == {"CPU": 1.0, "GPU": 0.0}
    assert worker_resources(CLUSTER, 3, None, None) == {"CPU": 8.0, "GPU": 1.0}
    assert worker_resources(CLUSTER, 2, None, None) == {"CPU": 16.0, "GPU": 1.0}
    assert worker_resources(CLUSTER, 5, None, 0) == {"CPU": 8.0, "GPU": 0.0}
    assert worker_resources(CLUSTER, 2, 4, 1) == {"CPU": 4.0, "GPU": 1.0}


def test_more_than_there_is_is_refused():
    with pytest.raises(ResourceError, match=r"3 workers with 1 CPU and 0 GPU .* holds 2 \(its nodes: 2 CPU"):
        worker_resources(LAPTOP, 3, None, None)
    with pytest.raises(ResourceError, match="the cluster holds 0"):
        worker_resources(LAPTOP, 1, None, 1)
    with pytest.raises(ResourceError, match=r"4 workers with 1 CPU and 1 GPU .* holds 3"):
        worker_resources(CLUSTER, 4, None, None)
