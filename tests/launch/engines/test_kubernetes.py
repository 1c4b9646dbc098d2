"""The JobSet that is written: against the schema of JobSet and Kubernetes, and for what it promises.

The schema is that of kubeflow-trainer-api, models generated from the API's own description. They drop what they do not
know and check types, so a manifest is of the schema when it comes back as it went in.
"""

import json
import pathlib
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from kubeflow_trainer_api import models

from jaxdist.cli import main
from jaxdist.errors import UserError
from jaxdist.launch.engines import kubernetes
from jaxdist.launch.engines.request import Request

EXPERIMENT = pathlib.Path(__file__).parents[2] / "tiny_experiment.py"
NEEDED = {"image": "registry.example/team/train:1", "claim": "runs"}
ACTIONS = {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}


def request(name="tiny", run_dir="/runs/tiny", settings=None, **changes):
    values = {"experiment": pathlib.Path("x.py"), "arguments": ("--devices", "2"), "hosts": 2, "processes": 4}
    settings = NEEDED if settings is None else settings
    return Request(name=name, run_dir=pathlib.Path(run_dir), settings=settings, **values | changes)


def job_of(manifest):
    (group,) = manifest["spec"]["replicatedJobs"]
    return group["template"]["spec"]


def container_of(manifest):
    (container,) = job_of(manifest)["template"]["spec"]["containers"]
    return container


def assert_of_the_schema(manifest):
    returned = models.JobsetV1alpha2JobSet.from_dict(json.loads(json.dumps(manifest))).to_dict()
    returned.pop("status", None)
    assert _without_empty(returned) == _without_empty(manifest)


def _without_empty(value):
    if isinstance(value, dict):
        kept = {key: _without_empty(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item not in ({}, [], None)}
    return [_without_empty(item) for item in value] if isinstance(value, list) else value


def test_the_manifest_is_of_the_schema():
    every = NEEDED | {"namespace": "team", "cpu": "8", "memory": "64Gi", "gpus": "1", "tpus": "4", "max-restarts": "7"}
    assert_of_the_schema(kubernetes.manifest(request(settings=every)))


def test_the_pods_of_a_parameter_server_know_each_other_and_a_secret():
    manifest = kubernetes.manifest(request(settings=NEEDED | {"secret": "team"}, processes=1, parameter_server=True))
    assert_of_the_schema(manifest)
    container = container_of(manifest)
    assert container["command"][:4] == ["python", "-m", "jaxdist.cli.machine", "train"]
    hosts, token = container["env"]
    assert hosts == {"name": "JAXDIST_PS_HOSTS", "value": "tiny-processes-0-0.tiny,tiny-processes-0-1.tiny"}
    assert token["valueFrom"]["secretKeyRef"] == {"name": "team", "key": "token"}
    assert job_of(manifest)["completionMode"] == "Indexed"  # gives each pod JOB_COMPLETION_INDEX


@pytest.mark.parametrize(
    "path",
    [
        ("spec", "failurePolicy", "maxRestart"),
        ("spec", "replicatedJobs", 0, "template", "spec", "completionmode"),
        ("spec", "replicatedJobs", 0, "template", "spec", "podFailurePolicy", "rules", 0, "onExitCode"),
        ("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "envs"),
    ],
)
def test_the_schema_notices_a_misspelt_field(path):
    manifest = kubernetes.manifest(request())
    place = manifest
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = "anything"
    with pytest.raises(AssertionError):
        assert_of_the_schema(manifest)


def test_the_schema_notices_a_wrong_type():
    manifest = kubernetes.manifest(request())
    job_of(manifest)["completions"] = "8"
    with pytest.raises(ValueError, match="completions"):
        assert_of_the_schema(manifest)


def test_every_pod_learns_its_place_from_the_manifest_alone():
    manifest = kubernetes.manifest(request())
    job, environment = job_of(manifest), {each["name"]: each for each in container_of(manifest)["env"]}
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 8, 8)
    assert environment["JAX_NUM_PROCESSES"]["value"] == "8"
    assert "job-completion-index" in environment["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    # JobSet names a pod <set>-<group>-<job>-<pod>, in a domain called as the set.
    assert environment["JAX_COORDINATOR_ADDRESS"]["value"] == "tiny-processes-0-0.tiny:8476"
    assert manifest["spec"]["network"]["enableDNSHostnames"] is True


def test_the_coordinator_listens_at_the_address_of_its_pod_alone():
    names = [each["name"] for each in container_of(kubernetes.manifest(request()))["env"]]
    assert names.index("POD_IP") < names.index("JAX_COORDINATOR_BIND_ADDRESS")  # $(POD_IP) must be known before


def action_on(manifest, exit_status, disrupted=False):
    """Return what JobSet does when a pod ends in this way, by the rules in its documentation and Kubernetes'."""
    container = container_of(manifest)["name"]
    message = reason = None
    for index, rule in enumerate(job_of(manifest)["podFailurePolicy"]["rules"]):
        codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions")
        if codes and exit_status in codes["values"]:
            message = f"Container {container} for pod a/b failed with exit code {exit_status} matching FailJob rule at "
        elif conditions and disrupted:
            message = "Pod a/b has condition DisruptionTarget matching FailJob rule at "
        if message:
            message, reason = f"{message}index {index}", "PodFailurePolicy"
            break
    reason = reason or "BackoffLimitExceeded"
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(each, message or "") for each in patterns):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize(
    ("exit_status", "disrupted", "action"),
    [
        (2, False, "FailJobSet"),
        (75, False, "RestartJobSetAndIgnoreMaxRestarts"),
        (137, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (1, False, "RestartJobSet"),
        (137, False, "RestartJobSet"),
    ],
)
def test_each_end_of_a_pod_leads_to_what_it_should(exit_status, disrupted, action):
    assert action in ACTIONS
    assert action_on(kubernetes.manifest(request()), exit_status, disrupted) == action


@given(st.text(max_size=80).filter(str.isprintable))
def test_any_name_becomes_one_that_kubernetes_takes(name):
    manifest = kubernetes.manifest(request(name=name))
    made = manifest["metadata"]["name"]
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", made)
    assert len(f"{made}-processes-0-9999") <= 63
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])


@pytest.mark.parametrize(
    ("settings", "run_dir", "message"),
    [
        ({"image": "x"}, "/runs/a", "claim is missing"),
        ({**NEEDED, "gpu": "1"}, "/runs/a", "'gpu' is none of them"),
        (NEEDED, "/tmp/a", "must be in the claim, which is mounted at /runs"),
        ({**NEEDED, "max-restarts": "often"}, "/runs/a", "takes a whole number; got 'often'"),
    ],
)
def test_what_cannot_work_is_refused(settings, run_dir, message):
    with pytest.raises(UserError, match=message):
        kubernetes.manifest(request(settings=settings, run_dir=run_dir))


def test_the_command_line_prints_the_manifest_and_needs_kubectl_to_create_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = ["launch", str(EXPERIMENT), "--engine", "kubernetes", "--hosts", "3", "--with", "image=x", "claim=runs"]
    assert main.run([*arguments, "--dry-run"]) == 0
    manifest = yaml.safe_load(capsys.readouterr().out)
    assert_of_the_schema(manifest)
    assert container_of(manifest)["command"][-3].startswith("--run-dir")
    assert container_of(manifest)["command"][-2].startswith("/runs/tiny-")
    assert main.run(arguments) == 2
    assert "needs the program kubectl" in capsys.readouterr().err


def test_an_argument_is_not_taken_for_a_variable():
    """Kubernetes replaces `$(NAME)` and makes `$$` one `$`, in the order of the text."""
    made = kubernetes.manifest(request(arguments=["--set", "name=$(POD_IP)$$"]))
    pod = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert "name=$$(POD_IP)$$$$" in pod["containers"][0]["command"]
    assert {"name": "JAX_COORDINATOR_BIND_ADDRESS", "value": "$(POD_IP):8476"} in pod["containers"][0]["env"]
