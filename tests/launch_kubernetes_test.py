"""Tests of the JobSets for Kubernetes and of the SkyPilot task."""

import re
import shlex
import subprocess

import pytest
import yaml
from launcher import FAKES, LAUNCH, VARIABLES, launcher, program
from manifests import FLAG, METADATA, NUMBER, POD, TEXT, check

__all__ = ["launcher"]  # the fixture

# The published fields: those used here and their neighbours.
POD_FAILURE_POLICY = {
    "rules": [
        {
            "action": TEXT,
            "onExitCodes": {"containerName": TEXT, "operator": TEXT, "values": [NUMBER]},
            "onPodConditions": [{"type": TEXT, "status": TEXT}],
        }
    ]
}
JOB = {
    "parallelism": NUMBER,
    "completions": NUMBER,
    "completionMode": TEXT,
    "backoffLimit": NUMBER,
    "activeDeadlineSeconds": NUMBER,
    "podFailurePolicy": POD_FAILURE_POLICY,
    "template": {"metadata": METADATA, "spec": POD},
}
RULE = {"name": TEXT, "action": TEXT, "onJobFailureReasons": [TEXT], "targetReplicatedJobs": [TEXT]}
JOBSET = {
    "apiVersion": TEXT,
    "kind": TEXT,
    "metadata": METADATA,
    "spec": {
        "failurePolicy": {"maxRestarts": NUMBER, "restartStrategy": TEXT, "rules": [RULE]},
        "successPolicy": {"operator": TEXT, "targetReplicatedJobs": [TEXT]},
        "network": {"enableDNSHostnames": FLAG, "subdomain": TEXT},
        "suspend": FLAG,
        "ttlSecondsAfterFinished": NUMBER,
        "replicatedJobs": [
            {"name": TEXT, "replicas": NUMBER, "template": {"metadata": METADATA, "spec": JOB}}
        ],
    },
}
SKYPILOT = {
    "name": TEXT,
    "workdir": TEXT,
    "num_nodes": NUMBER,
    "resources": {
        "infra": TEXT,
        "accelerators": TEXT,
        "instance_type": TEXT,
        "use_spot": FLAG,
        "disk_size": NUMBER,
        "image_id": TEXT,
        "job_recovery": {
            "strategy": TEXT,
            "max_restarts_on_errors": NUMBER,
            "recover_on_exit_codes": [NUMBER],
        },
    },
    "envs": {"*": (TEXT, type(None))},
    "file_mounts": {"*": {"source": TEXT, "name": TEXT, "store": TEXT, "mode": TEXT}},
    "setup": TEXT,
    "run": TEXT,
}


def jobset(launcher, kind, *arguments, **variables):
    result = launcher.run("gke/apply.sh", kind, *arguments, variables=VARIABLES | variables)
    assert result.returncode == 0, result.errors
    assert launcher.calls("kubectl") == [["kubectl", "apply", "-f", "-"]]
    return yaml.safe_load((launcher.folder / "manifest").read_text())


def parts(manifest):
    """Returns the job, its pod and its container."""
    [replicated] = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    return job, pod, container


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_jobset_fields_are_published_and_preemption_restarts(launcher, kind):
    manifest = jobset(launcher, kind)
    check(manifest, JOBSET)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    policy = manifest["spec"]["failurePolicy"]
    assert policy["rules"] == [
        {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    job, pod, container = parts(manifest)
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    on_exit, on_disruption = job["podFailurePolicy"]["rules"]
    assert on_exit["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "In",
        "values": [75],
    }
    assert on_disruption["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert pod["restartPolicy"] == "Never"  # required by podFailurePolicy


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_jobset_mounts_the_bucket_that_the_program_reads(launcher, kind):
    manifest = jobset(launcher, kind, '--config.name=a "b" \\ & c')
    job, pod, container = parts(manifest)
    assert job["template"]["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
    [volume] = [volume["csi"] for volume in pod["volumes"] if "csi" in volume]
    assert volume["driver"] == "gcsfuse.csi.storage.gke.io"
    assert volume["volumeAttributes"]["bucketName"] == "my-bucket"
    assert " " not in volume["volumeAttributes"]["mountOptions"]
    assert {"name": "bucket", "mountPath": "/mnt/bucket"} in container["volumeMounts"]
    cache = {"name": "JAX_COMPILATION_CACHE_DIR", "value": "/mnt/bucket/jax_cache"}
    assert container["env"] == [cache]
    words = [*container["command"], *container["args"]]
    expected = program("/mnt/bucket", '--config.name=a "b" \\ & c')
    assert words[: len(expected) + 1] == ["python", *expected]


@pytest.mark.parametrize(
    ("topology", "hosts"), [("2x2", 1), ("4x4", 4), ("2x2x2", 2), ("2x2x4", 4)]
)
def test_jobset_has_one_pod_per_four_chips(launcher, topology, hosts):
    job, pod, container = parts(jobset(launcher, "tpu", TOPOLOGY=topology))
    assert (job["parallelism"], job["completions"]) == (hosts, hosts)
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": topology,
    }


@pytest.mark.parametrize("topology", ["1x1", "16", "4*4", "a[$(date)]x4"])
def test_jobset_refuses_other_topologies(launcher, topology):
    variables = VARIABLES | {"TOPOLOGY": topology}
    result = launcher.run("gke/apply.sh", "tpu", variables=variables)
    assert (result.returncode, launcher.calls()) == (2, [])
    assert f"TOPOLOGY={topology}: must" in result.errors


def test_gpu_jobset_passes_the_process_id(launcher):
    job, pod, container = parts(jobset(launcher, "gpu"))
    assert (job["parallelism"], job["completions"]) == (2, 2)
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert container["args"][-3:] == [
        *["--coordinator=msrvtt-train-0-0.msrvtt:8476", "--num_processes=2"],
        "--process_id=$(JOB_COMPLETION_INDEX)",
    ]


def test_apply_dry_run_prints_the_manifest(launcher):
    printed = launcher.run("gke/apply.sh", "tpu", "--dry-run").output
    manifest, _, command = printed.strip().rpartition("\n")
    assert shlex.split(command) == ["kubectl", "apply", "-f", "-"]
    assert yaml.safe_load(manifest) == jobset(launcher, "tpu")


def test_apply_refuses_an_unknown_kind(launcher):
    result = launcher.run("gke/apply.sh", "cpu")
    assert (result.returncode, result.errors) == (
        2,
        "error: 'cpu': the first argument must be tpu or gpu\n",
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "replicas"], 1),
        (["spec", "failurePolicy", "maxRestart"], 3),
        (["spec", "failurePolicy", "maxRestarts"], "3"),
        (["spec", "replicatedJobs", 0, "template", "spec", "podFailurePolicy", "rule"], []),
        (["spec", "replicatedJobs", 0, "template", "spec", "backoffLimit"], True),
        (["spec", "replicatedJobs"], {}),
    ],
)
def test_jobset_schema_refuses_unknown_fields(launcher, path, value):
    manifest = jobset(launcher, "tpu")
    place = manifest
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(AssertionError, match=re.escape(str(path[-1]))):
        check(manifest, JOBSET)


def skypilot():
    return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


def test_skypilot_uses_published_fields():
    task = skypilot()
    check(task, SKYPILOT)
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [75]}
    assert task["file_mounts"] == {"/mnt/bucket": {"source": "gs://${BUCKET}", "mode": "MOUNT"}}
    required = {name for name, value in task["envs"].items() if value is None}
    assert required == {"NAME", "CONFIG", "DATA", "BUCKET"}


@pytest.mark.parametrize(
    ("place", "name"),
    [([], "nodes"), (["resources"], "spot"), (["resources", "job_recovery"], "exit_codes")],
)
def test_skypilot_schema_refuses_unknown_fields(place, name):
    task = skypilot()
    fields = task
    for step in place:
        fields = fields[step]
    fields[name] = 1
    with pytest.raises(AssertionError, match=f"{name}: unknown field"):
        check(task, SKYPILOT)


@pytest.mark.parametrize("status", [0, 75])
def test_skypilot_runs_one_process_per_machine(launcher, status):
    launcher.add_fake("python", FAKES["python"], launcher.folder / "venv/bin")
    launcher.answers(programs=[status])
    cluster = {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "ARGUMENTS": "--config.train.epochs=1 --config.mode=eval",
    }
    result = subprocess.run(
        ["bash", "-c", skypilot()["run"]],
        env=launcher.environment | VARIABLES | cluster,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (result.returncode, result.stdout) == (status, "training with /mnt/bucket/jax_cache\n")
    assert launcher.calls("python") == [
        [
            *["python", *program("/mnt/bucket")],
            *["--coordinator=10.0.0.1:8476", "--num_processes=2", "--process_id=1"],
            *["--config.train.epochs=1", "--config.mode=eval"],
        ]
    ]
