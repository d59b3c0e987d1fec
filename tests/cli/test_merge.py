"""graft merge, bake and recipe run as commands, on the pipeline that comes with the project."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from merge.families import FAMILIES
from merge.formats.hashes import sha256_file
from merge.recipe import Recipe
from tests.fixtures.engine import MadeAdapter, load_deltas, make_adapter, some_of

ROOT = Path(__file__).parents[2]
PIPELINE = ROOT / "train" / "tiny" / "pipeline"
FAMILY = FAMILIES["tiny-sd"]
NAMES = some_of(FAMILY)


@pytest.fixture
def ink(tmp_path: Path) -> MadeAdapter:
    return make_adapter(tmp_path / "ink.safetensors", FAMILY, NAMES, rank=4)


@pytest.fixture
def robot(tmp_path: Path) -> MadeAdapter:
    return make_adapter(tmp_path / "robot.safetensors", FAMILY, NAMES, rank=6, seed=2)


def graft(folder: Path, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "cli", *map(str, arguments)]
    done = subprocess.run(
        command,
        check=False,
        cwd=folder,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(folder)},
    )
    assert "Traceback" not in done.stderr
    return done


def refused(folder: Path, *arguments: str | Path, status: int = 1) -> str:
    """The one sentence of a failure, after which nothing has changed."""
    before = sorted(p.name for p in folder.iterdir())
    done = graft(folder, *arguments)
    assert done.returncode == status
    assert sorted(p.name for p in folder.iterdir()) == before
    (line,) = done.stderr.splitlines()
    return line


def test_merge_writes_the_adapter_and_its_recipe(
    tmp_path: Path, ink: MadeAdapter, robot: MadeAdapter
) -> None:
    done = graft(
        tmp_path,
        *("merge", "ink.safetensors=0.7", "robot.safetensors=-0.5", "-o", "out.safetensors"),
        *("--dtype", "float32", "--save-recipe", "recipe.yaml"),
    )
    assert done.returncode == 0
    found = load_deltas(tmp_path / "out.safetensors", FAMILY, NAMES)
    for name, change in found.items():
        wanted = 0.7 * ink.deltas[name] - 0.5 * robot.deltas[name]
        assert abs(change - wanted).max() < 1e-6
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    digest = sha256_file(tmp_path / "out.safetensors")
    assert "exact, but for storage rounding" in done.stdout
    assert f"recipe  {recipe.digest()}" in done.stdout
    assert f"output  sha256:{digest}" in done.stdout
    again = graft(tmp_path, "recipe", "run", "recipe.yaml", "-o", "again.safetensors")
    assert again.returncode == 0
    assert sha256_file(tmp_path / "again.safetensors") == digest


def test_a_method_and_its_parameters_reach_the_recipe(
    tmp_path: Path, ink: MadeAdapter, robot: MadeAdapter
) -> None:
    done = graft(
        tmp_path,
        *("merge", "ink.safetensors=0.7", "robot.safetensors=0.5", "-o", "out.safetensors"),
        *("--method", "ties", "--param", "density=0.5", "--param", "vote=count", "--rank", "4"),
        *("--only", "unet.*", "--seed", "7", "--save-recipe", "recipe.yaml"),
    )
    assert done.returncode == 0, done.stderr
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    said = {"name": "ties", "density": 0.5, "vote": "count", "combine": "mean", "scale": 1.0}
    assert recipe.method.model_dump() == said
    assert recipe.seed == 7
    assert all(source.only == ("unet.*",) for source in recipe.inputs)
    assert "method  ties (density 0.5, vote count" in done.stdout
    assert "of what ties gives" in done.stdout
    done = graft(
        tmp_path,
        *("merge", "ink.safetensors", "robot.safetensors", "-o", "dare.safetensors"),
        *("--method", "core_dare"),
    )
    assert "method  core_dare (density 0.5, elect false, scale 1.0)" in done.stdout


def test_shares_and_what_became_of_them_are_named(
    tmp_path: Path, ink: MadeAdapter, robot: MadeAdapter
) -> None:
    inputs = ("ink.safetensors=3", "robot.safetensors=1")
    done = graft(tmp_path, "merge", *inputs, "--normalise", "strengths", "-o", "out.safetensors")
    assert done.returncode == 0, done.stderr
    assert "ink.safetensors at 0.75" in done.stdout
    assert "robot.safetensors at 0.25" in done.stdout


def test_every_option_of_merge_reaches_the_recipe(
    tmp_path: Path, ink: MadeAdapter, robot: MadeAdapter
) -> None:
    done = graft(
        tmp_path,
        *("merge", "ink.safetensors", "robot.safetensors=0.5", "-o", "out.safetensors", "--json"),
        *("--rank", "3", "--block", "*.attn1.*=0.5", "--component", "text_encoder=0.4"),
        *("--leave-out", "*.fc1", "--to", "diffusers", "--dtype", "bfloat16", "--reproducible"),
        *("--save-recipe", "recipe.yaml"),
    )
    assert done.returncode == 0
    answer = json.loads(done.stdout)
    assert answer["plan"]["dialect"] == "diffusers"
    assert answer["certificate"]["left_out"]
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    assert answer["recipe_digest"] == recipe.digest()
    shared = {
        "components": {"text_encoder": 0.4},
        "blocks": {"*.attn1.*": 0.5},
        "leave_out": ["*.fc1"],
    }
    document = recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    assert [{k: v for k, v in i.items() if k != "sha256"} for i in document["inputs"]] == [
        {"ref": "ink.safetensors", **shared},
        {"ref": "robot.safetensors", "strength": 0.5, **shared},
    ]
    del document["inputs"]
    assert document == {
        "kind": "merge",
        "rank": {"fixed": 3},
        "output": {"dialect": "diffusers", "dtype": "bfloat16"},
        "numerics": "reproducible",
    }


def test_bake_writes_a_pipeline_that_differs_where_it_should(
    tmp_path: Path, ink: MadeAdapter
) -> None:
    done = graft(tmp_path, "bake", PIPELINE, "ink.safetensors=0.8", "-o", "baked")
    assert done.returncode == 0, done.stderr
    assert "values rounded once" in done.stdout
    before = load_file(next((PIPELINE / "unet").glob("*.safetensors")))
    after = load_file(next((tmp_path / "baked" / "unet").glob("*.safetensors")))
    changed = {key for key in before if not before[key].equal(after[key])}
    assert changed == {f"{module}.weight" for component, module in NAMES if component == "unet"}
    for component, module in NAMES:
        if component == "unet":
            change = after[f"{module}.weight"].double() - before[f"{module}.weight"].double()
            wanted = 0.8 * ink.deltas[component, module]
            assert abs(change.numpy() - wanted).max() < 2e-3 * abs(wanted).max() + 1e-3


def test_a_recipe_with_digests_alone_finds_its_files_by_content(
    tmp_path: Path, ink: MadeAdapter
) -> None:
    digest = sha256_file(ink.path)
    recipe = {"kind": "merge", "inputs": [{"sha256": digest, "strength": 0.5}]}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    told = refused(tmp_path, "recipe", "run", "recipe.json", "-o", "out.safetensors")
    missing = f"error: recipe.json: 1 file that it needs was not found: sha256:{digest} (give them"
    assert told.startswith(missing)
    done = graft(
        tmp_path,
        *("recipe", "run", "recipe.json", "--from", "ink.safetensors", "-o", "out.safetensors"),
    )
    assert done.returncode == 0
    assert (tmp_path / "out.safetensors").exists()


def test_a_peft_adapter_is_given_as_its_folder(tmp_path: Path) -> None:
    (tmp_path / "peft").mkdir()
    names = [name for name in NAMES if name[0] == "unet"]
    made = make_adapter(
        tmp_path / "peft" / "adapter_model.safetensors", FAMILY, names, alpha=6.0, dialect="peft"
    )
    done = graft(
        tmp_path,
        *("merge", "peft=2", "-o", "out.safetensors", "--to", "kohya", "--dtype", "float32"),
    )
    assert done.returncode == 0, done.stderr
    for name, change in load_deltas(tmp_path / "out.safetensors", FAMILY, names).items():
        assert abs(change - 2 * made.deltas[name]).max() < 1e-6


def test_a_peft_adapter_of_another_name_needs_its_configuration_too(tmp_path: Path) -> None:
    names = [name for name in NAMES if name[0] == "unet"]
    made = make_adapter(tmp_path / "ink.safetensors", FAMILY, names, alpha=6.0, dialect="peft")
    merge = ("merge", "ink.safetensors", "-o", "out.safetensors", "--dtype", "float32")
    done = graft(tmp_path, *merge, "--to", "kohya")
    assert done.returncode == 0, done.stderr
    for name, change in load_deltas(tmp_path / "out.safetensors", FAMILY, names).items():
        assert abs(change - made.deltas[name]).max() < 1e-6
    (tmp_path / "out.safetensors").unlink()
    (tmp_path / "adapter_config.json").unlink()
    done = graft(tmp_path, *merge, "--to", "kohya")
    assert done.returncode == 1
    assert "ink.safetensors: its adapter_config.json, which holds its alphas, is" in done.stderr
    assert not (tmp_path / "out.safetensors").exists()


MERGE = ["merge", "ink.safetensors", "-o", "x"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["merge", "nope.safetensors", "-o", "x"], "nope.safetensors: there is no such file"),
        ([*MERGE, "--block", "*.nope=1"], "error: --block *.nope: matches no module"),
        ([*MERGE, "--component", "vae=1"], "error: --component vae: matches no module"),
        ([*MERGE, "--leave-out", "*.nope"], "error: --leave-out *.nope: matches no module"),
        ([*MERGE, "--leave-out", "*"], "error: every module is left out"),
        ([*MERGE, "--budget", "1"], "error: --budget: the smallest module needs"),
        ([*MERGE, "--save-recipe", "ink.safetensors"], "is an input or the output"),
        (["merge", PIPELINE, "-o", "x"], "is a whole pipeline; name one of its files"),
        (["merge", PIPELINE / "vae", "-o", "x"], "depends on the base"),
        (["merge", PIPELINE / "tokenizer", "-o", "x"], "is a folder with no safetensors file"),
        (["merge", "ink.safetensors", "-o", "no/x"], "the folder no does not exist"),
        (["merge", "ink.safetensors", "-o", "ink.safetensors"], "is an input"),
        (
            [*MERGE[:2], "--leave-out", "text_encoder*", "--to", "peft", "-o", "x.safetensors"],
            "error: x.safetensors: the result is a folder; name it without .safetensors",
        ),
        (["bake", "ink.safetensors", "ink.safetensors", "-o", "x"], "it is an adapter, not"),
        (
            ["extract", "ink.safetensors", PIPELINE, "--rank", "4", "-o", "x"],
            "error: ink.safetensors: it is an adapter, not a checkpoint",
        ),
        (["bake", "nope", "ink.safetensors", "-o", "x"], "nope: there is no such file"),
        (["recipe", "run", "nope.yaml", "-o", "x"], "error: nope.yaml: there is no such file"),
        (
            ["recipe", "run", "ink.safetensors", "-o", "x"],
            "error: ink.safetensors: it carries no recipe",
        ),
        (["recipe", "run", PIPELINE, "-o", "x"], "error: pipeline: it carries no recipe"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    tmp_path: Path, ink: MadeAdapter, arguments: list[str | Path], says: str
) -> None:
    assert says in refused(tmp_path, *arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rank", "0"], "--rank: Input should be greater than or equal to 1"),
        (["--energy", "2"], "--energy: Input should be less than or equal to 1"),
        (["--rank", "2", "--exact"], "say one of --rank, --energy, --budget, --shared and --exact"),
        (["--method", "tie"], "--method: Input should be 'linear'"),
        (["--method", "ties"], "--rank, --energy, --budget, --shared: ties makes changes"),
        (["--method", "svc", "--param", "floor=2"], "--param floor: Input should be less than"),
        (["--param", "floor=1"], "--param floor: linear has no such parameter; it has normalise"),
        (
            ["--method", "svc", "--param", "flor=0.1"],
            "--param flor: svc has no such parameter; it has floor",
        ),
        (["--param", "floor"], "--param floor: write --param NAME=VALUE"),
        (["--normalise", "rank"], "--normalise: Input should be 'strengths' or 'energy'"),
        (["--vectors", "robot.safetensors=v"], "--vectors robot.safetensors=v: write"),
        (["--style-content"], "--style-content takes two adapters"),
        (["--to", "onnx"], "--to: Input should be 'kohya', 'diffusers', 'peft' or 'comfy'"),
        (["--dtype", "int8"], "--dtype: Input should be 'keep', "),
        (["--block", "attn"], "--block attn: write --block NAME=NUMBER"),
        (["--block", "*=nan"], "--block *: Input should be a finite number"),
        (["--leave-out", ""], "--leave-out: String should have at least 1 character"),
        (["ink.safetensors=nan"], "ink.safetensors=nan: a strength is a number, as in REF=0.8"),
        (["s3://bucket"], "s3://bucket: write s3://bucket/key"),
    ],
)
def test_what_cannot_be_meant_is_wrong_usage_and_names_the_argument(
    tmp_path: Path, ink: MadeAdapter, arguments: list[str], says: str
) -> None:
    line = refused(tmp_path, "merge", "ink.safetensors", *arguments, "-o", "x", status=2)
    assert line.startswith(f"error: {says}")


def test_a_wrong_recipe_is_named_with_its_field(tmp_path: Path, ink: MadeAdapter) -> None:
    recipe = tmp_path / "wish.yaml"
    recipe.write_text("kind: merge\ninputs: [{ref: ink.safetensors, strength: high}]")
    line = refused(tmp_path, "recipe", "run", "wish.yaml", "-o", "x")
    assert line == "error: wish.yaml: inputs[0].strength: Input should be a valid number"
    recipe.write_text("kind: merge\ninputs: [{ref: ink.safetensors, blocks: {nope: 1}}]")
    line = refused(tmp_path, "recipe", "run", "wish.yaml", "-o", "x")
    assert line.startswith("error: wish.yaml: inputs[0].blocks.nope: matches no module")


def test_nothing_is_replaced_unless_asked(tmp_path: Path, ink: MadeAdapter) -> None:
    out, recipe = tmp_path / "out.safetensors", tmp_path / "wish.yaml"
    recipe.write_text("kind: merge\ninputs: [{ref: ink.safetensors}]")
    unet = PIPELINE / "unet" / "diffusion_pytorch_model.safetensors"
    commands: list[list[str | Path]] = [
        ["merge", "ink.safetensors", "-o", out],
        ["bake", unet, "ink.safetensors", "-o", out, "--component", "unet=1"],
        ["recipe", "run", recipe, "-o", out],
        ["convert", "ink.safetensors", "--to", "comfy", "-o", out],
        ["merge", "ink.safetensors", "-o", "new.safetensors", "--save-recipe", out],
    ]
    commands[1] += ["--leave-out", "text_encoder.*"]
    (tmp_path / "folder").mkdir()
    for command in commands:
        out.write_text("mine")
        assert refused(tmp_path, *command) == f"error: {out} exists; --force replaces it"
        assert out.read_text() == "mine"
        done = graft(tmp_path, *command, "-f")
        assert done.returncode == 0, done.stderr
        assert out.read_bytes() != b"mine"
        if out in command[2:] and "--save-recipe" not in command:
            folder = [tmp_path / "folder" if its == out else its for its in command]
            assert "a folder of this name exists" in refused(tmp_path, *folder, "--force")


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("ink.safetensors", "is an input or the output"),
        ("out.safetensors", "is an input or the output"),
        ("nowhere/recipe.yaml", "there is no folder nowhere"),
        ("notes.txt", "notes.txt exists; --force replaces it"),
    ],
)
def test_a_recipe_is_saved_over_nothing_else(
    tmp_path: Path, ink: MadeAdapter, place: str, why: str
) -> None:
    (tmp_path / "notes.txt").write_text("precious")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    told = refused(
        tmp_path, "merge", "ink.safetensors", "-o", "out.safetensors", "--save-recipe", place
    )
    assert why in told
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_missing_source_of_a_recipe_is_named(tmp_path: Path, ink: MadeAdapter) -> None:
    graft(
        tmp_path,
        *("merge", "ink.safetensors", "-o", "a.safetensors", "--save-recipe", "recipe.yaml"),
    )
    told = refused(
        tmp_path,
        *("recipe", "run", "recipe.yaml", "--from", "nope.safetensors", "-o", "b.safetensors"),
    )
    assert told == "error: --from nope.safetensors: there is no such file or folder"


def test_planning_needs_no_torch(tmp_path: Path, ink: MadeAdapter) -> None:
    program = (
        "import sys; from pathlib import Path; from merge.plan import plan; "
        "from merge.recipe import Recipe; "
        "recipe = Recipe.load(sys.argv[1]); "
        "plan(recipe, {'i': Path('ink.safetensors'), 'b': Path(sys.argv[2])}); "
        "assert 'torch' not in sys.modules"
    )
    recipe = '{"kind": "bake", "base": {"ref": "b"}, "inputs": [{"ref": "i"}]}'
    command = [sys.executable, "-c", program, recipe, str(PIPELINE)]
    subprocess.run(command, check=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
