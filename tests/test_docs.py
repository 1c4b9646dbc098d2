"""The README and the guide are run: what they show happens, what they name exists, and the reference is the code's.

How a page is read (`docs/**/*.md` and `README.md`):

- The python blocks of a page run one after the other in one namespace, in a folder that has a copy of `experiments/`.
- A text block right after a python block is exactly what that block prints.
- `<!-- file: experiments/mine.py -->` before a python block: a file of that name, for what comes after it.
- `<!-- not run: why -->` before a python block: it is parsed only.
- Lines of any other block that begin with `jaxdist` are commands: they must parse, load the experiment they name and
  accept its settings.
"""

import argparse
import ast
import contextlib
import dataclasses
import importlib
import io
import json
import os
import pathlib
import pkgutil
import re
import shlex
import shutil
import sys
import tempfile
import typing
from collections.abc import Iterator

import jax
import optax
import pytest
import yaml

import jaxdist
from jaxdist import losses, optimizers, stop
from jaxdist.cli import selected_experiment
from jaxdist.cli.parser import make_parser
from jaxdist.config import experiment as config
from jaxdist.config import loading, parameter_server
from jaxdist.errors import ExitStatus
from jaxdist.models import cnn
from jaxdist.run import attempt, stopwatch
from jaxdist.rundir import record, writers
from jaxdist.spmd import strategies

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
REFERENCE = ROOT / "docs" / "reference.md"

BLOCK = re.compile(
    r"(?:<!-- (?P<mark>[^>]*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
COMMAND = re.compile(r"^(?: {4})?(?:\$ )?(?P<words>(?:[A-Z_]+=\S+ )*(?:jaxdist|python experiments/\S+).*?)(?:  +#.*)?$")
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
NAMED_FILE = re.compile(r"`((?:jaxdist|tests|experiments|benchmarks|docs)/[\w./]*\.(?:py|md))`")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the comment before it, and the output that the next block shows."""

    language: str
    text: str
    mark: str
    line: int
    output: str | None


def blocks(page: pathlib.Path) -> list[Block]:
    content = page.read_text()
    found = list(BLOCK.finditer(content))
    return [
        Block(
            match["language"],
            match["text"],
            match["mark"] or "",
            content.count("\n", 0, match.start("text")),
            _output_after(content, match, following),
        )
        for match, following in zip(found, [*found[1:], None])
    ]


def _output_after(content: str, block: re.Match[str], following: re.Match[str] | None) -> str | None:
    is_output = following is not None and following["language"] == "text" and following["mark"] is None
    return following["text"] if is_output and not content[block.end() : following.start()].strip() else None


def test_comments_before_blocks_are_known():
    marks = [block.mark for page in PAGES for block in blocks(page) if block.mark]
    assert [mark for mark in marks if not mark.startswith(("file: ", "not run: "))] == []


def page_id(page: pathlib.Path) -> str:
    return str(page.relative_to(ROOT))


@contextlib.contextmanager
def workspace(folder: pathlib.Path) -> Iterator[None]:
    """Work in a folder that looks like the repository to a reader, and forget afterwards what was imported there."""
    shutil.copytree(ROOT / "experiments", folder / "experiments", ignore=shutil.ignore_patterns("__pycache__"))
    modules, path, here = set(sys.modules), list(sys.path), os.getcwd()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        os.chdir(here)
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]


def write_files(page: pathlib.Path) -> None:
    for block in blocks(page):
        if block.mark.startswith("file: "):
            pathlib.Path(block.mark.removeprefix("file: ")).write_text(block.text)


def readme_names() -> dict[str, typing.Any]:
    """Return what the README's excerpts take as given."""
    source = jaxdist.ArraySource({"image": jax.numpy.zeros((8, 4)), "label": jax.numpy.zeros(8, int)})
    return {
        "jaxdist": jaxdist,
        "cnn": cnn,
        "losses": losses,
        "load_digits": lambda: (source, source),
        "init_fn": lambda key: jax.random.normal(key, (4,)),
        "loss_fn": lambda params, batch, key: (((batch["x"] * params) ** 2).mean(), {}),
        "optimizer": optax.sgd(0.1),
        "batch": {"x": jax.numpy.ones((16, 4))},
    }


FAST = ("concepts", "data", "first_run", "streams", "README")
"""Pages whose blocks run in seconds; those of the others train models and start processes."""


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page_id(page), marks=[] if page.stem in FAST else [pytest.mark.slow]) for page in PAGES],
)
def test_python_blocks_run_and_print_what_the_page_says(page, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # pages make directories and leave them
    names = readme_names() if page == README else {}
    names |= {"__name__": "page"}
    with workspace(tmp_path), jax.numpy_rank_promotion("allow"):
        write_files(page)
        for block in blocks(page):
            if block.language != "python":
                continue
            # The line numbers of a traceback are those of the page.
            code = ast.parse("\n" * block.line + block.text, filename=str(page))
            if block.mark.startswith(("file: ", "not run: ")):
                continue
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
                exec(compile(code, str(page), "exec"), names)
            if block.output is not None:
                assert printed.getvalue() == block.output, f"{page}, line {block.line}"
        if page == README:
            assert isinstance(names["get_config"](), jaxdist.Experiment)


def commands(page: pathlib.Path) -> list[list[str]]:
    """Return the words of each command that the page shows outside of python blocks, without `NAME=value` before it."""
    without_python = BLOCK.sub(lambda m: "" if m["language"] == "python" else m["text"], page.read_text())
    without_python = without_python.replace("\\\n", " ")
    found = [shlex.split(match["words"]) for match in map(COMMAND.match, without_python.splitlines()) if match]
    return [[word for index, word in enumerate(words) if index or "=" not in word] for words in found]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_parse_and_name_what_exists(page, tmp_path, monkeypatch):
    with workspace(tmp_path):
        write_files(page)
        for program, *words in commands(page):
            if program == "python":
                assert pathlib.Path(words[0]).is_file(), words[0]
                words = ["train", *words]
            elif program != "jaxdist":
                continue
            if "--help" in words:
                continue
            options = make_parser().parse_args(words)
            if hasattr(options, "assignments"):
                monkeypatch.syspath_prepend(str(tmp_path / "experiments"))
                assert selected_experiment.load(options).name


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_resolve(page):
    content = page.read_text()
    for target in LINK.findall(BLOCK.sub("", content)):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target
    for name in NAMED_FILE.findall(content):
        made_by_page = [block.mark for block in blocks(page) if block.mark == f"file: {name}"]
        assert made_by_page or (ROOT / name).exists(), name


ARCHITECTURE, CONTRIBUTING = ROOT / "docs" / "architecture.md", ROOT / "CONTRIBUTING.md"
NAMED_FOLDER = re.compile(r"`((?:jaxdist|tests|experiments|benchmarks|docs)/(?:[\w/]+/)?)`")
NAMED_CODE = re.compile(r"`([A-Za-z_]\w*)`")


def walks() -> dict[str, str]:
    """Return the walks of the architecture page, and its table of places, by their titles."""
    parts = re.split(r"^##+ (.*)$\n", ARCHITECTURE.read_text(), flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2]))
    names = ("Where to look", "A batch", "The gradients", "The state", "An experiment", "A push")
    return {name: sections[name] for name in names}


def defined_in(file: str) -> set[str]:
    """Return the names of all functions, classes and methods of a file."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, kinds)}


@pytest.mark.parametrize("title", walks())
def test_what_a_walk_through_the_code_names_is_there(title):
    """Where this fails, code was moved or renamed: walk the path again and correct docs/architecture.md."""
    text = walks()[title]
    files = NAMED_FILE.findall(text)
    known = set().union(*map(defined_in, files))
    assert files
    assert [file for file in files if not (ROOT / file).is_file()] == []
    assert [name for name in NAMED_CODE.findall(text) if name not in known] == []


@pytest.mark.parametrize("page", [ARCHITECTURE, CONTRIBUTING], ids=page_id)
def test_pages_for_maintainers_name_what_is_there(page):
    content = page.read_text()
    assert [name for name in NAMED_FOLDER.findall(content) if not (ROOT / name).is_dir()] == []
    assert [name for name in NAMED_FILE.findall(content) if not (ROOT / name).is_file() and "NAME" not in name] == []
    for words in re.findall(r"`python (\S+\.py)", content):
        assert (ROOT / words).is_file() or "NAME" in words, words


def parts_to_add() -> list[list[str]]:
    """Return the rows of the table of CONTRIBUTING: to add, write, touch, test."""
    rows = re.findall(r"^\| (?:a|an) .*\|$", CONTRIBUTING.read_text(), re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


@pytest.mark.parametrize("row", parts_to_add(), ids=lambda row: row[0])
def test_what_contributing_says_to_write_and_touch_is_there(row):
    """Names of code in a row are those of a file in the same row, or of a file below a folder that it names."""
    text = " ".join(row)
    named = [ROOT / name for name in NAMED_FILE.findall(text) if "NAME" not in name]
    for folder in re.findall(r"`((?:jaxdist|tests)/[\w/]+/)(?:NAME\.py)?`", text):
        named += (ROOT / folder).glob("*.py")
    content = "\n".join(path.read_text() for path in named)
    names = [name for name in NAMED_CODE.findall(text) if name != "NAME"]
    assert named
    assert [name for name in names if not re.search(rf"\b{name}\b", content)] == []


def anchors(page: pathlib.Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_every_page_is_reached_from_the_index():
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / target.partition("#")[0]).resolve() for target in LINK.findall(index.read_text())}
    missing = {page_id(page) for page in PAGES if page not in (README, index) and page not in linked}
    assert not missing, f"link them from docs/README.md: {missing}"


def nav_pages(entries: typing.Any) -> list[str]:
    """Return the pages of a navigation of mkdocs."""
    if isinstance(entries, str):
        return [entries]
    parts = entries.values() if isinstance(entries, dict) else entries
    return [page for part in parts for page in nav_pages(part)]


def test_every_page_is_in_the_site():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    docs = ROOT / "docs"
    assert sorted(nav_pages(nav)) == sorted(str(page.relative_to(docs)) for page in docs.rglob("*.md"))


@pytest.mark.parametrize("package", ["", ".testing", ".adapters", ".data", ".losses", ".optimizers"])
def test_the_api_pages_name_every_public_class_and_function(package):
    """Where this fails, a public name came, went or moved: name its place in docs/api/."""
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    shown = [pkgutil.resolve_name(name) for name in re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE)]
    module = importlib.import_module(f"jaxdist{package}")
    public = {name: getattr(module, name) for name in getattr(module, "__all__", vars(module))}
    ours = {
        name: each
        for name, each in public.items()
        if callable(each) and each.__module__.startswith("jaxdist") and not name.startswith("_") and name != "main"
    }
    assert len(ours) > 5
    missing = [
        name for name, each in ours.items() if not any(each in (place, vars(place).get(name)) for place in shown)
    ]
    assert missing == []


def table(title: str) -> list[list[str]]:
    """Return the rows, without the head, of the first table under the heading `title` of the reference."""
    section = re.search(rf"^#+ {re.escape(title)}$\n(.*?)(?=^#|\Z)", REFERENCE.read_text(), re.MULTILINE | re.DOTALL)
    assert section, f"docs/reference.md has no section {title!r}"
    rows = re.findall(r"^\|(.*)\|$", section[1], re.MULTILINE)
    # A vertical bar inside a cell is written \|.
    return [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row)] for row in rows[2:]]


def first_column(title: str) -> list[str]:
    return [row[0].strip("`") for row in table(title)]


DATACLASSES = (
    jaxdist.Experiment,
    jaxdist.Data,
    jaxdist.Optimizer,
    jaxdist.Schedule,
    jaxdist.Stop,
    jaxdist.Evaluation,
    jaxdist.Checkpoints,
    jaxdist.Guards,
    jaxdist.LayoutSettings,
    jaxdist.InitFrom,
    jaxdist.WeightRule,
    config.Recovery,
    parameter_server.ParameterServer,
)


@pytest.mark.parametrize("kind", DATACLASSES, ids=lambda kind: kind.__name__)
def test_reference_lists_the_fields_of(kind):
    """Where this fails, a field came, went or changed its default: say so in docs/reference.md."""
    assert [row[:2] for row in table(kind.__name__)] == [
        [f"`{field.name}`", default_text(field)] for field in dataclasses.fields(kind)
    ]


def default_text(field: dataclasses.Field) -> str:
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "required"
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return f"`{type(value).__name__}()`" if dataclasses.is_dataclass(value) else f"`{value!r}`"


def options_of(*names: str) -> list[str]:
    """Return the options of a command as the reference writes them: `--devices N`."""
    command = make_parser()
    for name in names:
        choices = next(action.choices for action in command._actions if action.choices and action.nargs == "A...")
        command = choices[name]
    shown = []
    for action in command._actions:
        option = action.option_strings[-1] if action.option_strings else ""
        if option in ("--help", "--traceback") or action.help == argparse.SUPPRESS:
            continue
        value = action.metavar or ("|".join(action.choices) if action.choices else "")
        shown.append(f"{option} {value}".strip() + (" ..." if option and action.nargs == "+" else ""))
    return shown


@pytest.mark.parametrize(
    "command",
    [
        "train",
        "launch",
        "verify",
        "chaos",
        "doctor",
        "data prepare",
        "data inspect",
        "runs",
        "sweep",
        "lr-range",
        "coordinate-check",
        "eval",
        "predict",
        "export",
    ],
    ids=lambda name: name.replace(" ", "-"),
)
def test_reference_lists_the_options_of(command):
    """Where this fails, an option came or went: say so in docs/reference.md."""
    assert sorted(first_column(f"jaxdist {command}")) == sorted(options_of(*command.split()))


def test_reference_lists_the_commands():
    """Where this fails, a command came or went: say so in docs/reference.md, and test its options above."""
    choices = next(action.choices for action in make_parser()._actions if action.choices and action.nargs)
    titles = re.findall(r"^### jaxdist ([\w-]+)", REFERENCE.read_text(), re.MULTILINE)
    assert set(titles) == set(choices)


def test_reference_lists_the_exit_statuses():
    assert set(map(int, first_column("Exit status"))) == set(ExitStatus)


def test_reference_lists_strategies_end_reasons_and_accounts():
    assert first_column("Strategies") == [*strategies.PURPOSES, *strategies.ELSEWHERE]
    assert first_column("End reasons") == list(record.END_REASONS)
    assert first_column("Accounts") == list(stopwatch.ACCOUNTS)


def test_reference_lists_the_optimizers_settings():
    assert first_column("Optimizers") == list(optimizers.SETTINGS)


def test_reference_lists_what_a_run_writes(tmp_path):
    """Where this fails, run.json or metrics.jsonl got or lost a key: say so in docs/reference.md."""
    experiment = loading.load_experiment(str(ROOT / "tests" / "tiny_experiment.py"))
    experiment = dataclasses.replace(experiment, stop=stop.Stop(max_steps=2))
    attempt.train(experiment, attempt.RunOptions(run_dir=tmp_path, silent=True), devices=jax.devices()[:1])
    assert first_column("run.json") == list(json.loads((tmp_path / record.FILE_NAME).read_text()))
    rows = [json.loads(line) for line in (tmp_path / writers.JSONL_NAME).read_text().splitlines()]
    names = {name for row in rows for name in row}
    assert set(first_column("metrics.jsonl")) == names


def test_the_architecture_page_names_every_folder():
    text = (ROOT / "docs" / "architecture.md").read_text()
    folders = {f"`{path.parent.relative_to(ROOT)}/`" for path in (ROOT / "jaxdist").rglob("*.py")}
    assert sorted(folder for folder in folders if f"| {folder} |" not in text) == []
