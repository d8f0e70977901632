"""Tests of watch.sh, which keeps a Cloud TPU slice training."""

import shlex

import pytest
from launcher import VARIABLES, launcher, tpus

__all__ = ["launcher"]  # the fixture


STEPS = {
    " create ": "create",
    " describe ": "describe",
    " scp ": "send",
    "-xzf": "unpack",
    "worker_setup": "setup",
    "worker_run": "run",
    " delete ": "delete",
}


def steps(calls):
    lines = [" ".join(call) for call in calls if call[0] == "gcloud"]
    return [next(step for sign, step in STEPS.items() if sign in line) for line in lines]


def watch(launcher, states, runs=(), creates=(), setups=(), **variables):
    """Returns the status of watch.sh, its steps except state requests, and its errors."""
    launcher.answers(states=states, runs=runs, creates=creates, setups=setups or [0] * 5)
    result = launcher.run("tpu/watch.sh", variables=VARIABLES | variables)
    done = [step for step in steps(launcher.calls("gcloud")) if step not in ("send", "unpack")]
    requests = done.count("describe")
    assert requests == len(states), result.errors
    return result.returncode, [step for step in done if step != "describe"], result.errors


def test_dry_run_of_watch_prints_all_steps(launcher):
    printed = launcher.run("tpu/watch.sh", "--dry-run", "--config.train.epochs=1").output
    assert " ".join(steps(map(shlex.split, printed.splitlines()))) == (
        "create describe send unpack setup run delete"
    )
    assert "--config.train.epochs=1" in printed


def test_watch_waits_trains_and_deletes_the_slice(launcher):
    waiting = ["CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"]
    status, done, _ = watch(launcher, ["NONE", *waiting, "ACTIVE"], runs=[0], creates=[0])
    assert (status, done) == (0, ["create", "setup", "run", "delete"])


def test_watch_requests_only_the_state(launcher):
    watch(launcher, ["ACTIVE"], runs=[0])
    assert launcher.calls("gcloud")[0] == tpus(
        "queued-resources", "describe", "msrvtt", "--format=value(state.state)"
    )


def test_watch_keeps_the_slice_on_demand(launcher):
    status, done, _ = watch(launcher, ["ACTIVE"], runs=[0], KEEP="1")
    assert (status, done) == (0, ["setup", "run"])


def test_watch_recreates_and_resumes_after_preemption(launcher):
    states = ["ACTIVE", "DELETING", "NONE", "PROVISIONING", "ACTIVE"]
    result, done, _ = watch(launcher, states, runs=[75, 0], creates=[0])
    assert result == 0
    assert done == ["setup", "run", "delete", "create", "setup", "run", "delete"]
    first, second = [call for call in launcher.calls("gcloud") if "worker_run" in call[7]]
    assert first == second  # the same command resumes


def test_watch_recreates_suspended_and_failed_slices(launcher):
    states = ["SUSPENDING", "SUSPENDED", "NONE", "FAILED", "NONE", "ACTIVE"]
    status, done, _ = watch(launcher, states, runs=[0], creates=[0, 0])
    assert status == 0
    assert done == ["delete", "create", "delete", "create", "setup", "run", "delete"]


@pytest.mark.parametrize("status", [1, 2, 134])
def test_watch_stops_at_a_program_failure_and_keeps_the_slice(launcher, status):
    result, done, errors = watch(launcher, ["ACTIVE", "ACTIVE"], runs=[status])
    assert (result, done) == (status, ["setup", "run"])
    assert f"status {status}; the slice is kept and costs money until" in errors


def test_watch_stops_when_the_package_cannot_be_installed(launcher):
    result, done, _ = watch(launcher, ["ACTIVE", "ACTIVE"], setups=[1])
    assert (result, done) == (1, ["setup"])


def test_watch_resumes_if_the_slice_was_lost_during_a_failure(launcher):
    states = ["ACTIVE", "SUSPENDING", "SUSPENDED", "NONE", "ACTIVE"]
    status, done, _ = watch(launcher, states, runs=[1, 0], creates=[0])
    assert status == 0
    assert done == ["setup", "run", "delete", "create", "setup", "run", "delete"]


@pytest.mark.parametrize(
    ("states", "creates"),
    [
        (["NONE", "NONE", "NONE"], [1, 1, 1]),
        (["FAILED", "FAILED", "FAILED"], []),
        (["OFFLINE", "OFFLINE", "OFFLINE"], []),
        (["NONE", "FAILED", "OFFLINE"], [1]),
    ],
)
def test_watch_stops_after_consecutive_failures(launcher, states, creates):
    status, done, errors = watch(launcher, states, creates=creates, MAX_FAILURES="3")
    assert status == 1
    assert done.count("create") == len(creates)
    assert "failed, 3 in a row of at most 3" in errors


def test_watch_stops_if_slices_cannot_be_reached(launcher):
    status, done, _ = watch(launcher, ["ACTIVE"] * 2, setups=[255, 255], MAX_FAILURES="2")
    assert (status, done) == (1, ["setup", "setup"])


def test_watch_reattaches_after_a_lost_connection(launcher):
    status, done, _ = watch(launcher, ["ACTIVE", "ACTIVE"], runs=[255, 0])
    assert (status, done) == (0, ["setup", "run", "setup", "run", "delete"])


def test_watch_recreates_a_slice_lost_with_its_connection(launcher):
    states = ["ACTIVE", "SUSPENDED", "NONE", "ACTIVE"]
    status, done, _ = watch(launcher, states, runs=[255, 0], creates=[0])
    assert status == 0
    assert done == ["setup", "run", "delete", "create", "setup", "run", "delete"]


def test_a_working_slice_resets_the_failure_count(launcher):
    states = ["OFFLINE", "NONE", "ACTIVE", "OFFLINE", "NONE", "ACTIVE"]
    status, _, _ = watch(launcher, states, runs=[75, 0], creates=[0, 0], MAX_FAILURES="2")
    assert status == 0
