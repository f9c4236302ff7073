"""Job of kind `serve`: starts the server on Ray, prints how to ask it, and ends it on Ctrl-C."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.runtime.cluster import ray_cluster
from jobs.runtime.inputs import errors_of
from jobs.runtime.progress import say
from jobs.serving.pairs import read_pair
from jobs.serving.specs import ServeSpec
from pipelines.errors import UserError
from pipelines.storage.location import open_store, resolve_endpoint
from rzen.serving.guards import ApiKeys

APP = "rzen"
_PLACE = ("registry", "model", "adapter", "adapters", "corpus", "reranker", "endpoint", "dtype", "dimensions")
_CLASS = re.compile(r"^(?:ray::\S+ )?(?:\w+\.)*UserError: ")
"""What Python puts before the message of an error that its user can fix."""
_POLL_S = 0.2
_START_S = 900.0
_WATCH_S = 2.0


def run(spec: ServeSpec) -> dict[str, Any]:
    """Start the server or change the one that runs. Return at once with `detach`, else when it is interrupted."""
    keys = ApiKeys(spec.api_keys)  # a mistake in the file is reported here
    if spec.registry is not None and not spec.registry.startswith("$"):
        with errors_of("registry", spec.registry):
            read_pair(open_store(spec.registry, spec.endpoint))
    if spec.detach and not os.environ.get("RAY_ADDRESS"):
        raise UserError("detach", "needs a cluster that stays", "set RAY_ADDRESS, or leave detach out")
    try:
        import ray.serve
    except ImportError as error:
        raise UserError("serve", f"Ray Serve cannot be imported: {error}", "pip install 'rzen[serve]'") from error
    with ray_cluster():
        say(f"  loading {spec.model or spec.registry}")
        url = deploy(spec)
        _print_usage(spec, url, keys.are_needed)
        if spec.detach:
            return {"outputs": [], "url": url}
        try:
            _wait()
        except KeyboardInterrupt:
            say("  stopping: requests that have begun are answered")
        finally:
            ray.serve.shutdown()
    return {"outputs": [], "url": url}


def deploy(spec: ServeSpec) -> str:
    """Start the server, or change the running one without a pause. Return its URL when it answers.

    Raises `UserError` if it does not start.
    """
    import ray.serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    config = serve_config(_on_this_machine(spec))
    ray.serve.start(http_options=config["http_options"], logging_config={"log_level": "WARNING"})
    client = _get_global_client()
    # `serve.run` would make a new version of everything. This changes what differs.
    client.deploy_apps(ServeDeploySchema.model_validate(config))
    _wait_until_it_runs()
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(spec.host, spec.host)
    return f"http://{host}:{spec.port}"


def serve_config(spec: ServeSpec) -> dict[str, Any]:
    """Return the config of Ray Serve. The place of the model is apart: it changes without new replicas."""
    settings = spec.model_dump(mode="json", exclude_defaults=True, exclude={"detach", "submit"})
    place = {name: settings.pop(name) for name in _PLACE if name in settings}
    settings["name"] = client_name(spec)
    settings["adapters"] = dict.fromkeys(spec.adapters, "")  # gateways know the names
    application = {
        "name": APP,
        "route_prefix": "/",
        "import_path": "jobs.serving.server:build",
        "args": settings,
        "deployments": [{"name": "ModelReplica", "user_config": place}],
    }
    return {"http_options": {"host": spec.host, "port": spec.port}, "applications": [application]}


def client_name(spec: ServeSpec) -> str:
    """Return the name of the model for clients."""
    return spec.name or (spec.model or "").rstrip("/").rpartition("/")[2] or "rzen"


def _on_this_machine(spec: ServeSpec) -> ServeSpec:
    """Return the spec with absolute paths and the endpoint of this process: replicas may have other folders and
    variables.
    """
    names = ("model", "registry", "adapter", "corpus", "reranker", "api_keys")
    places: dict[str, Any] = {name: _absolute(getattr(spec, name)) for name in names}
    places["adapters"] = {name: _absolute(url) for name, url in spec.adapters.items()}
    if spec.canary is not None:
        places["canary"] = spec.canary.model_copy(update={"held_out": _absolute(spec.canary.held_out)})
    return spec.model_copy(update=places | {"endpoint": resolve_endpoint(spec.endpoint)})


def _absolute(url: str | None) -> str | None:
    return str(Path(url).expanduser().absolute()) if url and Path(url).expanduser().exists() else url


def _wait_until_it_runs() -> None:
    from ray import serve
    from ray.serve.schema import ApplicationStatus

    deadline_s = time.monotonic() + _START_S
    while time.monotonic() < deadline_s:
        app = serve.status().applications.get(APP)
        if app is not None and app.status == ApplicationStatus.RUNNING:
            return
        if app is not None and app.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            raise UserError("serve", f"the server did not start: {_reason(app)}", "fix it and start it again")
        time.sleep(_POLL_S)
    raise UserError("serve", f"the server did not start in {_START_S:g} s", "see the logs of Ray Serve")


def _reason(app: Any) -> str:
    """Return why an application of Ray Serve did not start, by its deployments first."""
    return plain_reason([deployment.message for deployment in app.deployments.values()] + [app.message])


def plain_reason(messages: Sequence[str]) -> str:
    """Return the last line of messages that names an error, else the last line that says something."""
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return _CLASS.sub("", (errors or lines or ["no reason is known"])[-1])


def _wait() -> None:
    while True:
        time.sleep(_WATCH_S)


def _print_usage(spec: ServeSpec, url: str, needs_key: bool) -> None:
    key = ' -H "Authorization: Bearer $KEY"' if needs_key else ""
    say(f"  {url} answers as {client_name(spec)}; Ctrl-C ends it")
    say(f"""  curl {url}/v1/embeddings{key} -H "Content-Type: application/json" -d '{{"input": "a red square"}}'""")
    if spec.corpus or spec.registry:
        query = '{"query": "a red square", "top_k": 3}'
        say(f"""  curl {url}/v1/search{key} -H "Content-Type: application/json" -d '{query}'""")
