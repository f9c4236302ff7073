"""The server's metrics from the nodes of the cluster, for `/metrics`."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterable

from rzen.serving.types import RequestError

_OURS = re.compile(r"ray_(?:rzen_serve|serve)_\w+")
_TIMEOUT_S = 3.0


def scrape() -> str:
    """Return the metrics of the server and of Ray Serve, from all nodes, in the text format of Prometheus.

    A node that does not answer is left out. Raises `RequestError` 503 if none answers.
    """
    import ray

    texts = []
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        try:
            with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
                texts.append(answer.read().decode())
        except OSError:
            continue
    if not texts:
        raise RequestError(503, f"no node gave its metrics within {_TIMEOUT_S:g} s", retry_after_s=_TIMEOUT_S)
    return merged(texts)


def merged(texts: Iterable[str]) -> str:
    """Return the server's lines of several texts. A metric has one HELP and one TYPE, and all its samples follow."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for text in texts:
        metric = ""
        for line in text.splitlines():
            if line.startswith("#"):
                _, keyword, metric, *_ = line.split(" ", 3)
                if _OURS.fullmatch(metric):
                    lines = heads.setdefault(metric, [])
                    if not any(known.startswith(f"# {keyword} ") for known in lines):
                        lines.append(line)
            elif metric in heads:
                samples.setdefault(metric, []).append(line)
    return "".join(f"{line}\n" for metric, head in heads.items() for line in (*head, *samples.get(metric, ())))
