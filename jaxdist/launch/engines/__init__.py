"""Engines that place a job's processes on a cluster: SLURM, Kubernetes, Ray."""
