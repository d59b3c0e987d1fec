"""graft report as a command, on the demo catalogue's adapters and the tiny pipeline."""

import json
from pathlib import Path

import pytest

from merge.method_parameters import Linear
from merge.recipe import Rank, Recipe
from merge.reports.measure import measure
from tests.cli.test_merge import ROOT, graft, refused
from tests.fixtures.engine import make_recipe

DEMO = ROOT / "train" / "demo" / "catalogue" / "demo"
PIPELINE = ROOT / "train" / "tiny" / "pipeline"
BORDO = DEMO / "bordo-style" / "bordo-style.safetensors"
CHEX = DEMO / "chex-style" / "chex-style.safetensors"


def test_json_is_the_whole_report(tmp_path: Path) -> None:
    done = graft(tmp_path, "report", f"{BORDO}=0.8", f"{CHEX}=-0.6", "--rank", "3", "--json")
    assert done.returncode == 0
    found = json.loads(done.stdout)
    recipe, files = make_recipe([(BORDO, 0.8), (CHEX, -0.6)], rank={"fixed": 3})
    wanted = json.loads(json.dumps(measure(recipe, files).to_json()))
    for its in wanted["inputs"]:
        its["sha256"] = None
    assert found == wanted
    assert [its["strength"] for its in found["inputs"]] == [0.8, -0.6]
    assert list(tmp_path.iterdir()) == []


def test_tables_fit_80_columns_and_say_what_they_mean(tmp_path: Path) -> None:
    four = [DEMO / name for name in ("bordo-style", "chex-style", "quil", "vexo")]
    done = graft(tmp_path, "report", *four, "--base", PIPELINE, "--rank", "4")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert [line for line in lines if len(line) > 80 and "graft merge" not in line] == []
    for words in (
        "bordo-style × chex-style",
        "up_blocks.1",
        "bfloat16",
        "← output, base",
        "a lower rank leaves out",
        "method linear",
        "nothing was written",
    ):
        assert words in done.stdout, words
    (command,) = [line for line in lines if line.startswith("graft merge")]
    assert command.endswith("-o merged.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_the_command_that_is_suggested_works(tmp_path: Path) -> None:
    done = graft(tmp_path, "report", f"{BORDO}=0.8", f"{CHEX}=0.6")
    (command,) = [line for line in done.stdout.splitlines() if line.startswith("graft merge")]
    assert graft(tmp_path, *command.split()[1:]).returncode == 0
    assert (tmp_path / "merged.safetensors").exists()


def test_one_adapter_alone_has_a_report_too(tmp_path: Path) -> None:
    done = graft(tmp_path, "report", BORDO)
    assert done.returncode == 0
    assert "cosine" not in done.stdout
    assert "there is nothing to combine it with" in done.stdout


def test_names_are_printed_as_they_are(tmp_path: Path) -> None:
    odd = tmp_path / "[red]a\x1b[0m.safetensors"
    odd.write_bytes(BORDO.read_bytes())
    done = graft(tmp_path, "report", odd.name, CHEX)
    assert done.returncode == 0
    assert "[red]a\N{REPLACEMENT CHARACTER}[0m" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--rank", "4", "--energy", "0.9"], 2, "say one of"),
        (["--rank", "0"], 2, "--rank: "),
        (["--block", "*nowhere*=1"], 1, "--block *nowhere*: matches no module"),
        (["--to", "word"], 2, "--to: "),
        (["--html", "no/page.html"], 1, "no/page.html: the folder no does not exist"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    arguments: list[str], status: int, says: str, tmp_path: Path
) -> None:
    line = refused(tmp_path, "report", BORDO, CHEX, *arguments, status=status)
    assert says in line


def test_a_file_that_is_no_adapter_is_named(tmp_path: Path) -> None:
    (tmp_path / "words.safetensors").write_text("words", "utf-8")
    assert "words.safetensors" in refused(tmp_path, "report", BORDO, "words.safetensors")


def test_auto_takes_what_is_suggested_and_says_why(tmp_path: Path) -> None:
    done = graft(
        tmp_path, "merge", BORDO, CHEX, "--auto", "-o", "out.safetensors", "--save-recipe", "r.yaml"
    )
    assert done.returncode == 0
    found = measure(*make_recipe([(BORDO, 1.0), (CHEX, 1.0)])).suggestion
    assert found is not None
    printed = " ".join(done.stdout.split())
    for reason in found.reasons:
        assert f"auto {reason}" in printed
    recipe = Recipe.load(tmp_path / "r.yaml")
    assert recipe.method.name == found.method["name"]
    assert recipe.rank.model_dump(exclude_unset=True) == found.rank
    assert tuple(source.strength for source in recipe.inputs) == found.strengths


def test_what_was_said_wins_over_what_is_suggested(tmp_path: Path) -> None:
    """One adapter twice would be scaled to its energy and get a shared rank."""
    twice = tmp_path / "twice.safetensors"
    twice.write_bytes(BORDO.read_bytes())
    asked = ["merge", f"{BORDO}=1", twice, "--auto", "-o", "out.safetensors", "--json"]
    done = graft(tmp_path, *asked, "--save-recipe", "auto.yaml")
    assert json.loads(done.stdout)["certificate"]["method"]
    assert "scaled back" in " ".join(done.stderr.split())
    free = Recipe.load(tmp_path / "auto.yaml")
    assert free.method == Linear(normalise="energy")
    assert free.rank.shared is not None
    said = ["--method", "linear", "--rank", "2", "--force", "--save-recipe", "said.yaml"]
    assert graft(tmp_path, *asked, *said).returncode == 0
    recipe = Recipe.load(tmp_path / "said.yaml")
    assert (recipe.method, recipe.rank) == (Linear(), Rank(fixed=2))


def test_auto_takes_a_rank_that_the_said_method_can_have(tmp_path: Path) -> None:
    """The sizes and errors that a report knows are those of the sum alone."""
    for method, energy in (("ties", 0.99), ("slerp", 0.9999)):
        asked = ["merge", BORDO, CHEX, "--auto", "--method", method, "-o", f"{method}.safetensors"]
        done = graft(tmp_path, *asked, "--save-recipe", f"{method}.yaml")
        assert done.returncode == 0, done.stderr
        recipe = Recipe.load(tmp_path / f"{method}.yaml")
        assert (recipe.method.name, recipe.rank.energy) == (method, energy)
        assert f"auto rank energy {energy}" in " ".join(done.stdout.split())


def test_a_report_takes_every_method_without_a_rank(tmp_path: Path) -> None:
    asked = ["report", BORDO, CHEX, "--json", "--method"]
    plain, ties = (graft(tmp_path, *asked, method) for method in ("linear", "ties"))
    assert json.loads(ties.stdout)["method"] == "ties"
    assert json.loads(ties.stdout)["total"] == json.loads(plain.stdout)["total"]
