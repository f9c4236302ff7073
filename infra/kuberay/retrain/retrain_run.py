"""One run of retraining on Kubernetes: starts a copy of a suspended RayJob and waits for its end.

cronjob.yaml runs it, with the standard library only. tests/infra/test_retrain_run.py runs it against a fake API server.
The copy has the name of the run's Job. A repeated run therefore finds it and does not start a second one. The copy
belongs to that Job, so Kubernetes deletes both together. Exit status: 0 if the run succeeded.
"""

from __future__ import annotations

import json
import logging
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ACCOUNT = Path(os.environ.get("ACCOUNT_DIR", "/var/run/secrets/kubernetes.io/serviceaccount"))
POLL_S = float(os.environ.get("POLL_S", "30"))


def main(template: str) -> int:
    """Start a copy of RayJob `template`, once for each run, and wait for its end."""
    name = os.environ["JOB_NAME"]
    spec = call("GET", template)["spec"] | {"suspend": False}
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": os.environ["JOB_UID"]}
    metadata = {"name": name, "labels": {"rzen/template": template}, "ownerReferences": [owner]}
    try:
        call("POST", "", {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec})
        logging.info("started %s", name)
    except urllib.error.HTTPError as error:
        if error.code != 409:
            raise
        logging.info("%s was started before", name)
    while True:
        status = call("GET", name).get("status", {})
        if status.get("jobDeploymentStatus") in ("Complete", "Failed"):
            logging.info("%s %s: %s", name, status.get("jobStatus", "FAILED"), status.get("message", ""))
            return 0 if status.get("jobStatus") == "SUCCEEDED" else 1
        time.sleep(POLL_S)


def call(method: str, name: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Call the API for the RayJobs of this namespace. Return the answer."""
    server = f"https://{os.environ['KUBERNETES_SERVICE_HOST']}:{os.environ['KUBERNETES_SERVICE_PORT']}"
    namespace = (ACCOUNT / "namespace").read_text()
    # Read the token each time, because Kubernetes changes it every hour.
    request = urllib.request.Request(
        f"{server}/apis/ray.io/v1/namespaces/{namespace}/rayjobs/{name}".rstrip("/"),
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {(ACCOUNT / 'token').read_text()}", "Content-Type": "application/json"},
    )
    trust = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
    with urllib.request.urlopen(request, timeout=30, context=trust) as answer:
        content: dict[str, Any] = json.load(answer)
        return content


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    sys.exit(main(sys.argv[1]))
