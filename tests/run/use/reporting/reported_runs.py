"""Run directories for tests of the report, written as a run would leave them."""

import json

from jaxdist.rundir import record


def write_run(run_dir, *, rows=3, config=None, events=(), extra=None, **fields):
    """Write a run of `rows` steps; `fields` are keys of its record."""
    run_dir.mkdir(parents=True)
    values = {
        "end_reason": "max_steps",
        "step": rows,
        "examples_seen": 16 * rows,
        "params_sha256": "ab" * 32,
        "metrics": {"train/loss": 0.5, "eval/accuracy": 0.75, "eval/confusion_0_0": 5.0, "eval/confusion_1_0": 2.0},
        "strategy": "data-parallel",
        "reduction": "mean",
        "num_devices": 2,
        "num_processes": 1,
        "examples_per_second": 1234.5,
        "step_seconds": {"p50": 0.0125, "p95": 0.5},
        "time_seconds": {"input": 1.0, "compute": 6.0, "compile": 3.0},
        "compile_count": 1,
        "restarts": 0,
        "config": config or {"optimizer": {"learning_rate": 0.1}},
        "versions": {"jax": "0.10.2"},
        "command": "jaxdist train x.py --run-dir runs/a --resume --set a=1",
    } | fields
    record.RunRecord(**values, extra=extra or {}).write(run_dir)
    metrics = [
        {"step": step, "examples_seen": 16 * step, "seconds": step / 4, "train/loss": 1 / step, "train/grad_norm": 2.0}
        for step in range(1, rows + 1)
    ]
    metrics[-1]["eval/loss"] = metrics[-1]["eval/accuracy"] = 0.75
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    if events:
        (run_dir / "restarts.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return run_dir


KILLED = (
    {"event": "start", "time": 100.0, "monotonic": 100.0, "process_ids": [7], "attempt": 0},
    {"event": "end", "time": 130.0, "monotonic": 130.0, "attempt": 0, "status": 137, "failed": 1, "saved": 2},
    {"event": "start", "time": 131.0, "monotonic": 131.0, "process_ids": [7], "attempt": 1},
    {"event": "end", "time": 140.0, "monotonic": 140.0, "attempt": 1, "status": 0, "failed": None, "saved": 3},
)
SERVERS = {"updates": 80, "failovers": 1, "rollbacks": 0, "fenced": 2, "duplicates_refused": 3, "torn_pushes": 0}
