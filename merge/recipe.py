"""The declared wish: which adapters, how strong, combined how, written how.

A recipe is what a person writes (YAML or JSON), what the hub stores and what every output carries.
Its digest names the result: it covers the inputs by SHA-256 and never by name, so two people who
hold the same files under different names get the same digest. docs/merging.md explains each field.
"""

import hashlib
import json
import re
from collections.abc import Hashable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self, TypeVar, get_args

import yaml
from pydantic import Field, StringConstraints, ValidationError, model_validator
from pydantic_core import ErrorDetails

from merge.errors import BadRecipe
from merge.method_parameters import Linear, Method, Part, Space

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Strength = Annotated[float, Field(allow_inf_nan=False)]
Glob = Annotated[str, StringConstraints(min_length=1)]


class Pinned(Part):
    """The bytes behind a REF: the file's SHA-256 and, for a PEFT file, its config's."""

    sha256: Sha256
    config_sha256: Sha256 | None = None


class Source(Part):
    """A file named by a REF, by its SHA-256, or both; the SHA-256 decides."""

    ref: str | None = Field(None, min_length=1, description="where to find the file")
    sha256: Sha256 | None = Field(None, description="what the file must be")
    config_sha256: Sha256 | None = Field(
        None, description="of the adapter_config.json that holds a PEFT file's alphas"
    )

    @model_validator(mode="after")
    def _is_named(self) -> Self:
        if self.ref is None and self.sha256 is None:
            raise ValueError("needs a ref or a sha256")
        return self

    @property
    def name(self) -> str:
        """The key of this source in the `files` that a plan is given."""
        return self.ref if self.ref is not None else f"sha256:{self.sha256}"


class Chosen(Source):
    """A file of which some modules may be left out."""

    leave_out: tuple[Glob, ...] = Field(
        (), description="globs on component.module: modules that may be left out, and are"
    )
    only: tuple[Glob, ...] = Field(
        (), description="globs on component.module: all other modules are left out"
    )

    def leaves_out(self, component: str, module: str) -> bool:
        name = f"{component}.{module}"
        is_named = any(fnmatchcase(name, glob) for glob in self.leave_out)
        return is_named or (
            bool(self.only) and not any(fnmatchcase(name, glob) for glob in self.only)
        )


class Input(Chosen):
    """One adapter and how strongly it takes part."""

    strength: Strength = Field(1.0, description="W' = W + strength * delta")
    components: dict[str, Strength] = Field(
        {}, description="a strength of its own for a component, in place of `strength`"
    )
    blocks: dict[Glob, Strength] = Field(
        {}, description="glob on component.module -> factor; every match multiplies"
    )
    vectors: Source | None = Field(
        None, description="strengths for every direction, row or column of a module"
    )

    def strength_at(self, component: str, module: str) -> float:
        """The strength of this input on one module: the component's own, times every block's."""
        strength = self.components.get(component, self.strength)
        for glob, factor in sorted(self.blocks.items()):
            if fnmatchcase(f"{component}.{module}", glob):
                strength *= factor
        return strength


class Rank(Part):
    """How large the merged factors are; exactly one of the five is said."""

    fixed: int | None = Field(None, ge=1, description="the best result of this rank per module")
    energy: float | None = Field(
        None, gt=0, le=1, description="keep this share of each module's squared norm"
    )
    budget_bytes: int | None = Field(
        None, ge=1, description="the best ranks over all modules within these bytes of factors"
    )
    shared: int | None = Field(
        None, ge=1, description="as many numbers as this rank everywhere, at the best ranks"
    )
    exact: Literal[True] | None = Field(None, description="ranks add up, nothing is lost")

    @model_validator(mode="after")
    def _is_one_choice(self) -> Self:
        if len(self.model_fields_set) != 1 or None in self.model_dump(exclude_unset=True).values():
            raise ValueError("needs exactly one of fixed, energy, budget_bytes, shared, exact")
        return self


class Output(Part):
    """How the result is written."""

    dialect: Literal["kohya", "diffusers", "peft", "comfy"] | None = Field(
        None, description="of a merge; by default the inputs' own, or kohya where they differ"
    )
    dtype: Literal["keep", "float16", "bfloat16", "float32"] = Field(
        "keep", description="keep: a bake keeps each tensor's, a merge takes what holds all inputs"
    )
    allow_loss: Literal[True] | None = Field(
        None, description="of a bake into 8-bit weights, which may lose most of the change"
    )


class Recipe(Part):
    """What is made of which files: merge (adapters -> adapter), bake (base + adapters -> checkpoint),
    extract (tuned checkpoint - base -> adapter), resize (an adapter at another rank).
    """

    schema_: Literal[1] = Field(1, alias="schema", description="version of this format")
    kind: Literal["merge", "bake", "extract", "resize"]
    base: Source | None = Field(
        None, description="the checkpoint that a bake changes, or that changes are evaluated on"
    )
    tuned: Chosen | None = Field(
        None, description="the checkpoint that an adapter is extracted from"
    )
    inputs: tuple[Input, ...] = ()
    method: Method = Linear()
    rank: Rank = Rank(exact=True)
    output: Output = Output()
    seed: int = Field(0, ge=0, lt=2**63, description="for methods that draw random numbers")
    numerics: Literal["fast", "reproducible"] = Field(
        "fast", description="reproducible: float64, the same bytes for any number of threads"
    )

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        is_extract = self.kind == "extract"
        _refuse(
            is_extract and bool(self.inputs), "inputs", "an extraction has none: base and tuned"
        )
        _refuse(not is_extract and not self.inputs, "inputs", "needs at least one adapter")
        _refuse(is_extract != (self.tuned is not None), "tuned", _TUNED[is_extract])
        _refuse(is_extract and self.base is None, "base", "an extraction needs what was tuned")
        _refuse(is_extract and self.rank.exact is not None, "rank", "a difference has full rank")
        if self.kind == "resize":
            is_one = len(self.inputs) == 1 and self.inputs[0].strength == 1.0
            _refuse(not is_one, "inputs", "a resize has one adapter, at strength 1")
            is_exact = self.rank.exact is not None
            _refuse(is_exact, "rank", "a resize needs a rank, an energy or a size")
        if self.kind in ("extract", "resize"):
            _refuse(self.method != Linear(), "method", f"{self.kind} combines nothing")
        if self.kind == "bake":
            _refuse(self.base is None, "base", "a bake needs the checkpoint it changes")
            _refuse(self.rank != Rank(exact=True), "rank", "a bake writes no factors")
            is_kept = self.output.model_copy(update={"allow_loss": None}) == Output()
            _refuse(not is_kept, "output", "a bake keeps the base's layout and dtypes")
        else:
            is_said = self.output.allow_loss is not None
            _refuse(is_said, "output.allow_loss", f"a {self.kind} writes no 8-bit weights")
            is_full = self.method.space is Space.ELEMENTS and self.rank.exact is not None
            detail = (
                f"{self.method.name} makes changes of full rank, which no adapter holds exactly; "
                "say a rank or an energy, or bake them"
            )
            _refuse(is_full, "rank", detail)
        return self

    @classmethod
    def parse(cls, value: Any) -> Self:
        """Check a parsed document; BadRecipe names the first wrong field."""
        try:
            # Through JSON, because only there a strict tuple accepts a list.
            return cls.model_validate_json(json.dumps(value))
        except ValidationError as error:
            _raise_first(error)
        except (TypeError, ValueError, RecursionError) as error:
            raise BadRecipe("", f"is not plain data: {error}") from error

    @classmethod
    def load(cls, source: Path | str) -> Self:
        """Read a recipe from a file, or from the text itself; YAML or JSON."""
        text = _read(source) if isinstance(source, Path) else source
        try:
            if text.lstrip().startswith("{"):
                value = json.loads(text, object_pairs_hook=_without_repeats)
            else:
                value = yaml.load(text, Loader=_Loader)  # a SafeLoader that refuses more
        except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
            raise BadRecipe("", f"is neither YAML nor JSON: {_why(error)}") from error
        return cls.parse(value)

    def refs(self) -> list[str]:
        """The distinct names a plan needs files for, the base first."""
        return list(dict.fromkeys(source.name for _, source in self.sources()))

    def pin(self, pins: Mapping[str, Pinned]) -> Self:
        """This recipe with the SHA-256 of every source filled in.

        A source that already has another SHA-256 is refused: the file is not what was meant.
        """
        inputs = tuple(
            _pinned_input(source, pins, f"inputs[{i}]") for i, source in enumerate(self.inputs)
        )
        base = _pinned(self.base, pins, "base") if self.base else None
        tuned = _pinned(self.tuned, pins, "tuned") if self.tuned else None
        return self.model_copy(update={"inputs": inputs, "base": base, "tuned": tuned})

    def canonical_json(self) -> str:
        """The text the digest is taken of: sorted keys, no names, inputs in a fixed order.

        Inputs are sorted by content because a sum has no order; execution follows this order.
        """
        for param, source in self.sources():
            if source.sha256 is None:
                raise BadRecipe(f"{param}.sha256", "is not known yet, so there is no digest")
        document = self.model_dump(mode="json", by_alias=True, exclude={"base", "tuned", "inputs"})
        for field in ("method", "rank", "output"):
            document[field] = _without_absent(document[field])
        document["inputs"] = [_nameless(self.inputs[i]) for i in self.in_canonical_order()]
        for field, checkpoint in (("base", self.base), ("tuned", self.tuned)):
            if checkpoint is not None:
                document[field] = _nameless(checkpoint)
        return _canonical(document)

    def digest(self) -> str:
        return "sha256:" + hashlib.sha256(self.canonical_json().encode()).hexdigest()

    def in_canonical_order(self) -> tuple[int, ...]:
        """Indices of `inputs` in the order that `canonical_json` and execution use."""
        return tuple(
            sorted(range(len(self.inputs)), key=lambda i: _canonical(_nameless(self.inputs[i])))
        )

    def to_yaml(self) -> str:
        """For people and for `graft recipe run`: names and digests, defaults left out."""
        document = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        if "method" in document:  # linear is the default, but not its options
            document["method"] = {"name": self.method.name, **document["method"]}
        return yaml.safe_dump(
            {"schema": self.schema_, **document}, sort_keys=False, allow_unicode=True
        )

    def sources(self) -> list[tuple[str, Source]]:
        """Every file that is named, with its place in the recipe, the base first."""
        found: list[tuple[str, Source | None]] = [("base", self.base), ("tuned", self.tuned)]
        for i, source in enumerate(self.inputs):
            found += [(f"inputs[{i}]", source), (f"inputs[{i}].vectors", source.vectors)]
        return [(param, source) for param, source in found if source is not None]


_TUNED = ("only an extraction has it", "an extraction needs the checkpoint to take from")


def _refuse(condition: bool, param: str, detail: str) -> None:
    # A validator may raise anything but ValueError and AssertionError past pydantic.
    if condition:
        raise BadRecipe(param, detail)


def _raise_first(error: ValidationError) -> NoReturn:
    first, *others = error.errors(include_url=False, include_input=False)
    path = ""
    for step in _steps(first):
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else str(step)
    # pydantic adds that a list is too short for every list that holds something wrong.
    more = sum(other["loc"] != first["loc"][: len(other["loc"])] for other in others)
    says = first["msg"]
    if first["type"] == "union_tag_not_found":
        says = "Field required"
    elif first["type"] == "union_tag_invalid":
        says = f"Input should be {first['ctx']['expected_tags']}"
    elif first["type"] == "extra_forbidden":
        says = _unknown(first["loc"])
    detail = says.removeprefix("Value error, ") + (f" (and {more} more)" if more else "")
    raise BadRecipe(path, detail) from error


_METHODS = {
    get_args(its.model_fields["name"].annotation)[0]: its for its in get_args(get_args(Method)[0])
}


def _unknown(steps: tuple[int | str, ...]) -> str:
    """Of a field that there is not; of a method's, which there are."""
    if steps[0] != "method" or len(steps) < 3:
        return "there is no such field"
    fields = _METHODS[str(steps[1])].model_fields
    known = ", ".join(name for name in fields if name != "name")
    return f"{steps[1]} has no such parameter; it has {known or 'none'}"


def _steps(error: ErrorDetails) -> tuple[int | str, ...]:
    """Where in the document; pydantic names the method that was chosen as if it were a field."""
    steps = error["loc"]
    if error["type"].startswith("union_tag"):
        return (*steps, "name")
    return (steps[0], *steps[2:]) if len(steps) > 1 and steps[0] == "method" else steps


SourceT = TypeVar("SourceT", bound=Source)


def _pinned(source: SourceT, pins: Mapping[str, Pinned], param: str) -> SourceT:
    pin = pins.get(source.name)
    if pin is None:
        return source
    for field, said, found in (
        ("sha256", source.sha256, pin.sha256),
        ("config_sha256", source.config_sha256, pin.config_sha256),
    ):
        if said is not None and said != found:
            raise BadRecipe(f"{param}.{field}", f"says {said}, but {source.name} is {found}")
    return source.model_copy(update=pin.model_dump())


def _pinned_input(source: Input, pins: Mapping[str, Pinned], param: str) -> Input:
    pinned = _pinned(source, pins, param)
    if pinned.vectors is None:
        return pinned
    vectors = _pinned(pinned.vectors, pins, f"{param}.vectors")
    return pinned.model_copy(update={"vectors": vectors})


def _nameless(source: Source) -> dict[str, Any]:
    document = source.model_dump(mode="json", exclude={"ref"})
    if document.get("vectors"):
        document["vectors"] = {"sha256": document["vectors"]["sha256"]}
    for field in ("leave_out", "only"):
        if field in document:  # globs select together, in whatever order and however often
            document[field] = sorted(set(document[field]))
    return _without_absent(document)


def _without_absent(document: dict[str, Any]) -> dict[str, Any]:
    # What is absent is not written, so that a field added later changes no old digest.
    return {key: value for key, value in document.items() if value not in (None, {}, [])}


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadRecipe("", f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadRecipe("", f"{path} is not text") from error


def _why(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"{error.problem} in line {error.problem_mark.line + 1}"
    return " ".join(str(error).split()) or type(error).__name__


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(k for k in keys if keys.count(k) > 1)!r} is said twice")
    return document


class _Loader(yaml.SafeLoader):
    """YAML without aliases (they can blow up) and without keys that are said twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed in a recipe")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        pairs = [(self.construct_object(key, deep=True), value) for key, value in node.value]
        _without_repeats(pairs)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-3 as text; JSON and YAML 1.2 read a number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)
