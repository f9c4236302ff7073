"""gcp.yaml against the schema of instances in Google's compute API, which google-api-python-client brings along."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.paths import ROOT

FILE = ROOT / "infra" / "cluster" / "gcp.yaml"
Config = dict[str, Any]


@pytest.fixture
def node_configs() -> dict[str, Config]:
    content = yaml.safe_load(FILE.read_text())
    return {name: copy.deepcopy(node["node_config"]) for name, node in content["available_node_types"].items()}


@cache
def instance_schema() -> Config:
    """`Instance` of compute v1 as JSON Schema that refuses unknown fields."""
    client = pytest.importorskip("googleapiclient", reason="google-api-python-client is not installed")
    folder = Path(client.__file__).parent / "discovery_cache" / "documents"
    schemas = json.loads((folder / "compute.v1.json").read_text())["schemas"]
    definitions = {name: _strict(schema) for name, schema in schemas.items()}
    return {"$defs": definitions, "$ref": "#/$defs/Instance"}


def _strict(node: Any) -> Any:
    if isinstance(node, list):
        return [_strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    if isinstance(node.get("$ref"), str):
        return {"$ref": f"#/$defs/{node['$ref']}"}
    if node.get("format") in ("int64", "uint64"):
        return {"type": ["string", "integer"]}  # on the wire a string; the API takes numbers too
    strict = {key: _strict(value) for key, value in node.items() if key in ("type", "items", "enum", "properties")}
    if "properties" in node and isinstance(node.get("type"), str):
        strict["properties"] = {name: _strict(part) for name, part in node["properties"].items()}
        strict["additionalProperties"] = False
    return strict


def schema_problems(instance: Config) -> list[str]:
    """What the API would refuse."""
    validator = jsonschema.Draft202012Validator(instance_schema())
    return [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in validator.iter_errors(instance)
    ]


def problems(nodes: dict[str, Config]) -> list[str]:
    """What we do not want to have launched."""
    found = []
    for name, node in nodes.items():
        account = node.get("serviceAccounts", [{}])[0].get("email", "nobody").partition("@")[0]
        if account != ("rzen-head" if name == "head" else "rzen-worker"):
            found.append(f"{name}: has the account of {account}")
        if any("accessConfigs" in interface for interface in node.get("networkInterfaces", [{"accessConfigs": []}])):
            found.append(f"{name}: has a public address")
        is_spot = node.get("scheduling", {}).get("provisioningModel") == "SPOT"
        if is_spot != (name in ("decode", "train-spot")):
            found.append(f"{name}: spot and on-demand confused")
    return found


def test_nodes_fit_the_schema(node_configs: dict[str, Config]) -> None:
    for name, node in node_configs.items():
        assert schema_problems(node) == [], name


def test_the_schema_finds_planted_faults(node_configs: dict[str, Config]) -> None:
    node = node_configs["train-spot"]
    for change, told in (
        ({"scheduling": [{"preemptible": True}]}, "scheduling"),  # as in Ray's own example
        ({"scheduling": {"provisioningModel": "SPOTS"}}, "provisioningModel"),
        ({"machine_type": "a2-ultragpu-8g"}, "machine_type"),
        ({"disks": {"boot": True}}, "disks"),
        ({"shieldedInstanceConfig": {"enableSecureBoot": "yes"}}, "enableSecureBoot"),
    ):
        assert told in "\n".join(schema_problems(node | change))


def test_nodes_are_closed_and_have_their_accounts(node_configs: dict[str, Config]) -> None:
    assert problems(node_configs) == []
    del node_configs["decode"]["networkInterfaces"]
    del node_configs["train"]["serviceAccounts"]
    del node_configs["train-spot"]["scheduling"]
    assert problems(node_configs) == [
        "decode: has a public address",
        "train-spot: spot and on-demand confused",
        "train: has the account of nobody",
    ]
