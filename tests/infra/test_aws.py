"""aws.yaml bootstrapped and launched by Ray's own provider on moto's EC2, and what came out of it."""

import copy
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from botocore.exceptions import ClientError
from moto import mock_aws

from tests.paths import ROOT

FOLDER = ROOT / "infra" / "cluster"
REGION = "us-west-2"
Config = dict[str, Any]
PROFILES = {"rzen-head": ("launcher", "driver", "promoter"), "rzen-worker": ("worker",), "rzen-reader": ("reader",)}


def policy(name: str) -> str:
    return (FOLDER / "iam" / f"{name}.json").read_text().replace("BUCKET", "bucket").replace("ACCOUNT", "123456789012")


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Config]:
    """The file with its blanks filled in for an account that has what its header asks for."""
    for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MOTO_EC2_LOAD_DEFAULT_AMIS", "false")  # seconds for each test
    from ray.autoscaler._private.aws import config as bootstrapping
    from ray.autoscaler._private.aws import utils

    utils.resource_cache.cache_clear()  # clients of an earlier test talk to an account that is no more
    bootstrapping._get_subnets_or_die.cache_clear()
    with mock_aws():
        ec2, iam = boto3.resource("ec2", REGION), boto3.client("iam", REGION)
        vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")
        subnet = vpc.create_subnet(CidrBlock="10.0.0.0/20", AvailabilityZone=f"{REGION}a")
        group = vpc.create_security_group(GroupName="rzen", Description="nodes among themselves")
        group.authorize_ingress(IpPermissions=[{"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group.id}]}])
        ec2.create_key_pair(KeyName="rzen")
        principal = {"Service": "ec2.amazonaws.com"}
        trust = {"Statement": {"Effect": "Allow", "Principal": principal, "Action": "sts:AssumeRole"}}
        for profile, policies in PROFILES.items():
            iam.create_role(RoleName=profile, AssumeRolePolicyDocument=json.dumps(trust))
            for name in policies:
                iam.put_role_policy(RoleName=profile, PolicyName=name, PolicyDocument=policy(name))
            iam.create_instance_profile(InstanceProfileName=profile)
            iam.add_role_to_instance_profile(InstanceProfileName=profile, RoleName=profile)
        image = boto3.client("ec2", REGION).register_image(Name="nodes", RootDeviceName="/dev/sda1")["ImageId"]
        text = (FOLDER / "aws.yaml").read_text()
        for blank, value in (("ami-FILL-IN", image), ("sg-FILL-IN", group.id), ("subnet-FILL-IN", subnet.id)):
            assert blank in text
            text = text.replace(blank, value)
        (tmp_path / ".ssh").mkdir()
        (tmp_path / ".ssh" / "rzen.pem").write_text("key")
        yield yaml.safe_load(text)


def launch(config: Config) -> dict[str, Config]:
    """One instance of every node type, by Ray's bootstrap and provider: node type -> as EC2 describes it."""
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    ready = bootstrap_aws(prepared)
    provider = AWSNodeProvider(ready["provider"], ready["cluster_name"])
    for name, node_type in ready["available_node_types"].items():
        head_only = ready["head_node"] if name == ready["head_node_type"] else {}
        tags = {"ray-user-node-type": name, "ray-node-name": name}
        provider.create_node(head_only | node_type["node_config"], tags, 1)
    found = boto3.client("ec2", REGION).describe_instances()["Reservations"]
    instances = [instance for reservation in found for instance in reservation["Instances"]]
    return {
        tag["Value"]: instance
        for instance in instances
        for tag in instance["Tags"]
        if tag["Key"] == "ray-user-node-type"
    }


def problems(instances: dict[str, Config]) -> list[str]:
    """What we do not want to have launched."""
    found = []
    groups = boto3.client("ec2", REGION).describe_security_groups()["SecurityGroups"]
    open_groups = {
        group["GroupId"]
        for group in groups
        for permission in group["IpPermissions"]
        if any(block["CidrIp"] == "0.0.0.0/0" for block in permission["IpRanges"])
    }
    for name, instance in instances.items():
        profile = instance.get("IamInstanceProfile", {}).get("Arn", "").rpartition("/")[2]
        if profile != ("rzen-head" if name == "head" else "rzen-worker"):
            found.append(f"{name}: has the profile {profile or 'of nobody'}")
        if open_groups & {group["GroupId"] for group in instance["SecurityGroups"]}:
            found.append(f"{name}: is open to everyone")
        if instance["MetadataOptions"]["HttpTokens"] != "required":
            found.append(f"{name}: gives its credentials without a token")
        if (instance.get("InstanceLifecycle") == "spot") != (name in ("decode", "train-spot")):
            found.append(f"{name}: spot and on-demand confused")
    return found


def test_what_ray_launches_is_closed_and_has_the_right_profiles(config: Config) -> None:
    instances = launch(config)
    assert set(instances) == {"head", "decode", "train-spot", "train"}
    assert problems(instances) == []
    for instance in instances.values():
        assert instance["ImageId"] == config["available_node_types"]["head"]["node_config"]["ImageId"]
        (disk,) = [disk["Ebs"] for disk in instance["BlockDeviceMappings"] if disk["DeviceName"] == "/dev/sda1"]
        assert disk["DeleteOnTermination"]
    volumes = boto3.client("ec2", REGION).describe_volumes()["Volumes"]
    assert all(volume["Encrypted"] for volume in volumes)


@pytest.mark.parametrize(
    ("node_type", "field", "told"),
    [
        ("decode", "SecurityGroupIds", "decode: is open to everyone"),
        ("train", "IamInstanceProfile", "train: has the profile of nobody"),
        ("train-spot", "MetadataOptions", "train-spot: gives its credentials without a token"),
        ("train-spot", "InstanceMarketOptions", "train-spot: spot and on-demand confused"),
    ],
)
def test_left_out_fields_show_in_what_is_launched(config: Config, node_type: str, field: str, told: str) -> None:
    """Each of Ray's defaults that the file closes is open without the line that closes it."""
    del config["available_node_types"][node_type]["node_config"][field]
    assert problems(launch(config)) == [told]


def test_a_head_without_a_profile_would_get_rays_own(config: Config) -> None:
    iam = boto3.client("iam", REGION)
    iam.create_instance_profile(InstanceProfileName="ray-autoscaler-v1")  # with all of EC2 and S3, where Ray makes it
    iam.add_role_to_instance_profile(InstanceProfileName="ray-autoscaler-v1", RoleName="rzen-head")
    del config["available_node_types"]["head"]["node_config"]["IamInstanceProfile"]
    assert problems(launch(config)) == ["head: has the profile ray-autoscaler-v1"]


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_commands_replace_rays_defaults(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text()
    content = yaml.safe_load(text)
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(content))
    validate_config(prepared)
    commands = [command for key, value in prepared.items() if key.endswith("_commands") for command in value]
    assert not [command for command in commands if "ray-wheels" in command or "0.0.0.0" in command]
    assert not [command for command in commands if re.search(r"pip install .*(>=|-U|--upgrade)", command)]
    (start,) = [command for command in prepared["head_start_ray_commands"] if "--head" in command]
    assert "--dashboard-host=127.0.0.1" in start
    assert "--num-cpus=0" in start
    assert "--env RAY_AUTH_MODE=token" in prepared["docker"]["run_options"]
    assert prepared["file_mounts"]["/home/rzen/.ray/auth_token"] == "~/.ray/auth_token"
    watcher = prepared["file_mounts"]["/home/rzen/spot_watch.py"]
    assert (ROOT / watcher).is_file()
    assert any(f"spot_watch.py {name} " in command for command in prepared["worker_start_ray_commands"])
    images = re.findall(r"REGISTRY/(\S+?):([^\s\"}]+)", text)
    assert {image for image, _ in images} == {"rzen-cpu", "rzen-gpu"}
    assert {tag for _, tag in images} == {"0.1.0"}
    for node_name, node_type in content["available_node_types"].items():
        assert node_type.get("min_workers", 0) == 0
        if node_name != "head":
            assert node_type["resources"]["CPU"] > 0


BOTH = ("rzen-head", "rzen-worker")
HEAD = ("rzen-head",)
PLACES = {
    "rzen/data/train/a.tar": (BOTH, BOTH),
    "rzen/runs/stage1/latest.json": (BOTH, BOTH),
    "rzen/vectors/0.parquet": (BOTH, BOTH),
    "rzen/model/config.json": (HEAD, HEAD),
    "rzen/registry/champion.json": (HEAD, ()),
    "rzen/registry/models/a/lineage.json": (HEAD, ()),
    "rzen/registry/work/a/adapter": (HEAD, HEAD),
    "rzen/registry/lease.json": (HEAD, HEAD),
    # Vectors of a model that is being scored, by the workers that make them.
    "rzen/registry/scores/a/scores/unfinished/0.npy": (BOTH, BOTH),
    "rzen/registry/scores/a/scores/b.json": (HEAD, ()),
    # A corpus and an export, which belong to a promotion. Its vectors are made by workers.
    "rzen/registry/corpora/a/unfinished/0.npy": (BOTH, BOTH),
    "rzen/registry/corpora/a/listings/0.parquet": (BOTH, BOTH),
    "rzen/registry/corpora/a/vectors.json": (HEAD, HEAD),
    "rzen/registry/exports/a/config.json": (HEAD, HEAD),
    "rzen/vector-cache/0.npy": (BOTH, BOTH),
    "other/secret": ((), ()),
}
"""Key -> who may write it, and who may delete it."""


@pytest.mark.parametrize("profile", PROFILES)
def test_policies_let_workers_write_runs_and_never_the_registry(config: Config, profile: str) -> None:
    from moto.core import set_initial_no_auth_action_count

    boto3.client("s3", REGION).create_bucket(Bucket="bucket", CreateBucketConfiguration={"LocationConstraint": REGION})
    iam = boto3.client("iam", REGION)
    iam.create_user(UserName=profile)
    for name in PROFILES[profile]:
        iam.put_user_policy(UserName=profile, PolicyName=name, PolicyDocument=policy(name))
    key = iam.create_access_key(UserName=profile)["AccessKey"]

    @set_initial_no_auth_action_count(0)
    def allowed() -> dict[str, tuple[bool, bool]]:
        s3 = boto3.client(
            "s3", REGION, aws_access_key_id=key["AccessKeyId"], aws_secret_access_key=key["SecretAccessKey"]
        )
        put, delete = partial(s3.put_object, Body=b""), s3.delete_object
        return {place: (_is_allowed(put, place), _is_allowed(delete, place)) for place in PLACES}

    assert allowed() == {place: (profile in write, profile in delete) for place, (write, delete) in PLACES.items()}


def _is_allowed(action: Callable[..., Any], place: str) -> bool:
    try:
        action(Bucket="bucket", Key=place)
    except ClientError as error:
        if error.response["Error"]["Code"] != "AccessDenied":
            raise
        return False
    return True


def test_the_launcher_ends_its_own_nodes_only_and_passes_one_role() -> None:
    statements = {statement["Sid"]: statement for statement in json.loads(policy("launcher"))["Statement"]}
    assert statements["NoOtherRoleForWorkers"]["Resource"].endswith(":role/rzen-worker")
    assert statements["ItsOwnNodesOnly"]["Condition"] == {"StringEquals": {"aws:ResourceTag/ray-cluster-name": "rzen"}}
    unconditional = [action for some in statements.values() if "Condition" not in some for action in some["Action"]]
    assert sorted(unconditional) == ["ec2:Describe*", "ec2:RunInstances"]
