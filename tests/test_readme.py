"""The README keeps its promises: two commands, a short example, numbers and places that exist."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    "python -m pip install '.[cli]' && python -m fusedattn demo",
    "python -m pip install '.[testing]' && python -m pytest",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_each_set_up_command_stands_there_once_on_a_line_of_its_own(command):
    assert README.count(command) == 1
    assert README.splitlines().count(command) == 1


def test_there_are_exactly_two_set_up_commands():
    assert README.count("pip install") - README.count("`pip install` and import") == 2


def test_ci_runs_the_test_command_as_it_stands_there():
    script = (ROOT / ".ci/run").read_text()
    marker = re.search(r"^marker='(.+)'$", script, re.MULTILINE).group(1)
    after = README[README.index(f"<!-- {marker}") :].splitlines()
    assert after[1] == "```sh"
    assert after[2] == COMMANDS[1]
    assert COMMANDS[1] not in script, "the command must come from the README"


def test_it_opens_with_an_example_of_five_lines():
    first_block = README.split("```")[1]
    assert sum(line.startswith((">>>", "...")) for line in first_block.splitlines()) == 5
    assert README.index("```") < 200


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_extras_that_are_named_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = set()
    for path in ("README.md", "CONTRIBUTING.md", "examples/minilm/README.md"):
        for group in re.findall(r"'\.\[([a-z,]+)\]'", (ROOT / path).read_text()):
            named |= set(group.split(","))
    assert named
    assert named <= set(extras)
