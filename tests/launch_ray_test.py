"""Tests of the files for Ray's cluster launcher, which starts machines of a cloud."""

import importlib.util
import json
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from launcher import LAUNCH, ROOT, VARIABLES, launcher
from search_commands import search_command

__all__ = ["launcher"]  # the fixture


def test_commands_with_unknown_options_are_refused():
    command = ["python", "-m", "xclip_jax.search", "serve", "--index=a"]
    assert search_command(command).index == "a"
    with pytest.raises(SystemExit):
        search_command([*command, "--shard_count=4"])


def cluster(launcher, cloud, action, *arguments, **variables):
    """Returns (cluster file, calls of programs)."""
    zone = {"gcp": "us-east5-b", "aws": "us-east-1b"}[cloud]
    variables = VARIABLES | {"ZONE": zone, "SERVERS": "2"} | variables
    command = ["ray/cluster.sh", cloud, action, *arguments]
    result = launcher.run(*command, variables=variables)
    assert result.returncode == 0, result.errors
    launcher.calls_file.replace(launcher.folder / "done")
    calls = [shlex.split(line) for line in (launcher.folder / "done").read_text().splitlines()]
    calls = [call for call in calls if "diff" not in call]  # of git
    text = (launcher.folder / "msrvtt.yaml").read_text()
    printed = launcher.run(*command, "--dry-run", variables=variables).output
    launcher.calls_file.unlink(missing_ok=True)
    assert printed.startswith(text)
    assert [shlex.split(line) for line in printed.removeprefix(text).splitlines()] == calls
    return yaml.safe_load(text), calls


def ray_folder():
    spec = importlib.util.find_spec("ray")
    if spec is None:
        pytest.skip("ray is not installed")
    return Path(spec.submodule_search_locations[0])


@pytest.mark.parametrize("cloud", ["gcp", "aws"])
def test_cluster_file_is_valid_for_ray(launcher, cloud):
    config, _ = cluster(launcher, cloud, "down")
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((ray_folder() / "autoscaler/ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    defaults = yaml.safe_load((ray_folder() / f"autoscaler/{cloud}/defaults.yaml").read_text())
    # Defaults of commands that are not set would install another Ray.
    assert {name for name in defaults if name.endswith("_commands")} - set(config) == {
        "initialization_commands"
    }
    config["available_node_types"]["workers"]["spot"] = True
    with pytest.raises(jsonschema.ValidationError, match="'spot'"):
        jsonschema.validate(config, schema)


@pytest.mark.parametrize("cloud", ["gcp", "aws"])
def test_cluster_has_spot_workers_and_servers(launcher, cloud):
    config, _ = cluster(launcher, cloud, "down", WORKERS="8")
    kinds = config["available_node_types"]
    limits = {
        name: (kind.get("min_workers"), kind.get("max_workers")) for name, kind in kinds.items()
    }
    assert limits == {"head": (None, None), "workers": (0, 8), "servers": (2, 2)}
    assert config["max_workers"] >= 10
    market = {
        name: [kind["node_config"].get(key) for key in ("scheduling", "InstanceMarketOptions")]
        for name, kind in kinds.items()
    }
    spot = [None, {"MarketType": "spot"}] if cloud == "aws" else [{"preemptible": True}, None]
    assert market == {"head": [None, None], "workers": spot, "servers": [None, None]}
    assert [kind["resources"] for kind in kinds.values()] == [{"CPU": 0}, {"CPU": 8}, {"CPU": 8}]
    for name in ("workers", "servers"):
        node = kinds[name]["node_config"]
        if cloud == "gcp":
            [account] = node["serviceAccounts"]
            assert (account["email"], node["machineType"]) == ("trainer", "n2-standard-8")
        else:
            assert node["IamInstanceProfile"] == {"Arn": VARIABLES["PROFILE"]}
            assert node["InstanceType"] == "n2-standard-8"
    head = kinds["head"]["node_config"]
    if cloud == "gcp":
        assert "serviceAccounts" not in head  # Ray gives the head an account of its own
    else:
        assert head["IamInstanceProfile"] == {"Arn": VARIABLES["HEAD_PROFILE"]}
    region = {"gcp": "us-east5", "aws": "us-east-1"}[cloud]
    assert config["provider"]["region"] == region


@pytest.mark.parametrize("cloud", ["gcp", "aws"])
def test_machines_install_the_sent_commit(launcher, cloud):
    config, calls = cluster(launcher, cloud, "up")
    archive = f"{launcher.folder}/msrvtt.tar.gz"
    assert config["file_mounts"] == {"/home/ubuntu/xclip_jax.tar.gz": archive}
    sent, up = calls
    assert sent[3:] == ["archive", f"--output={archive}", "HEAD"]
    assert up == ["ray", "up", f"{launcher.folder}/msrvtt.yaml", "--yes"]
    unpack, setup = config["setup_commands"]
    assert unpack.endswith("tar -xzf ~/xclip_jax.tar.gz -C ~/xclip_jax")
    words = shlex.split(setup)
    assert words == [
        *[f"CLOUD={cloud}", "BUCKET=my-bucket", "MOUNT=/mnt/bucket", "EXTRAS=ray"],
        *["bash", "~/xclip_jax/launch/ray/node_setup.sh"],
    ]
    assert (ROOT / words[-1].removeprefix("~/xclip_jax/")).is_file()


def head_command(call):
    """Returns (options of `ray job submit`, command) of a call of `ray exec`."""
    name, action, _, text = call
    assert (name, action) == ("ray", "exec")
    ray, *words = shlex.split(text)
    assert ray == "/home/ubuntu/venv/bin/ray"
    assert words[:3] == ["job", "submit", "--address=http://127.0.0.1:8265"]
    end = words.index("--")
    return words[3:end], words[end + 1 :]


@pytest.mark.parametrize(("cloud", "scheme"), [("gcp", "gs"), ("aws", "s3")])
def test_cluster_indexes_by_a_job(launcher, cloud, scheme):
    _, [call] = cluster(launcher, cloud, "index", "--precision=float16")
    options, words = head_command(call)
    assert options == []
    assert words == [
        *["/home/ubuntu/venv/bin/python", "-m", "xclip_jax.search", "index", "/mnt/bucket/videos"],
        *["--workers=ray", f"--index={scheme}://my-bucket/index/clips"],
        *["--model=/mnt/bucket/models/mine", "--precision=float16"],
    ]
    args = search_command(words)
    assert (args.precision, args.workers) == ("float16", "ray")


def test_cluster_serves_on_the_head_only(launcher):
    _, [call, attach] = cluster(launcher, "gcp", "serve", "--dedupe")
    options, words = head_command(call)
    assert options == ["--no-wait", "--submission-id=msrvtt-serve"]
    assert attach[:2] == ["ray", "attach"]
    assert attach[3:] == ["--port-forward=7870"]
    assert not any(word.startswith("--host") for word in words)  # default: this machine only
    args = search_command(words)
    assert (args.shards, args.ray, args.port) == (4, "auto", 7870)


def test_options_of_ray_exist(launcher):
    ray_folder()
    scripts = pytest.importorskip("ray.scripts.scripts")
    jobs = pytest.importorskip("ray.dashboard.modules.job.cli").job_cli_group

    def options(command):
        return {option for parameter in command.params for option in parameter.opts}

    calls = [
        call for action in ("up", "serve", "down") for call in cluster(launcher, "gcp", action)[1]
    ]
    for call in calls:
        if call[0] == "ray":
            known = options(scripts.cli.commands[call[1]])
            assert {w.partition("=")[0] for w in call[2:] if w.startswith("--")} <= known, call
        if call[:2] == ["ray", "exec"]:
            given, _ = head_command(call)
            assert {word.partition("=")[0] for word in given} <= options(jobs.commands["submit"])
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        config, _ = cluster(launcher, "gcp", "down")
        words = shlex.split(config[name][1])
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= options(scripts.cli.commands["start"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["azure", "up"], "'azure': the first argument must be gcp or aws"),
        (["gcp", "start"], "'start': the second argument must be up, index, serve or down"),
        (["gcp"], "'': the second argument must be up, index, serve or down"),
        (["gcp", "down", "--keep"], "--keep: the only option is --dry-run"),
    ],
)
def test_cluster_refuses_other_arguments(launcher, arguments, message):
    result = launcher.run("ray/cluster.sh", *arguments)
    assert (result.returncode, result.errors) == (2, f"error: {message}\n")
    assert launcher.calls("ray") == []


# One machine


@pytest.fixture
def node(launcher):
    """Copies the scripts, with fakes of what a machine has."""
    launcher.root = launcher.folder / "xclip_jax"
    shutil.copytree(LAUNCH, launcher.root / "launch")
    for name in ("curl", "python3", "mount-s3", "gcsfuse", "sudo"):
        launcher.add_fake(name, "")
    launcher.add_fake("mountpoint", "exit 1")
    launcher.add_fake("python", "", launcher.folder / "venv/bin")
    return launcher


@pytest.mark.parametrize(
    ("cloud", "mount"), [("gcp", "gcsfuse --implicit-dirs -o ro"), ("aws", "mount-s3 --read-only")]
)
def test_node_setup_mounts_and_installs(node, cloud, mount):
    variables = {"CLOUD": cloud, "BUCKET": "my-bucket", "EXTRAS": "ray,cuda13"}
    result = node.run("ray/node_setup.sh", variables=variables, root=node.root)
    assert result.returncode == 0, result.errors
    [mounted] = node.calls("gcsfuse", "mount-s3")
    assert mounted == [*mount.split(), "my-bucket", "/mnt/bucket"]
    [install] = node.calls("python")
    assert " ".join(install) == "python -m pip install --quiet .[ray,cuda13] -c constraints.txt"


def test_node_setup_keeps_an_existing_mount(node):
    node.add_fake("mountpoint", "")
    variables = {"CLOUD": "gcp", "BUCKET": "my-bucket", "EXTRAS": "ray"}
    result = node.run("ray/node_setup.sh", variables=variables, root=node.root)
    assert result.returncode == 0, result.errors
    assert node.calls("gcsfuse") == []
