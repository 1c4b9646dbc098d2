"""Kubernetes: the manifest of a JobSet, and its submission. One pod runs one process.

The manifest itself tells each process its place, from the index that Kubernetes gives its pod: neither the package
`kubernetes` nor a permission to read pods is needed. Which failure leads to what is decided by exit status: 75 and a
disrupted pod restart all pods, without a limit; 2 ends the JobSet; anything else restarts them a few times.
"""

import re
import shutil
import subprocess
from typing import Any

import yaml

from jaxdist.errors import ExitStatus, UserError
from jaxdist.launch.engines.request import Request

GROUP, CONTAINER, VOLUME = "processes", "train", "runs"
PORT = 8476
KNOWN = ("image", "claim", "mount", "namespace", "cpu", "memory", "gpus", "tpus", "max-restarts", "secret")
_DEFAULT_MOUNT = "/runs"
_GRACE_SECONDS = 120
_POD_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def default_run_dir(request_name: str, settings: dict[str, str]) -> str:
    """Return the default run directory: below the mounted claim."""
    return f"{settings.get('mount', _DEFAULT_MOUNT)}/{request_name}"


def manifest(request: Request) -> dict[str, Any]:
    """Return the JobSet.

    Raises:
      UserError: the image or the claim is missing, a setting is unknown, or the run directory is not in the claim.
    """
    needed = ("image", "claim", "secret") if request.parameter_server else ("image", "claim")
    settings = request.only("Kubernetes", KNOWN, required=needed)
    mount = settings.get("mount", _DEFAULT_MOUNT)
    if not request.run_dir.is_relative_to(mount):
        raise UserError(
            f"The run directory must be in the claim, which is mounted at {mount}; {request.run_dir} is not, and would "
            "be lost with its pod. Choose another --run-dir or another --with mount."
        )
    name = _dns_name(request.name)
    pods = request.hosts * request.processes
    job = {
        "completionMode": "Indexed",
        "completions": pods,
        "parallelism": pods,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": _pod_rules()},
        "template": {"spec": _pod(request, name, pods, mount)},
    }
    metadata = {"name": name} | ({"namespace": settings["namespace"]} if "namespace" in settings else {})
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": request.whole("max-restarts", 3),
                "rules": _rules(),
            },
            "replicatedJobs": [{"name": GROUP, "replicas": 1, "template": {"spec": job}}],
        },
    }


def _pod(request: Request, name: str, pods: int, mount: str) -> dict[str, Any]:
    container = {
        "name": CONTAINER,
        "image": request.settings["image"],
        "command": ["python", "-m", request.module, *map(_literal, request.train())],
        "env": _servers_meet(request, name, pods) if request.parameter_server else _processes_meet(name, pods),
        "resources": {"limits": _limits(request)},
        "volumeMounts": [{"name": VOLUME, "mountPath": mount}],
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "containers": [container],
        "volumes": [{"name": VOLUME, "persistentVolumeClaim": {"claimName": request.settings["claim"]}}],
    }


def _host(name: str, pod: int) -> str:
    """Return the name that the JobSet's network gives a pod of the first (and only) job."""
    return f"{name}-{GROUP}-0-{pod}.{name}"


def _processes_meet(name: str, pods: int) -> list[dict[str, Any]]:
    return [
        {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{_host(name, 0)}:{PORT}"},
        {"name": "JAX_NUM_PROCESSES", "value": str(pods)},
        {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": _POD_INDEX}}},
        {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "JAX_COORDINATOR_BIND_ADDRESS", "value": f"$(POD_IP):{PORT}"},
    ]


def _servers_meet(request: Request, name: str, pods: int) -> list[dict[str, Any]]:
    secret = {"name": request.settings["secret"], "key": "token"}
    return [
        {"name": "JAXDIST_PS_HOSTS", "value": ",".join(_host(name, pod) for pod in range(pods))},
        {"name": "JAXDIST_PS_TOKEN", "valueFrom": {"secretKeyRef": secret}},
    ]


def _limits(request: Request) -> dict[str, str]:
    resources = {"cpu": "cpu", "memory": "memory", "gpus": "nvidia.com/gpu", "tpus": "google.com/tpu"}
    return {resources[name]: value for name, value in request.settings.items() if name in resources}


def _pod_rules() -> list[dict[str, Any]]:
    def exit_status(value: int) -> dict[str, Any]:
        codes = {"containerName": CONTAINER, "operator": "In", "values": [value]}
        return {"action": "FailJob", "onExitCodes": codes}

    disrupted = {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    return [exit_status(int(ExitStatus.USER)), exit_status(int(ExitStatus.RETRY)), disrupted]


def _rules() -> list[dict[str, Any]]:
    # If a job fails by a pod failure rule, only its message names the rule: "... failed with exit code 2 matching ...".
    pattern = f"failed with exit code {ExitStatus.USER} "
    rules: list[dict[str, Any]] = [
        {"name": "mistake", "action": "FailJobSet", "onJobFailureMessagePatterns": [pattern]},
        {"name": "retry", "action": "RestartJobSetAndIgnoreMaxRestarts"},
    ]
    return [rule | {"onJobFailureReasons": ["PodFailurePolicy"]} for rule in rules]


def to_yaml(content: dict[str, Any]) -> str:
    """Return a manifest as text."""
    return yaml.safe_dump(content, sort_keys=False)


def submit(text: str) -> str:
    """Create the JobSet; return the output of kubectl.

    Raises:
      UserError: kubectl is not installed, or the cluster refuses the job; the message is that of the cluster.
    """
    if shutil.which("kubectl") is None:
        raise UserError(
            "--engine kubernetes needs the program kubectl; this machine does not have it. Install it, or add "
            "--dry-run and create the printed manifest from a machine that has it."
        )
    done = subprocess.run(["kubectl", "create", "-f", "-"], input=text, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"The cluster refuses the job: {done.stderr.strip()}")
    return done.stdout.strip()


def _dns_name(name: str) -> str:
    """Return `name` as a DNS label; short, because the pods' names contain it."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-") or "run"


def _literal(argument: str) -> str:
    """Return `argument` so that Kubernetes passes it on as it is: it replaces `$(NAME)` by a variable's value."""
    return argument.replace("$", "$$")
