"""The `ray up` file: by Ray's own schema and code, and as Ray hands it to EC2."""

from __future__ import annotations

import copy
import re
import shlex

import boto3
import pytest
import yaml
from botocore.exceptions import ParamValidationError
from botocore.validate import validate_parameters
from jsonschema import ValidationError
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from tests.unit.manifests import KUBERAY, ROOT, documents, leaves, pods

PATH = ROOT / "cluster" / "aws" / "ray-up.yaml"


@pytest.fixture
def config() -> dict:
    return yaml.safe_load(PATH.read_text())


@pytest.fixture
def aws(monkeypatch, tmp_path):
    """An empty account, and a home folder for the key pair that Ray makes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with mock_aws():
        yield


def prepared(config: dict) -> dict:
    """The configuration with Ray's defaults filled in, as `ray up` validates it."""
    full = prepare_config(copy.deepcopy(config))
    validate_config(full)
    return full


def launch_parameters(node: dict) -> dict:
    """What Ray's provider calls EC2's RunInstances with for a node type."""
    parameters = {k: v for k, v in node["node_config"].items() if k != "SubnetIds"}
    return parameters | {"MinCount": 1, "MaxCount": 1}


def validate_launch(node: dict) -> bool:
    """Raise `ParamValidationError` for what EC2 would refuse."""
    shape = boto3.client("ec2", "us-west-2").meta.service_model.operation_model("RunInstances")
    validate_parameters(launch_parameters(node), shape.input_shape)
    return True


def test_ray_accepts_it(config):
    full = prepared(config)
    assert full["available_node_types"].keys() == config["available_node_types"].keys()
    assert full["head_node_type"] == config["head_node_type"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("max_worker", 8),
        ("idle_timeout_minutes", "10"),
        ("docker/run_option", []),
        ("auth/ssh_username", "ubuntu"),
        ("available_node_types/gpu/min_workers", "0"),
        ("available_node_types/gpu/min_worker", 0),
        ("head_start_ray_commands", "ray start --head"),
    ],
)
def test_ray_refuses_misspelt_and_mistyped_fields(config, path, value):
    *way, last = path.split("/")
    place = config
    for part in way:
        place = place[part]
    place[last] = value
    with pytest.raises(ValidationError):
        prepared(config)


def test_ray_refuses_a_head_that_is_not_there(config):
    config["head_node_type"] = "headd"
    with pytest.raises(ValueError, match="head_node_type"):
        prepared(config)


def test_ec2_knows_every_field_of_every_node(config):
    known = {name for name, node in config["available_node_types"].items() if validate_launch(node)}
    assert known == set(config["available_node_types"])


@pytest.mark.parametrize("change", [{"InstanceTyp": "g6.4xlarge"}, {"MetadataOptions": "required"}])
def test_misspelt_and_mistyped_fields_of_a_node_are_refused(config, change):
    node = config["available_node_types"]["gpu"]
    node["node_config"] |= change
    with pytest.raises(ParamValidationError):
        validate_launch(node)


def test_nothing_but_ssh_is_open_to_the_world(config, aws):
    full = bootstrap_aws(prepared(config))
    groups = {
        group
        for node in full["available_node_types"].values()
        for group in node["node_config"]["SecurityGroupIds"]
    }
    (group,) = groups
    rules = boto3.resource("ec2", "us-west-2").SecurityGroup(group).ip_permissions
    world = [rule for rule in rules if rule["IpRanges"] or rule.get("Ipv6Ranges")]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in world] == [(22, 22)]
    inside = [pair["GroupId"] for rule in rules for pair in rule["UserIdGroupPairs"]]
    assert inside == [group]


def test_roles_are_the_ones_named_and_ray_makes_none(config, aws):
    full = bootstrap_aws(prepared(config))
    assert boto3.client("iam").list_roles()["Roles"] == []
    profiles = {
        name: node["node_config"]["IamInstanceProfile"]["Arn"].rpartition("/")[2]
        for name, node in full["available_node_types"].items()
    }
    assert profiles == {"head": "reid-head", "gpu": "reid-worker", "gpu-spot": "reid-worker"}


def test_spot_workers_are_the_on_demand_workers_at_another_price(config):
    types = config["available_node_types"]
    spot = copy.deepcopy(types["gpu-spot"])
    assert spot["node_config"].pop("InstanceMarketOptions") == {"MarketType": "spot"}
    assert spot == types["gpu"]
    assert "InstanceMarketOptions" not in types["head"]["node_config"]


def test_nodes_run_the_image_and_install_nothing_over_it(config):
    (head, *_) = [pod for d in documents(KUBERAY / "raycluster.yaml") for pod in pods(d).values()]
    assert config["docker"]["image"] == head["containers"][0]["image"]
    full = prepared(config)
    commands = [
        command
        for key in ("setup_commands", "head_setup_commands", "worker_setup_commands")
        for command in full[key]
    ]
    assert commands == []


@pytest.mark.parametrize("key", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_ray_start_understands_its_flags_and_requires_a_token(config, key):
    command = config[key][-1].rpartition("; ")[2].replace("$RAY_HEAD_IP", "10.0.0.1")
    mode, ray, verb, *flags = shlex.split(command)
    assert (mode, ray, verb) == ("RAY_AUTH_MODE=token", "ray", "start")
    with start.make_context("ray start", flags) as context:
        assert context.params["head"] == ("head" in key)
        assert context.params["metrics_export_port"] == 8080
        if context.params["head"]:
            assert context.params["dashboard_host"] == "127.0.0.1"
    tokens = [target for target in config["file_mounts"] if target.endswith("/.ray/auth_token")]
    assert tokens == ["/home/reid/.ray/auth_token"]


def test_the_cache_is_a_folder_of_the_node_that_the_user_may_write(config):
    (volume,) = (o.split()[1] for o in config["docker"]["run_options"] if "--volume" in o)
    folder, _, inside = volume.partition(":")
    assert inside == "/cache"
    assert f"install -d -o 1000 -g 1000 {folder}" in " ".join(config["initialization_commands"])


def test_no_secret_is_written_down(config):
    for path, value in leaves(config):
        assert not re.search(r"AKIA[0-9A-Z]{16}|://[^/\s]+:[^/\s]+@", str(value)), path
        assert not re.search(r"(?i)secret|password|ACCESS_KEY", str(value)), path
    assert "aws_credentials" not in config["provider"]
