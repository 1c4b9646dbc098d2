"""jaxdist: data-parallel training of Flax models on many devices."""
