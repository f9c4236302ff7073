"""Alerts and dashboard: the rules say what they should, and every query names series that a real Ray gives to a real
Prometheus (Debian's package `prometheus`; without it these tests are skipped).
"""

import http
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rzen.training.telemetry import HELD_OUT, METRICS, REJECTED, RUN_METRICS
from tests.infra.local_cluster import end, local_cluster
from tests.paths import ROOT

FOLDER = ROOT / "infra" / "monitoring"
NEEDS_PROMETHEUS = pytest.mark.skipif(not shutil.which("promtool"), reason="Prometheus is not installed")

NOT_ON_THIS_MACHINE = {
    "ray_node_gpus_utilization": "a GPU",
    "ray_node_gram_used": "a GPU",
    "autoscaler_pending_nodes": "node types that the autoscaler may start",
}
"""Series that need what the test's Ray lacks. Their names are looked up in Ray's source."""


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"] for rule in group["rules"]]


def dashboard_queries(name: str = "rzen") -> dict[str, str]:
    """Title of the panel and legend -> query, as Grafana would ask it for all runs, tasks and routes."""
    found = {}
    for panel in dashboard(name)["panels"]:
        for target in panel.get("targets", []):
            query = re.sub(r"\$(run|task|route)\b", ".*", target["expr"])
            found[f"{panel['title']}: {target['legendFormat']}"] = query
    return found


def dashboard(name: str) -> dict[str, Any]:
    board: dict[str, Any] = json.loads((FOLDER / "grafana" / f"{name}.json").read_text())
    return board


def series_of(query: str) -> set[str]:
    """Names of the series in a query."""
    return set(re.findall(r"\b(?:ray|autoscaler)_[a-z0-9_]+\b(?=[\[{)\s/]|$)", re.sub(r"by \([^)]*\)", "", query)))


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False)


@NEEDS_PROMETHEUS
def test_promtool_accepts_configuration_rules_and_their_tests() -> None:
    for arguments in (
        ("check", "config", FOLDER / "prometheus.yaml"),
        ("check", "rules", FOLDER / "rules.yaml"),
        ("test", "rules", FOLDER / "rules_test.yaml"),
    ):
        done = promtool(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_expected_to_fire_once_and_says_what_to_do() -> None:
    tests = yaml.safe_load((FOLDER / "rules_test.yaml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert fired == {alert for alert, *_ in FAULTS} == {rule["alert"] for rule in rules()}
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert {"summary", "action"} == set(rule["annotations"])


FAULTS = [
    ("RzenRunLost", "> 120", ">= 0"),  # a run that ended would be lost
    ("RzenRunLost", "> 120", "> 12000"),
    ("RzenRunLost", "[20m]", "[1h]"),
    ("RzenRunLost", "[20m]", "[10m]"),  # a slow run would be lost
    ("RzenRunLost", "max by (run) (last", "min by (run) (last"),  # a worker before a restart would be asked
    ("RzenRunLost", "max_over_time(deriv(ray_rzen_progress[5m])[6h:1m])", "deriv(ray_rzen_progress[5m])"),
    ("RzenRunLost", "unless", "and"),
    ("RzenRunFailed", 'state="failed"', 'state="running"'),
    ("RzenRunFailed", 'max_over_time(ray_rzen_runs{state="failed"}[5m])', 'ray_rzen_runs{state="failed"}'),
    ("RzenCheckpointOld", "7200", "72000"),
    ("RzenCheckpointOld", "max by (run)", "min by (run)"),  # so would a worker before a restart
    ("RzenCheckpointOld", "[10m]", "[2h]"),  # a run that ended would be old
    ("RzenCheckpointOld", "last_over_time(ray_rzen_checkpoint_time_s[10m])", "ray_rzen_checkpoint_time_s"),
    ("RzenLossNotFinite", "avg_over_time(ray_rzen_skipped[10m])", "ray_rzen_skipped"),
    ("RzenLossNotFinite", "> 0.1", "> 1"),
    ("RzenDecodeErrors", "> 0.01", "> 0.1"),
    ("RzenFeedSlow", "> 0.3", "> 0.05"),
    ("RzenScrapeFails", "ray|.+/rzen", "ray"),
    ("RzenDemandUnmet", 'State="PENDING"', 'State="CREATED"'),
    ("RzenNodesPending", "> 0", ">= 0"),
    ("RzenDiskFull", "> 90", "> 0.9"),
    ("RzenSpilling", "> 0.7", "> 0.5"),
    ("RzenSpilling", '{Location="SPILLED"}', ""),
    ("RzenSpilling", '{Name="object_store_memory"}', '{State="USED"}'),
    ("RzenMemoryFull", "> 0.92", "> 92"),
    ("RzenServeErrors", '"5.."', '"4..|5.."'),  # clients would wake somebody up
    ("RzenServeErrors", "> 0.01", "> 0.1"),
    ("RzenServeFull", 'status="429"', 'status=~"4.."'),
    ("RzenServeSlow", '{route!~"/|/healthz|/readyz|/metrics|/v1/models|other"}', ""),  # probes would hide the others
    ("RzenServeSlow", "> 2", "> 20"),
    ("RzenServeNotReplaced", 'result!="ok"', 'result=~".*"'),
    ("RzenServeNotReplaced", "unless ray_rzen_serve_reloads_total offset 30m", "unless ray_rzen_serve_reloads_total"),
    ("RzenServeNotReplaced", " - ray_rzen_serve_reloads_total offset 30m", ""),
    ("RzenServeVersionsDiffer", "count by (version)", "count by (corpus, version, WorkerId)"),
]


@NEEDS_PROMETHEUS
@pytest.mark.parametrize(("alert", "right", "wrong"), FAULTS)
def test_rule_tests_find_planted_faults(alert: str, right: str, wrong: str, tmp_path: Path) -> None:
    content = yaml.safe_load((FOLDER / "rules.yaml").read_text())
    (rule,) = [rule for group in content["groups"] for rule in group["rules"] if rule["alert"] == alert]
    assert right in rule["expr"]
    rule["expr"] = rule["expr"].replace(right, wrong)
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(content))
    shutil.copy(FOLDER / "rules_test.yaml", tmp_path)
    assert promtool("check", "rules", tmp_path / "rules.yaml").returncode == 0
    assert promtool("test", "rules", tmp_path / "rules_test.yaml").returncode != 0


@NEEDS_PROMETHEUS
def test_every_query_of_the_dashboard_is_a_query(tmp_path: Path) -> None:
    both = [*dashboard_queries().values(), *dashboard_queries("serving").values()]
    queries = [query.replace("$__rate_interval", "1m") for query in both]
    recorded = [{"record": f"q:{number}", "expr": query} for number, query in enumerate(queries)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "q", "rules": recorded}]}))
    done = promtool("check", "rules", tmp_path / "rules.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    recorded[0]["expr"] += ")"
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "q", "rules": recorded}]}))
    assert promtool("check", "rules", tmp_path / "rules.yaml").returncode != 0


def test_dashboard_shows_every_number_of_runs_and_no_other() -> None:
    # The server's own series are not on this dashboard, which is that of runs.
    literal = re.compile(r"""\b(?:Gauge|Counter|Histogram)\("rzen_(?!serve_)(\w+)\"""")
    by_name = {name for path in (ROOT / "jobs").rglob("*.py") for name in literal.findall(path.read_text())}
    exported = {f"ray_rzen_{name}" for name in (*METRICS, *RUN_METRICS, HELD_OUT, f"{REJECTED}_total", *by_name)}
    shown = {name for query in dashboard_queries().values() for name in series_of(query)}
    assert {name for name in shown if name.startswith("ray_rzen_")} == exported
    asked = {name for rule in rules() for name in series_of(rule["expr"]) if "_serve_" not in name}
    assert {name for name in asked if name.startswith("ray_rzen_")} <= exported


def test_the_servers_dashboard_shows_every_number_of_the_server_and_no_other() -> None:
    declared = re.findall(
        r'(Gauge|Counter|Histogram)\(\s*"(rzen_serve_\w+)"', (ROOT / "jobs/serving/server.py").read_text()
    )
    endings = {"Gauge": "", "Counter": "_total", "Histogram": "_bucket"}
    exported = {f"ray_{name}{endings[kind]}" for kind, name in declared}
    assert len(exported) == 10
    shown = {name for query in dashboard_queries("serving").values() for name in series_of(query)}
    assert {name for name in shown if name.startswith("ray_rzen_")} == exported
    asked = {name for rule in rules() for name in series_of(rule["expr"]) if "_serve_" in name}
    assert asked
    assert asked <= exported


@pytest.mark.parametrize("name", ["rzen", "serving"])
def test_the_dashboard_fits_together(name: str) -> None:
    panels = dashboard(name)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)  # no panel covers another
    assert max(x for x, _ in cells) < 24
    assert (
        yaml.safe_load((FOLDER / "grafana" / "datasource.yaml").read_text())["datasources"][0]["type"] == "prometheus"
    )


@pytest.fixture(scope="module")
def prometheus() -> Iterator[str]:
    """URL of the Prometheus of a local cluster on which a run goes on."""
    with local_cluster("--num-cpus=3", "--scrape-s=1") as cluster:
        _wait_for(cluster.prometheus, {"ray_node_cpu_utilization"}, cluster.folder / "ray.log")
        log = cluster.folder / "run.log"
        command = [sys.executable, str(Path(__file__).with_name("live_run.py")), str(cluster.folder / "results")]
        with log.open("w") as file:
            run = subprocess.Popen(command, env=cluster.environment, stdout=file, stderr=file, text=True)
        try:
            names = {"ray_rzen_loss", "ray_data_num_tasks_running"}
            _wait_for(cluster.prometheus, names, log)
            time.sleep(12)  # Ray's agents send every few seconds; rates need two samples
            yield cluster.prometheus
        finally:
            end(run)


def _wait_for(url: str, names: set[str], log: Path) -> None:
    deadline = time.monotonic() + 240
    while missing := {name for name in names if not ask(url, f"count({name})")}:
        text = log.read_text()[-2000:]
        assert time.monotonic() < deadline, f"no {missing}:\n{text}"
        assert "Traceback" not in text, text
        time.sleep(1)


def ask(url: str, query: str) -> list[Any]:
    """What Prometheus answers to a query; empty as long as it does not answer."""
    address = f"{url}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            content = json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.SERVICE_UNAVAILABLE:  # it is still starting
            return []
        raise AssertionError(f"{query}: {error.read().decode()}") from error
    except OSError:
        return []
    result: list[Any] = content["data"]["result"]
    return result


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
@NEEDS_PROMETHEUS
def test_every_query_names_series_of_a_running_ray(prometheus: str) -> None:
    queries = dashboard_queries()
    queries.pop("GPUs: {{State}}", None)  # the series is that of the CPUs, with another Name
    queries |= {name: name for rule in rules() for name in series_of(rule["expr"]) if "_serve_" not in name}
    missing = {title: query for title, query in queries.items() if not series_of(query) & set(NOT_ON_THIS_MACHINE)}
    deadline = time.monotonic() + 120  # Ray drops a gauge that was not set for some seconds, as on a crowded machine
    while missing and time.monotonic() < deadline:
        asked = {title: query.replace("$__rate_interval", "10s") for title, query in missing.items()}
        missing = {title: query for title, query in asked.items() if not ask(prometheus, query)}
    assert missing == {}
    for rule in rules():
        ask(prometheus, rule["expr"])
    assert ask(prometheus, 'up{job="ray"} == 1')
    (loss,) = ask(prometheus, 'last_over_time(ray_rzen_loss{run="live", source="images"}[5m])')
    assert (loss["metric"]["task"], loss["value"][1]) == ("text_image", "1.5")
    (bad,) = ask(prometheus, 'ray_rzen_rejected_total{run="live"}')
    assert (bad["metric"]["source"], bad["metric"]["reason"]) == ("images", "corrupt_image")
    (runs,) = ask(prometheus, "sum by (state) (last_over_time(ray_rzen_runs[1m]))")
    assert (runs["metric"], runs["value"][1]) == ({"state": "running"}, "1")
    assert not ask(prometheus, "ray_rzen_nonsense")


def test_series_that_need_other_machines_are_in_rays_source() -> None:
    import ray

    package = Path(ray.__file__).parent
    source = "".join(
        (package / path).read_text()
        for path in ("dashboard/modules/reporter/reporter_agent.py", "autoscaler/_private/prom_metrics.py")
    )
    for name in NOT_ON_THIS_MACHINE:
        assert f'"{re.sub("^(ray|autoscaler)_", "", name)}"' in source
