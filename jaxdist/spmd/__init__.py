"""SPMD training on a mesh: layouts, state, steps and exact averages. The ground floor: imports nothing of ours."""
