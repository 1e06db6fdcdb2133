"""The KubeRay manifests: valid for the published API, consistent with each other and the code."""

from __future__ import annotations

import copy
import importlib
import re
import shlex

import pytest
import ray
import tyro
import yaml
from ray._private import ray_constants
from ray.dashboard import http_server_agent
from ray.scripts.scripts import start
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema

from cluster.serve.app import read_settings
from cluster.serve.settings import TOKEN
from data_shards.errors import ConfigError
from reid_train.cli import Train
from reid_train.recipes import recipe
from tests.unit.manifests import (
    KUBERAY,
    ROOT,
    cluster_spec,
    documents,
    leaves,
    pods,
    problems,
    quantity,
)

FILES = sorted(KUBERAY.glob("*.yaml"))
ALL = [document for path in FILES for document in documents(path)]
KINDS = ("RayCluster", "RayJob", "RayService")
CLUSTERS = [next(document for document in ALL if document["kind"] == kind) for kind in KINDS]
CLUSTER, JOB, SERVICE = CLUSTERS
BY_KIND = {document["kind"]: document for document in ALL}
PODS = [
    pytest.param(pod, id=f"{document['kind']}-{name}")
    for document in CLUSTERS
    for name, pod in pods(document).items()
]
GROUPS = [
    pytest.param(group, id=f"{document['kind']}-{group['groupName']}")
    for document in CLUSTERS
    for group in cluster_spec(document)["workerGroupSpecs"]
]


@pytest.mark.parametrize("document", [pytest.param(d, id=f"{d['kind']}") for d in ALL])
def test_every_field_is_one_that_the_api_knows(document):
    assert problems(document) == []


def planted(path: str, value: object, kind: str = "RayCluster") -> list[str]:
    """What is found wrong in a good manifest after one change to it."""
    document = copy.deepcopy(BY_KIND[kind])
    *way, last = path.split("/")
    place = document
    for part in way:
        place = place[int(part) if isinstance(place, list) else part]
    place[last] = value
    return problems(document)


@pytest.mark.parametrize(
    ("path", "value", "kind"),
    [
        ("spec/enableInTreeAutoscalling", True, "RayCluster"),
        ("spec/autoscalerOptions/idleTimeoutSecond", 60, "RayCluster"),
        ("spec/authOptions/mode", "tokens", "RayCluster"),
        ("spec/gcsFaultToleranceOptions/redisAdress", "redis:6379", "RayCluster"),
        ("spec/headGroupSpec/serviceTyp", "ClusterIP", "RayCluster"),
        ("spec/headGroupSpec/rayStartParams/num-cpus", 0, "RayCluster"),
        ("spec/headGroupSpec/template/spec/serviceAcountName", "reid", "RayCluster"),
        ("spec/headGroupSpec/template/spec/containers/0/livenesProbe", {}, "RayCluster"),
        ("spec/headGroupSpec/template/spec/containers/0/resources/limit", {}, "RayCluster"),
        ("spec/workerGroupSpecs/0/maxReplicas", "8", "RayCluster"),
        ("spec/workerGroupSpecs/0/template/spec/volumes/0/emptyDir/sizelimit", "1Gi", "RayCluster"),
        ("spec/workerGroupSpecs/0/template/spec/tolerations/0/key", 1, "RayCluster"),
        ("spec/entryPoint", "python", "RayJob"),
        ("spec/submissionMode", "HTTP", "RayJob"),
        ("spec/rayClusterSpec/rayversion", "2.60.0", "RayJob"),
        ("spec/serveConfig", "", "RayService"),
        ("spec/upgradeStrategy/type", "Rolling", "RayService"),
        ("spec/rayClusterConfig/headGroupSpec/serviceTyp", "ClusterIP", "RayService"),
        ("anotations", {}, "ServiceAccount"),
        ("spec/ingress/0/form", [], "NetworkPolicy"),
    ],
)
def test_misspelt_and_mistyped_fields_are_refused(path, value, kind):
    found = planted(path, value, kind)
    assert found
    assert path.split("/")[-1] in " ".join(found) or repr(value) in " ".join(found)


def test_a_missing_field_is_refused():
    document = copy.deepcopy(CLUSTER)
    del document["spec"]["workerGroupSpecs"][0]["groupName"]
    assert "groupName" in " ".join(problems(document))


def test_ray_is_the_version_that_is_installed_everywhere():
    pinned = re.search(r"(?m)^ray==(.*)$", (ROOT / "constraints.txt").read_text())
    assert pinned
    for document in CLUSTERS:
        assert cluster_spec(document)["rayVersion"] == pinned[1] == ray.__version__


def test_every_container_runs_the_one_image():
    images = [value for d in CLUSTERS for path, value in leaves(d) if path[-1] == "image"]
    assert len(images) == 7
    assert set(images) == {"registry.example.com/adaptive-reid:0.1.0"}


@pytest.mark.parametrize("pod", PODS)
def test_requests_are_within_limits_and_volumes_within_memory_and_disk(pod):
    (container,) = pod["containers"]
    requests, limits = (container["resources"][key] for key in ("requests", "limits"))
    assert requests.keys() == limits.keys()
    for name in requests:
        assert quantity(requests[name]) <= quantity(limits[name])
    sizes = {
        (volume["emptyDir"].get("medium"), quantity(volume["emptyDir"]["sizeLimit"]))
        for volume in pod["volumes"]
    }
    assert sum(size for medium, size in sizes if medium == "Memory") < quantity(limits["memory"])
    disk = sum(size for medium, size in sizes if medium is None)
    assert disk < quantity(limits["ephemeral-storage"])


@pytest.mark.parametrize("pod", PODS)
def test_mounts_name_volumes_and_shared_memory_holds_the_object_store(pod):
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == set(volumes)
    memory = volumes[mounts["/dev/shm"]]["emptyDir"]
    assert memory["medium"] == "Memory"
    stores = [
        int(group["rayStartParams"]["object-store-memory"])
        for document in CLUSTERS
        for group in groups(document)
        if group["template"]["spec"] is pod
    ]
    assert stores
    assert max(stores) <= quantity(memory["sizeLimit"])


def groups(document):
    spec = cluster_spec(document)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


@pytest.mark.parametrize("document", CLUSTERS, ids=KINDS)
def test_ray_start_understands_its_parameters(document):
    for group in groups(document):
        wanted = group["rayStartParams"]
        with start.make_context("ray start", [f"--{k}={v}" for k, v in wanted.items()]) as context:
            given = {name: str(context.params[name.replace("-", "_")]) for name in wanted}
        assert given.keys() == wanted.keys()
        assert all(float(given[name]) == float(wanted[name]) for name in wanted)


@pytest.mark.parametrize("document", CLUSTERS, ids=KINDS)
def test_no_work_is_placed_on_the_head(document):
    parameters = cluster_spec(document)["headGroupSpec"]["rayStartParams"]
    assert (parameters["num-cpus"], parameters["num-gpus"]) == ("0", "0")


@pytest.mark.parametrize("pod", PODS)
def test_probes_ask_what_ray_answers_without_a_token(pod):
    (container,) = pod["containers"]
    for probe in ("readinessProbe", "livenessProbe"):
        target = container[probe]["httpGet"]
        assert target["path"] in http_server_agent.PUBLIC_EXACT_PATHS
        assert target["port"] == ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT


@pytest.mark.parametrize("pod", PODS)
def test_pods_are_not_root_and_cannot_become_it(pod):
    contexts = [container["securityContext"] for container in pod["containers"]]
    contexts.append(CLUSTER["spec"]["autoscalerOptions"]["securityContext"])
    for context in contexts:
        assert context["runAsNonRoot"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("pod", PODS)
def test_pods_use_the_account_and_environment_that_the_namespace_has(pod):
    assert pod["serviceAccountName"] == BY_KIND["ServiceAccount"]["metadata"]["name"]
    names = [source["configMapRef"]["name"] for source in sources(pod) if "configMapRef" in source]
    assert names == [BY_KIND["ConfigMap"]["metadata"]["name"]]
    data = BY_KIND["ConfigMap"]["data"]
    assert data.keys() >= {"MLFLOW_TRACKING_URI", "AWS_DEFAULT_REGION"}
    assert int(data["RAY_JOB_STOP_WAIT_TIME_S"]) >= 600


def sources(pod):
    return [source for container in pod["containers"] for source in container["envFrom"]]


def test_only_the_autoscaler_may_talk_to_the_api_server():
    for document in CLUSTERS:
        scaling = cluster_spec(document).get("enableInTreeAutoscaling", False)
        for name, pod in pods(document).items():
            mounted = pod.get("automountServiceAccountToken", True)
            assert mounted == (scaling and name == "head"), (document["kind"], name)


def test_everything_is_in_the_one_namespace_and_behind_its_network_policy():
    (namespace,) = (d["metadata"]["name"] for d in ALL if d["kind"] == "Namespace")
    assert {d["metadata"].get("namespace", namespace) for d in ALL} == {namespace}
    selector = BY_KIND["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    for document in CLUSTERS:
        for group in groups(document):
            assert group["template"]["metadata"]["labels"].items() >= selector.items()


def test_dashboards_are_reachable_only_inside_the_cluster():
    for document in CLUSTERS:
        head = cluster_spec(document)["headGroupSpec"]
        assert (head["serviceType"], head["enableIngress"]) == ("ClusterIP", False)
        assert cluster_spec(document)["authOptions"] == {"mode": "token"}
    assert ".svc.cluster.local" in BY_KIND["ConfigMap"]["data"]["MLFLOW_TRACKING_URI"]


def test_no_secret_is_written_down():
    assert "Secret" not in BY_KIND
    suspicious = re.compile(r"(?i)password|secret_?access|access_?key|token$|credential")
    for document in ALL:
        for path, value in leaves(document):
            assert not re.search(r"AKIA[0-9A-Z]{16}|://[^/\s]+:[^/\s]+@", str(value)), path
            if suspicious.search(str(path[-1])):
                assert isinstance(value, bool), path
    credential = CLUSTER["spec"]["gcsFaultToleranceOptions"]["redisPassword"]
    assert credential.keys() == {"valueFrom"}


@pytest.mark.parametrize("group", GROUPS)
def test_groups_scale_between_bounds_and_ask_for_gpus(group):
    low, high = group["minReplicas"], group["maxReplicas"]
    assert 0 <= low <= group.get("replicas", low) <= high
    (container,) = group["template"]["spec"]["containers"]
    assert int(container["resources"]["limits"]["nvidia.com/gpu"]) >= 1
    keys = {toleration["key"] for toleration in group["template"]["spec"]["tolerations"]}
    assert "nvidia.com/gpu" in keys


@pytest.mark.parametrize("group", GROUPS)
def test_an_evicted_worker_has_time_to_say_that_it_is_preempted(group):
    grace = group["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > ray_constants.RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S > 0


def test_spot_and_on_demand_workers_differ_only_in_where_they_run():
    demand, spot = (copy.deepcopy(group) for group in CLUSTER["spec"]["workerGroupSpecs"])
    places = [
        group["template"]["spec"].pop("nodeSelector")["karpenter.sh/capacity-type"]
        for group in (demand, spot)
    ]
    assert places == ["on-demand", "spot"]
    for group in (demand, spot):
        for key in ("groupName", "idleTimeoutSeconds"):
            group.pop(key, None)
        del group["template"]["spec"]["tolerations"]
    assert demand == spot


def test_the_service_has_the_jobs_pods_with_its_port_and_its_token():
    ours, theirs = copy.deepcopy(pods(SERVICE)), pods(JOB)
    for name, pod in ours.items():
        (container,) = pod["containers"]
        assert container["ports"].pop() == {"name": "serve", "containerPort": 8000}
        *container["envFrom"], token = container["envFrom"]
        assert token == {"secretRef": {"name": "reid-serve"}}
        assert pod == theirs[name]


def test_serve_takes_the_services_settings_and_they_fit_its_node(monkeypatch):
    config = ServeDeploySchema.model_validate(yaml.safe_load(SERVICE["spec"]["serveConfigV2"]))
    (app,) = config.applications
    assert (config.http_options.host, config.http_options.port) == ("0.0.0.0", 8000)
    module, _, name = app.import_path.partition(":")
    monkeypatch.delenv(TOKEN, raising=False)
    build = getattr(importlib.import_module(module), name)
    with pytest.raises(ConfigError, match="needs a token"):
        build(app.args)
    monkeypatch.setenv(TOKEN, "t" * 32)
    assert isinstance(build(app.args), Application)
    settings = read_settings(app.args)
    (group,) = cluster_spec(SERVICE)["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert settings.device == "cuda"
    assert settings.replicas * settings.gpus_per_replica <= int(limits["nvidia.com/gpu"])
    searching = settings.search_replicas * settings.search_cpus
    assert settings.replicas * settings.cpus_per_replica + searching <= int(limits["cpu"])


def test_job_and_cluster_have_the_same_pods():
    ours, theirs = pods(JOB), pods(CLUSTER)
    assert ours["gpu"] == theirs["gpu"]
    assert ours["head"]["containers"] == theirs["head"]["containers"]


def entrypoint() -> list[str]:
    words = shlex.split(JOB["spec"]["entrypoint"])
    assert words[:4] == ["python", "-m", "reid_train", "train"]
    return words[4:]


def parsed():
    words = entrypoint()
    name = words[words.index("--recipe") + 1]
    return tyro.cli(
        Train,
        default=Train(recipe(name)),
        args=words,
        config=(tyro.conf.AvoidSubcommands,),
    ).config


def test_the_jobs_command_is_one_that_the_program_takes():
    config = parsed()
    assert config.name
    assert config.data.startswith("s3://")
    assert config.output.startswith("s3://")


def test_the_jobs_workers_and_cache_are_those_of_its_pods():
    config = parsed()
    (group,) = JOB["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    (container,) = pod["containers"]
    limits = container["resources"]["limits"]
    gpus = int(limits["nvidia.com/gpu"])
    assert config.workers == group["replicas"] * gpus
    assert config.loader.workers < int(limits["cpu"]) / gpus
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    (volume,) = (v for v in pod["volumes"] if v["name"] == mounts[str(config.loader.cache)])
    assert "medium" not in volume["emptyDir"]
    assert config.loader.cache_bytes <= quantity(volume["emptyDir"]["sizeLimit"])


def test_the_job_waits_for_gpus_and_never_trains_on_cpus_instead():
    assert parsed().device == "cuda"


def test_kuberays_own_rules_hold():
    """Rules of the operator's validation that are in no schema and that these files could break."""
    scaled = CLUSTER["spec"]["autoscalerOptions"]["version"] == "v2"
    for pod in pods(CLUSTER).values():
        assert not scaled or pod.get("restartPolicy", "Never") == "Never"
    spec = JOB["spec"]
    assert spec["shutdownAfterJobFinishes"] or not spec["ttlSecondsAfterFinished"]
    assert len(JOB["metadata"]["name"]) <= 47
    names = [group["groupName"] for group in CLUSTER["spec"]["workerGroupSpecs"]]
    assert len(names) == len(set(names))
    head = cluster_spec(CLUSTER)["headGroupSpec"]
    assert "redis-password" not in head["rayStartParams"]
