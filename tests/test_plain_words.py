"""Words that the project's texts do not use, each with the plain word for it, in code, comments and pages."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
PLAIN = {
    r"mend(s|ed|ing)?": "fix",
    r"go(es|ing)? on|went on|gone on": "continue",
    r"lie(s)?": "is stored, is",
    r"whoever": "the caller, a process that",
    r"nobody": "no process, no one",
    r"for ever": "forever",
    r"in vain": "say what did not happen within which time",
    r"lest": "so that no",
    r"world[ _]size": "number of processes or devices",
}
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")
FOLDERS = ("jaxdist", "docs", "experiments", "benchmarks", "tests")


def texts() -> list[pathlib.Path]:
    found = [
        path for folder in FOLDERS for kind in ("py", "md", "js", "html") for path in (ROOT / folder).rglob(f"*.{kind}")
    ]
    return [path for path in [*found, *(ROOT / name for name in PAGES)] if path != pathlib.Path(__file__)]


def test_texts_use_the_plain_words():
    word = re.compile(rf"\b({'|'.join(PLAIN)})\b", re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in texts()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for match in word.finditer(line)
    ]
    assert found == [], f"write instead: {PLAIN}"
