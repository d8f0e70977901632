"""Tests of the manifests for clusters of Ray on Kubernetes, with KubeRay."""

import re
import shlex
import subprocess

import pytest
import yaml
from launcher import LAUNCH, ROOT, VARIABLES, launcher
from manifests import FLAG, METADATA, NUMBER, POD, TEXT, check
from search_commands import search_command

__all__ = ["launcher"]  # the fixture

# The published fields of ray.io/v1 and of Kubernetes: those used here and their neighbours.
TEMPLATE = {"metadata": METADATA, "spec": POD}
START = {"*": TEXT}  # every option of `ray start`, as a text
RAY_CLUSTER = {
    "rayVersion": TEXT,
    "suspend": FLAG,
    "enableInTreeAutoscaling": FLAG,
    "autoscalerOptions": {"idleTimeoutSeconds": NUMBER, "upscalingMode": TEXT, "version": TEXT},
    "headGroupSpec": {
        "serviceType": TEXT,
        "enableIngress": FLAG,
        "rayStartParams": START,
        "template": TEMPLATE,
    },
    "workerGroupSpecs": [
        {
            "groupName": TEXT,
            "replicas": NUMBER,
            "minReplicas": NUMBER,
            "maxReplicas": NUMBER,
            "idleTimeoutSeconds": NUMBER,
            "numOfHosts": NUMBER,
            "rayStartParams": START,
            "template": TEMPLATE,
        }
    ],
}
RAY_JOB = {
    "entrypoint": TEXT,
    "entrypointNumCpus": NUMBER,
    "submissionMode": TEXT,
    "submitterConfig": {"backoffLimit": NUMBER},
    "runtimeEnvYAML": TEXT,
    "activeDeadlineSeconds": NUMBER,
    "backoffLimit": NUMBER,
    "shutdownAfterJobFinishes": FLAG,
    "ttlSecondsAfterFinished": NUMBER,
    "suspend": FLAG,
    "rayClusterSpec": RAY_CLUSTER,
}
DEPLOYMENT = {
    "replicas": NUMBER,
    "strategy": {"type": TEXT},
    "selector": {"matchLabels": {"*": TEXT}},
    "template": TEMPLATE,
}
SERVICE = {
    "type": TEXT,
    "selector": {"*": TEXT},
    "ports": [{"name": TEXT, "port": NUMBER, "targetPort": NUMBER}],
}
SPECS = {
    ("ray.io/v1", "RayJob"): RAY_JOB,
    ("ray.io/v1", "RayCluster"): RAY_CLUSTER,
    ("apps/v1", "Deployment"): DEPLOYMENT,
    ("v1", "Service"): SERVICE,
}


def check_manifest(manifest):
    fields = {"apiVersion": TEXT, "kind": TEXT, "metadata": METADATA}
    spec = SPECS[manifest["apiVersion"], manifest["kind"]]
    check(manifest, {**fields, "spec": spec})


def manifests(launcher, kind, *arguments, **variables):
    """Returns {kind of the object: manifest} of what is applied."""
    result = launcher.run("gke/ray.sh", kind, *arguments, variables=VARIABLES | variables)
    assert result.returncode == 0, result.errors
    assert launcher.calls("kubectl") == [["kubectl", "apply", "-f", "-"]]
    objects = yaml.safe_load_all((launcher.folder / "manifest").read_text())
    return {one["kind"]: one for one in objects}


def pods(manifest):
    """Returns {name of the group: pod template} of a cluster of Ray."""
    spec = manifest["spec"]
    spec = spec.get("rayClusterSpec", spec)
    groups = {group["groupName"]: group["template"] for group in spec["workerGroupSpecs"]}
    return {"head": spec["headGroupSpec"]["template"], **groups}


@pytest.mark.parametrize("kind", ["index", "serve"])
def test_manifests_have_published_fields(launcher, kind):
    for manifest in manifests(launcher, kind).values():
        check_manifest(manifest)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("RayJob", ["spec", "entryPoint"], "python"),
        ("RayJob", ["spec", "rayClusterSpec", "workerGroupSpecs", 0, "replica"], 1),
        ("RayJob", ["spec", "rayClusterSpec", "rayVersion"], 2.6),
        ("RayJob", ["spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"], 0),
    ],
)
def test_schema_refuses_unknown_fields(launcher, kind, path, value):
    place = manifest = manifests(launcher, "index")[kind]
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(AssertionError, match=re.escape(path[-1])):
        check_manifest(manifest)


def test_index_job_runs_the_command_on_spot_workers(launcher):
    manifest = manifests(launcher, "index", "--ocr", "--bank=a 'b' \"c\" \\ & $d")["RayJob"]
    words = shlex.split(manifest["spec"]["entrypoint"])
    assert words == [
        *["python", "-m", "xclip_jax.search", "index", "/mnt/bucket/videos", "--workers=ray"],
        *["--index=gs://my-bucket/index/clips", "--model=/mnt/bucket/models/mine"],
        *["--ocr", "--bank=a 'b' \"c\" \\ & $d"],
    ]
    [group] = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert {group[name] for name in ("replicas", "minReplicas", "maxReplicas")} == {8}
    selector = {"cloud.google.com/gke-spot": "true"}
    found = {name: pod["spec"].get("nodeSelector") for name, pod in pods(manifest).items()}
    assert found == {"head": None, "workers": selector}
    head = manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]
    assert head["num-cpus"] == "0"
    args = search_command(words)
    assert (args.ocr, args.workers) == (True, "ray")


def test_front_end_joins_the_cluster_and_serves(launcher):
    objects = manifests(launcher, "serve", "--dedupe", "--allow_host=a 'b' \"c\" \\ & $d")
    [group] = objects["RayCluster"]["spec"]["workerGroupSpecs"]
    assert {group[name] for name in ("replicas", "minReplicas", "maxReplicas")} == {4}
    [container] = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    address, *words = container["args"]
    assert address == "msrvtt-head-svc:6379"  # KubeRay's name of the head's service
    assert words == [
        *["python", "-m", "xclip_jax.search", "serve", "--shards=4"],
        *["--index=gs://my-bucket/index/clips", "--model=/mnt/bucket/models/mine"],
        *["--ray=auto", "--host=0.0.0.0", "--port=7870", "--dedupe"],
        "--allow_host=a 'b' \"c\" \\ & $d",
    ]
    launcher.answers(programs=[0])
    command = [*container["command"], *container["args"]]
    subprocess.run(command, env=launcher.environment, timeout=20, check=True)
    ray, python = launcher.calls("ray", "python")
    assert ray == ["ray", "start", "--address=msrvtt-head-svc:6379", "--num-cpus=0"]
    assert python == words
    args = search_command(words)
    assert (args.shards, args.ray, args.port) == (4, "auto", 7870)


def test_front_end_has_a_token_and_is_ready_when_its_port_is_open(launcher):
    objects = manifests(launcher, "serve")
    deployment, service = objects["Deployment"]["spec"], objects["Service"]["spec"]
    [container] = deployment["template"]["spec"]["containers"]
    [token] = container["env"]
    assert token == {
        "name": "XCLIP_JAX_TOKEN",  # read by the command serve
        "valueFrom": {"secretKeyRef": {"name": "msrvtt-token", "key": "token"}},
    }
    [port] = container["ports"]
    assert port == {"containerPort": 7870}
    assert container["readinessProbe"]["tcpSocket"] == {"port": 7870}
    [exposed] = service["ports"]
    assert exposed["targetPort"] == 7870
    labels = deployment["template"]["metadata"]["labels"]
    assert service["selector"] == deployment["selector"]["matchLabels"] == labels
    assert (deployment["replicas"], deployment["strategy"]) == (1, {"type": "Recreate"})


@pytest.mark.parametrize("kind", ["index", "serve"])
def test_every_pod_reads_the_bucket_as_the_service_account(launcher, kind):
    objects = manifests(launcher, kind)
    templates = list(pods(objects["RayJob" if kind == "index" else "RayCluster"]).values())
    if kind == "serve":
        templates.append(objects["Deployment"]["spec"]["template"])
    for template in templates:
        pod = template["spec"]
        assert template["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
        assert pod["serviceAccountName"] == "trainer"
        [container], [volume] = pod["containers"], pod["volumes"]
        assert container["image"] == "my-registry/xclip_jax"
        assert volume["csi"]["volumeAttributes"]["bucketName"] == "my-bucket"
        assert volume["csi"]["readOnly"] is True
        mount = {"name": volume["name"], "mountPath": "/mnt/bucket", "readOnly": True}
        assert container["volumeMounts"] == [mount]
        assert container["resources"]["limits"] == container["resources"]["requests"]


def test_version_of_ray_is_that_of_the_image():
    constraints = (ROOT / "constraints.txt").read_text()
    if not (pinned := re.search(r"^ray==(.+)$", constraints, re.MULTILINE)):
        pytest.skip("constraints.txt has no ray")
    for name in ("ray_index.yaml", "ray_serve.yaml"):
        assert f'rayVersion: "{pinned[1]}"' in (LAUNCH / "gke" / name).read_text()


def test_dry_run_of_kuberay_prints_the_manifests(launcher):
    printed = launcher.run("gke/ray.sh", "serve", "--dry-run").output
    text, _, command = printed.strip().rpartition("\n")
    assert shlex.split(command) == ["kubectl", "apply", "-f", "-"]
    printed = {one["kind"]: one for one in yaml.safe_load_all(text)}
    assert printed == manifests(launcher, "serve")


def test_kuberay_refuses_an_unknown_kind(launcher):
    result = launcher.run("gke/ray.sh", "tpu")
    assert result.returncode == 2
    assert result.errors == "error: 'tpu': the first argument must be index or serve\n"
