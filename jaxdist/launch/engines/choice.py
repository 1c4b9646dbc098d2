"""`jaxdist launch --engine`: shows or starts a job through SLURM, Kubernetes or Ray."""

import os

from jaxdist import errors
from jaxdist.launch.engines import kubernetes, ray, slurm
from jaxdist.launch.engines.request import Request


def show(engine: str, request: Request) -> str:
    """Return what `start` would give to the engine."""
    match engine:
        case "slurm":
            return slurm.script(request, directory=os.getcwd())
        case "kubernetes":
            return kubernetes.to_yaml(kubernetes.manifest(request))
        case _:
            return ray.describe(request)


def start(engine: str, request: Request) -> int:
    """Start the job; return 0 once SLURM or Kubernetes accepts it; with Ray run it and return its exit status."""
    match engine:
        case "slurm":
            number = slurm.submit(request, show(engine, request))
            print(f"SLURM job {number}; its output goes to {request.run_dir}/slurm-{number}.log.")
        case "kubernetes":
            print(kubernetes.submit(show(engine, request)))
        case _:
            return ray.run(request, say=errors.say)
    return 0
