"""Dashboards and alerts name only metrics that exist, and every alert fires when it must."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from tests.infra.exported import declared, named, selected_labels
from tests.infra.manifests import INFRA
from tests.infra.prometheus import SPAN_SECONDS

DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((INFRA / "grafana").glob("*.json"))}
RULES = [
    rule
    for group in yaml.safe_load((INFRA / "prometheus/rules.yaml").read_text())["groups"]
    for rule in group["rules"]
]
LABELS = {"model", "replica", "stage", "kind", "route", "status", "job_name", "le", "job"}
"""The tags of our metrics, and Prometheus's own labels."""

dashboards = pytest.mark.parametrize("name", list(DASHBOARDS))


def queries(name: str) -> list[str]:
    dashboard = DASHBOARDS[name]
    variables = [one["definition"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    return [*variables, *(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])]


@dashboards
def test_a_dashboard_names_only_metrics_that_are_exported(name):
    for query in queries(name):
        assert named(query), query
        assert named(query) <= declared(), query
        assert selected_labels(query) <= LABELS, query


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_names_only_metrics_that_are_exported(rule):
    assert named(rule["expr"]) <= declared()
    assert named(rule["expr"]) or "up{job=" in rule["expr"]
    assert selected_labels(rule["expr"]) <= LABELS


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_has_a_runbook_whose_panels_exist(rule):
    titles = {panel["title"] for one in DASHBOARDS.values() for panel in one["panels"]}
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert len(rule["annotations"]["runbook"].split()) > 5
    assert set(re.findall(r'panel "([^"]+)"', rule["annotations"]["runbook"])) <= titles


def test_the_dashboards_show_what_operators_need():
    wanted = {
        "endpoint": [
            "first_token",
            "output_token",
            "waiting",
            "kv_bytes_used",
            "tokens_saved",
            "errors_total",
        ],
        "batch": ["rows_per_second", "error_rows", "seconds_left"],
        "training": ["step_seconds", "loss", "images_per_second"],
    }
    for name, metrics in wanted.items():
        assert [metric for metric in metrics if metric not in " ".join(queries(name))] == []


@dashboards
def test_panels_are_complete_and_do_not_overlap(name):
    taken = set()
    for panel in DASHBOARDS[name]["panels"]:
        grid = panel["gridPos"]
        cells = {
            (grid["x"] + across, grid["y"] + down) for across in range(grid["w"]) for down in range(grid["h"])
        }
        assert not cells & taken
        assert all(x < 24 for x, _ in cells)
        taken |= cells
        defaults = panel["fieldConfig"]["defaults"]
        assert defaults["noValue"]  # why it is empty
        if panel["type"] == "timeseries":
            assert defaults["custom"]["spanNulls"] == 1000 * SPAN_SECONDS
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
    assert len({panel["id"] for panel in DASHBOARDS[name]["panels"]}) == len(DASHBOARDS[name]["panels"])
    assert DASHBOARDS[name]["uid"] == f"skipvision-{name}"


@pytest.mark.parametrize(
    ("titles", "alert"),
    [
        (["Failed"], "EndpointErrors"),
        (["First token, 95 %", "Time to first token"], "EndpointFirstTokenSlow"),
        (["KV memory"], "EndpointKvMemoryScarce"),
    ],
)
def test_the_red_thresholds_of_panels_are_those_of_alerts(titles, alert):
    (rule,) = (one for one in RULES if one["alert"] == alert)
    for title in titles:
        (panel,) = (one for one in DASHBOARDS["endpoint"]["panels"] if one["title"] == title)
        *_, red = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
        assert red["color"] == "red"
        assert re.search(rf"> {red['value']}(?!\S)", rule["expr"])


def test_every_alert_has_a_unit_test_in_which_it_fires():
    tests = yaml.safe_load((INFRA / "prometheus/rules_test.yaml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    fires = {case["alertname"] for case in cases if case["exp_alerts"]}
    assert fires == {rule["alert"] for rule in RULES}


def test_the_prometheus_operator_gets_the_same_rules_and_the_name_of_the_job():
    folder = INFRA / "kuberay/components/monitoring"
    rules = yaml.safe_load((folder / "rules.yaml").read_text())
    assert rules["kind"] == "PrometheusRule"
    assert rules["spec"]["groups"] == yaml.safe_load((INFRA / "prometheus/rules.yaml").read_text())["groups"]
    (endpoint,) = yaml.safe_load((folder / "podmonitor.yaml").read_text())["spec"]["podMetricsEndpoints"]
    assert {"targetLabel": "job", "replacement": "ray"} in endpoint["relabelings"]
    cluster = yaml.safe_load((INFRA / "kuberay/base/raycluster.yaml").read_text())
    (ray,) = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert endpoint["port"] in {port["name"] for port in ray["ports"]}


def test_a_young_job_is_not_yet_stuck():
    for rule in RULES:
        if rule["alert"].endswith("Stuck"):
            (window,) = re.findall(r"changes\(.*\[(\w+)\]\)", rule["expr"])
            assert f"offset {window}" in rule["expr"]
