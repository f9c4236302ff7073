"""Drains a spot node when the cloud announces that it takes the machine back. Ray does not poll these notices itself.

    python spot_watch.py aws | gcp

aws.yaml and gcp.yaml start it next to Ray on spot nodes. It uses the standard library only. A drained node gets no new
work. Training writes a checkpoint and resumes on other nodes. tests/infra/test_spot_watch.py runs this program against
both clouds' metadata services as documented. On Kubernetes the preStop hook of the pods does the same.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable

AWS = "http://169.254.169.254"
GCP = "http://metadata.google.internal"
_TIMEOUT_S = 2
_MARGIN_S = 10  # between the end that Ray learns and the real one
_GCP_NOTICE_S = 30  # Google says only that the end is near


def main() -> int:
    """Wait for a notice, drain the node, and end."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cloud", choices=["aws", "gcp"])
    parser.add_argument("--metadata", help="URL of the metadata service")
    parser.add_argument("--poll-s", type=float, default=5.0)
    options = parser.parse_args()
    notice: Callable[[str], float | None] = {"aws": aws_notice, "gcp": gcp_notice}[options.cloud]
    url = options.metadata or {"aws": AWS, "gcp": GCP}[options.cloud]
    while True:
        left_s = _asked(notice, url)
        if left_s is not None and drain(max(0, int(left_s) - _MARGIN_S)):
            return 0
        time.sleep(options.poll_s)


def _asked(notice: Callable[[str], float | None], url: str) -> float | None:
    try:
        return notice(url)
    except OSError as error:  # a metadata service may be late or limit its answers; the next try is near
        logging.warning("%s: %s", url, error)
        return None


def aws_notice(url: str) -> float | None:
    """Return the seconds until EC2 ends this instance, None without a notice. Uses IMDSv2: each call needs a token."""
    token = _get(f"{url}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, method="PUT")
    try:
        text = _get(f"{url}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    except urllib.error.HTTPError as error:
        if error.code == 404:  # there is no notice
            return None
        raise
    end = datetime.datetime.fromisoformat(json.loads(text)["time"])
    return (end - datetime.datetime.now(datetime.UTC)).total_seconds()


def gcp_notice(url: str) -> float | None:
    """Return the least seconds until Google ends this instance, None without a notice."""
    text = _get(f"{url}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return _GCP_NOTICE_S if text.strip() == "TRUE" else None


def _get(url: str, headers: dict[str, str], method: str = "GET") -> str:
    request = urllib.request.Request(url, headers=headers, method=method)
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
        content: bytes = answer.read()
    return content.decode()


def drain(left_s: int) -> bool:
    """Drain this node. Return False if Ray did not accept."""
    command = ["ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "spot notice", "--deadline-remaining-seconds", str(left_s)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    logging.info("%s: %s %s", " ".join(command), done.returncode, (done.stdout + done.stderr).strip()[-500:])
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
