"""One run of retraining on Kubernetes: starts a copy of a suspended RayJob and waits for its end.

cronjob.yaml runs it, with the standard library only. tests/infra/test_retrain_run.py runs it against an API server.

* The copy has the name of the run's Job. A repeated run finds it and does not start a second one. The copy belongs to
  that Job, so Kubernetes deletes both together.
* The Lease of the template's name says which run is the current one, and which RayJob it has started. No run starts
  while the RayJob of another one is at work. A RayJob that was deleted is not made again by the same run.
* An API server that does not answer is asked again until the deadline. At the deadline, the run deletes its RayJob.

Exit status: 0 if the retraining succeeded, `FAILED` if it did not. Pods that end with another one are replaced.
"""

from __future__ import annotations

import datetime
import http.client
import itertools
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
DEADLINE_S = float(os.environ.get("DEADLINE_S", "264000"))
"""After so long a RayJob is deleted, counted from its creation."""
START_S = float(os.environ.get("START_S", "7200"))
"""After so long, a RayJob that no operator has looked at is deleted."""
TIMEOUT_S = float(os.environ.get("TIMEOUT_S", "30"))
"""Limit of one request."""
FAILED = 3
ENDED = ("Complete", "Failed", "ValidationFailed")
"""Every state of a RayJob's deployment that KubeRay 1.7 never leaves."""
UNDER_WAY = ("", "Initializing", "Waiting", "Running", "Retrying", "Suspending", "Suspended")

_RAYJOBS = "ray.io/v1", "rayjobs"
_LEASES = "coordination.k8s.io/v1", "leases"
_UID = "rzen/rayjob-uid"
_RETRIED = (429, 500, 502, 503, 504)
_TOKENS = 5  # times that a refused token is read again: Kubernetes replaces it every hour
_FIXES = {
    401: "the API server refuses the token of the service account: look at its pod's mounts",
    403: "the service account may not do this: apply the Role rzen-retrain-run again",
}


class Failure(Exception):
    """Ends the run. A replacement of its pod would end in the same way."""


class Missing(Exception):
    """There is no such object."""


class Conflict(Exception):
    """There is one by this name already, or it was changed since it was read."""


def main(template: str) -> int:
    """Start a copy of RayJob `template`, once for each run, and wait for its end."""
    name = os.environ["JOB_NAME"]
    try:
        started = _take_lease(template, name)
        job = _start(template, name, started)
        return _wait(name, job["metadata"])
    except Failure as failure:
        logging.error("%s: %s", name, failure)
        return FAILED


def _take_lease(template: str, name: str) -> str | None:
    """Become the current run. Return the UID of the RayJob that this run has started before, None if it has not."""
    while True:
        lease = _find(_LEASES, template)
        try:
            if lease is None:
                _call("POST", _LEASES, body=_lease(template, name))
                return None
            holder = lease["spec"].get("holderIdentity")
            if holder == name:
                started: str | None = lease["metadata"].get("annotations", {}).get(_UID)
                return started
            other = _find(_RAYJOBS, holder) if holder else None
            if other is not None and _state(other) not in ENDED:
                problem = f"the RayJob of an earlier run, {holder}, is not at its end ({_state(other) or 'new'})"
                raise Failure(f"{problem}; wait for it, or kubectl delete rayjob {holder}")
            _call("PUT", _LEASES, template, _lease(template, name, lease["metadata"]["resourceVersion"]))
            return None
        except Conflict:
            logging.info("the Lease %s has changed; reading it again", template)
            time.sleep(POLL_S)


def _lease(template: str, name: str, version: str | None = None, uid: str | None = None) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": template}
    if version is not None:
        metadata["resourceVersion"] = version
    if uid is not None:
        metadata["annotations"] = {_UID: uid}
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": metadata,
        "spec": {"holderIdentity": name},
    }


def _start(template: str, name: str, started: str | None) -> dict[str, Any]:
    """Return the RayJob of this run, which this call or an earlier one has made."""
    job = _find(_RAYJOBS, name)
    if started is not None:
        if job is None or job["metadata"]["uid"] != started:
            raise Failure(
                "the RayJob of this run was deleted, and is not started again; the next run resumes its training"
            )
        logging.info("%s was started before", name)
        return job
    if job is None:
        job = _create(template, name)
    uid = job["metadata"]["uid"]
    if job["metadata"]["ownerReferences"][0]["uid"] != os.environ["JOB_UID"]:
        raise Failure(f"there is a RayJob {name} of another Job; delete it")
    while True:
        lease = _find(_LEASES, template)
        holder = lease["spec"].get("holderIdentity") if lease else None
        if lease is None or holder != name:
            _delete(name, uid)
            raise Failure(f"another run ({holder}) has started at the same time; the RayJob of this one is deleted")
        try:
            _call("PUT", _LEASES, template, _lease(template, name, lease["metadata"]["resourceVersion"], uid))
            return job
        except Conflict:
            logging.info("the Lease %s has changed; reading it again", template)


def _create(template: str, name: str) -> dict[str, Any]:
    if (suspended := _find(_RAYJOBS, template)) is None:
        raise Failure(f"there is no RayJob {template} to copy; apply infra/kuberay/retrain")
    spec = suspended["spec"] | {"suspend": False}
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": os.environ["JOB_UID"]}
    metadata = {"name": name, "labels": {"rzen/template": template}, "ownerReferences": [owner]}
    body = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}
    try:
        job = _call("POST", _RAYJOBS, body=body)
        logging.info("started %s", name)
        return job
    except Conflict:  # an earlier attempt has made it, and its answer was lost
        logging.info("%s was started before", name)
    if (made := _find(_RAYJOBS, name)) is None:
        raise Failure("the RayJob of this run was deleted, and is not started again")
    return made


def _wait(name: str, metadata: dict[str, Any]) -> int:
    uid = metadata["uid"]
    created_s = datetime.datetime.fromisoformat(metadata["creationTimestamp"]).timestamp()
    seen = None
    while True:
        job = _find(_RAYJOBS, name, until_s=created_s + DEADLINE_S)
        if job is None or job["metadata"]["uid"] != uid:
            raise Failure("its RayJob was deleted before its end, and is not started again")
        state, status = _state(job), job.get("status", {})
        if state in ENDED:
            result = status.get("jobStatus") or "FAILED"
            logging.info("%s %s, %s: %s", name, state, result, status.get("message") or status.get("reason") or "")
            return 0 if state == "Complete" and result == "SUCCEEDED" else FAILED
        if state != seen:
            note = "" if state in UNDER_WAY else ", a state that this program does not know; waiting for an end"
            logging.info("%s %s%s", name, state or "new", note)
            seen = state
        age_s = time.time() - created_s
        if age_s > DEADLINE_S:
            _delete(name, uid)
            raise Failure(f"not at its end after {DEADLINE_S:.0f} s ({state}); its RayJob is deleted")
        if not state and age_s > START_S:
            _delete(name, uid)
            raise Failure(f"no KubeRay operator has looked at its RayJob in {START_S:.0f} s; the RayJob is deleted")
        time.sleep(POLL_S)


def _delete(name: str, uid: str) -> None:
    """Delete the RayJob. The operator stops its Ray job, which saves a checkpoint, and deletes its nodes."""
    options = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": uid}}
    try:
        _call("DELETE", _RAYJOBS, name, options, until_s=time.time() + 600)
    except (Missing, Conflict):
        logging.info("%s is gone already", name)


def _state(job: dict[str, Any]) -> str:
    state: str = job.get("status", {}).get("jobDeploymentStatus", "")
    return state


def _find(kind: tuple[str, str], name: str, until_s: float | None = None) -> dict[str, Any] | None:
    try:
        return _call("GET", kind, name, until_s=until_s)
    except Missing:
        return None


def _call(
    method: str,
    kind: tuple[str, str],
    name: str = "",
    body: dict[str, Any] | None = None,
    until_s: float | None = None,
) -> dict[str, Any]:
    """Call the API for one object of this namespace, until it answers. Return the answer.

    Raise `Missing`, `Conflict`, or `Failure` for what no repetition changes, or when the time `until_s` has passed.
    """
    what = f"{method} {kind[1]} {name}".rstrip()
    until_s = time.time() + DEADLINE_S if until_s is None else until_s
    pause_s, told = POLL_S / 8, ""
    for attempt in itertools.count(1):
        wait_s = 0.0
        try:
            answer = _send(method, kind, name, body)
            if told:
                logging.info("%s: the API server answers again, at attempt %d", what, attempt)
            return answer
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise Missing(what) from None
            if error.code == 409:
                raise Conflict(what) from None
            problem = f"{error.code} {_message(error)}"
            if not (error.code in _RETRIED or (error.code == 401 and attempt <= _TOKENS)):
                fix = _FIXES.get(error.code, "no repetition will change this")
                raise Failure(f"{what}: {problem}; {fix}") from None
            after = error.headers.get("Retry-After", "")
            wait_s = float(after) if after.isdigit() else 0.0
        except (OSError, http.client.HTTPException, ValueError) as error:  # refused, reset, timed out, cut off
            problem = f"{type(error).__name__}: {error}"
        if time.time() > until_s:
            raise Failure(f"{what}: no answer by the deadline ({problem}); look after the RayJob yourself")
        if problem != told:
            logging.warning("%s: %s; trying again", what, problem)
            told = problem
        time.sleep(max(pause_s, min(wait_s, 2 * POLL_S)))
        pause_s = min(2 * pause_s, 2 * POLL_S)
    raise AssertionError("unreachable")


def _send(method: str, kind: tuple[str, str], name: str, body: dict[str, Any] | None) -> dict[str, Any]:
    server = f"https://{os.environ['KUBERNETES_SERVICE_HOST']}:{os.environ['KUBERNETES_SERVICE_PORT']}"
    try:
        # Read the token each time, because Kubernetes changes it every hour.
        namespace, token = (ACCOUNT / "namespace").read_text(), (ACCOUNT / "token").read_text()
    except OSError as error:
        raise Failure(f"no token of a service account: {error}") from None
    request = urllib.request.Request(
        f"{server}/apis/{kind[0]}/namespaces/{namespace}/{kind[1]}/{name}".rstrip("/"),
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
    )
    trust = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
    with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=trust) as answer:
        content: dict[str, Any] = json.load(answer)
        return content


def _message(error: urllib.error.HTTPError) -> str:
    """Return what the API server says about an error."""
    try:
        return str(json.load(error)["message"])
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return str(error.reason)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    sys.exit(main(sys.argv[1]))
