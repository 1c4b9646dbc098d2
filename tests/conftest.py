"""Eight fake CPU devices for every test, set before JAX starts; rank promotion raises."""

import os

import hypothesis
import jax

# Child processes of a test choose their own number of devices: configuration, not an environment variable.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")
# The thread pool of XLA must not have exactly one thread: such a program rounds differently.
os.environ.setdefault("NPROC", "2")

hypothesis.settings.register_profile("jaxdist", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("jaxdist")
