import pathlib

import pytest

from jaxdist.launch.engines import choice, kubernetes, ray, slurm
from jaxdist.launch.engines.request import Request


def request(**settings):
    return Request(
        name="tiny",
        experiment=pathlib.Path("/runs/x.py"),
        arguments=(),
        run_dir=pathlib.Path("/runs/one"),
        settings=settings,
    )


@pytest.mark.parametrize(
    ("engine", "settings", "expected"),
    [
        ("slurm", {"time": "5"}, "#SBATCH --time=5"),
        ("kubernetes", {"image": "i", "claim": "c"}, "kind: JobSet"),
        ("ray", {"address": "here:1"}, "Ray cluster here:1"),
    ],
)
def test_each_engine_shows_what_it_would_start(engine, settings, expected):
    assert expected in choice.show(engine, request(**settings))


def test_an_engine_with_a_queue_gets_what_is_shown_and_the_user_the_number(monkeypatch, capsys):
    submitted = []
    monkeypatch.setattr(slurm, "submit", lambda request, text: submitted.append(text) or "17")
    monkeypatch.setattr(kubernetes, "submit", lambda text: submitted.append(text) or "jobset created")
    kube = request(image="i", claim="c")
    assert choice.start("slurm", request()) == choice.start("kubernetes", kube) == 0
    assert submitted == [choice.show("slurm", request()), choice.show("kubernetes", kube)]
    assert capsys.readouterr().out == "SLURM job 17; its output goes to /runs/one/slurm-17.log.\njobset created\n"


def test_on_ray_the_exit_status_is_that_of_the_job(monkeypatch, capsys):
    monkeypatch.setattr(ray, "run", lambda request, say: say("The job restarts.") or 75)
    assert choice.start("ray", request()) == 75
    assert capsys.readouterr().err == "jaxdist: The job restarts.\n"
