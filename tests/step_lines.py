"""How far a running parameter server has come, read from the lines its scheduler writes."""

import json
import pathlib


def last_step(run_dir):
    """Return the newest finished step of a run; the file has one or two lines a step, the last perhaps half written."""
    path = pathlib.Path(run_dir) / "ps" / "steps.jsonl"
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(whole[-1])["step"] if whole else 0
