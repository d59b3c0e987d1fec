"""mergekit's YAML (0.1.4), where every model is one base with a LoRA on it: `base+lora`.

mergekit adds the LoRA to the base, merges whole models, and writes a whole model: here that is a
bake of the changes into the base. docs/recipes.md has the table of what becomes what.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge.errors import BadRecipe
from merge.imports.naming import Imported, Named, Resolve, Wanted
from merge.imports.settings import Setting, as_blocks, constant, is_constant, strength_table
from merge.recipe import Recipe

_FIELDS = {
    *("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer", "chat_template", "modules"),
}
# Methods of one family: what makes changes sparse, whether signs are elected, and whether what is
# left is divided by the sum of weights where `normalize` does not say.
_ARITHMETIC = {
    "task_arithmetic": (None, False, False),
    "ties": ("ties", True, True),
    "dare_linear": ("dare", False, False),
    "dare_ties": ("dare", True, False),
    "breadcrumbs": ("breadcrumbs", False, False),
    "breadcrumbs_ties": ("breadcrumbs", True, False),
    "della": ("della", True, True),
    "della_linear": ("della", False, False),
}
_SPARSE = {
    "ties": {"density": 1.0},
    "dare": {"density": 1.0},
    "breadcrumbs": {"density": 1.0, "gamma": 0.01},
    "della": {"density": 1.0, "epsilon": 0.15},
}
_RESCALED = ("dare", "della")
_REFUSED = {
    "passthrough": "it stacks layers of models on each other",
    "nearswap": "it moves a whole model towards another where the two are near",
    "arcee_fusion": "it takes from a second whole model what differs most",
    "sce": "it keeps what varies most between models and weighs them by it",
    "multislerp": "it interpolates whole models on a sphere",
    "ram": "it keeps what only one model changed, which with adapters is nothing",
}
_ON_WHOLE_MODELS = (
    "mergekit's {} works on whole models, which with adapters on one base are so close to parallel "
    "that it comes to the straight line between them: so does this recipe. method: {{name: {}}} "
    "would work on the changes"
)


@dataclass(frozen=True, slots=True)
class _Model:
    """One entry of `models`: its adapter, or None where it is the base itself."""

    named: Named | None
    param: str
    parameters: Mapping[str, Setting]


def read(document: dict[str, Any], resolve: Resolve) -> Imported:
    """The bake that a configuration means."""
    method = str(document["merge_method"])
    if method in _REFUSED:
        why = f"{method} has no meaning for adapters on one base: {_REFUSED[method]}"
        raise BadRecipe("merge_method", why)
    if method not in (*_ARITHMETIC, *_OTHERS):
        raise BadRecipe("merge_method", f"{method!r} is no method of mergekit's that we know")
    for field in document:
        if field not in _FIELDS:
            raise BadRecipe(str(field), "is no field of mergekit's that we know")
    notes: list[str] = []
    entries, param = _entries(document, notes)
    base = _base_name(document, entries, param)
    models = [_model(its, f"{param}[{i}]", base, resolve) for i, its in enumerate(entries)]
    shared = _parameters(document.get("parameters"), "parameters")
    reader = _Reader(models, shared, notes)
    ours = reader.arithmetic(method) if method in _ARITHMETIC else _OTHERS[method](reader, document)
    for field in ("dtype", "out_dtype"):
        if document.get(field) is not None:
            notes.append(f"{field} {document[field]}: a bake keeps the base's own dtypes")
    for field in ("tokenizer_source", "tokenizer", "chat_template"):
        if document.get(field) is not None:
            notes.append(f"{field}: a bake copies the base's tokenizer as it is")
    reader.refuse_unused()
    inputs = [
        {**model.named.source(), **as_blocks(strengths, model.named.modules)}
        for model, strengths in zip(models, reader.strengths, strict=True)
        if model.named is not None
    ]
    found = resolve(Wanted(base, "base_model", what="base")).source()
    recipe = Recipe.parse({"kind": "bake", "base": found, "inputs": inputs, "method": ours})
    return Imported(recipe, "mergekit", tuple(notes))


def _entries(document: dict[str, Any], notes: list[str]) -> tuple[list[Any], str]:
    """The models, or the sources of the only slice, with their place in the configuration."""
    if document.get("modules") is not None:
        raise BadRecipe("modules", "models put together from several modules are no adapters")
    slices = document.get("slices")
    if slices is None:
        models = document.get("models")
        if not isinstance(models, list) or not models:
            raise BadRecipe("models", "is not a list of models")
        return models, "models"
    sources = slices[0].get("sources") if isinstance(slices, list) and len(slices) == 1 else None
    if not isinstance(sources, list) or not all(isinstance(its, dict) for its in sources):
        raise BadRecipe("slices", "several slices stack layers anew; only one slice is a merge")
    ranges = {str(its.get("layer_range")) for its in sources}
    if len(ranges) > 1 or not next(iter(ranges)).startswith("[0,"):
        raise BadRecipe("slices[0].sources", "not all of them are all layers of one model")
    notes.append(f"layer_range {ranges.pop()} is taken for all layers")
    extra = slices[0].keys() - {"sources"}
    if extra:
        raise BadRecipe(f"slices[0].{min(extra)}", "say it in parameters of the whole merge")
    return [{k: v for k, v in its.items() if k != "layer_range"} for its in sources], (
        "slices[0].sources"
    )


def _base_name(document: dict[str, Any], entries: Sequence[Any], param: str) -> str:
    """The one base that all models share."""
    bases: dict[str, str] = {}
    for i, its in enumerate(entries):
        model = its.get("model") if isinstance(its, dict) else None
        if not isinstance(model, str):
            raise BadRecipe(f"{param}[{i}].model", "is not the name of a model")
        bases.setdefault(model.partition("+")[0], f"{param}[{i}].model")
    said = document.get("base_model")
    if said is not None:
        # Of slerp the base is one of the two models, with its adapter.
        bases = {str(said).partition("+")[0]: "base_model"} | bases
    first, *others = bases
    for other in others:
        detail = f"{other} is another base than {first}; extract its change first (graft extract)"
        raise BadRecipe(bases[other], detail)
    return first


def _model(its: dict[str, Any], param: str, base: str, resolve: Resolve) -> _Model:
    unknown = its.keys() - {"model", "parameters"}
    if unknown:
        raise BadRecipe(f"{param}.{min(unknown)}", "is no field of a model that we know")
    _, plus, lora = its["model"].partition("+")
    named = resolve(Wanted(lora, f"{param}.model")) if plus else None
    return _Model(named, param, _parameters(its.get("parameters"), f"{param}.parameters"))


def _parameters(value: Any, param: str) -> dict[str, Setting]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadRecipe(param, "is not an object")
    return value


class _Reader:
    """Reads parameters as mergekit does: a model's own, else those of the whole merge.

    `strengths` are set by whoever reads a method: for every model its strength in each module.
    """

    def __init__(
        self, models: Sequence[_Model], shared: Mapping[str, Setting], notes: list[str]
    ) -> None:
        self.models, self.shared, self.notes = models, shared, notes
        self.adapters = [model for model in models if model.named is not None]
        self.strengths: list[dict[str, float]] = []
        self._used = {"int8_mask"}  # halves memory and changes nothing

    def refuse_unused(self) -> None:
        """What nobody has read means something that we would have ignored."""
        for parameters, param in (
            *((model.parameters, f"{model.param}.parameters") for model in self.models),
            (self.shared, "parameters"),
        ):
            for name in parameters:
                if name not in self._used:
                    raise BadRecipe(f"{param}.{name}", "is no parameter that we can say")

    def number(self, name: str, default: float) -> float:
        """A parameter that is one number for the whole merge."""
        self._used.add(name)
        said = set()
        for model in self.adapters:
            if name in model.parameters:
                said.add(constant(model.parameters[name], f"{model.param}.parameters.{name}"))
            else:
                said.add(constant(self.shared.get(name, default), f"parameters.{name}"))
        if len(said) > 1:
            values = ", ".join(f"{value:g}" for value in sorted(said))
            raise BadRecipe(f"parameters.{name}", f"one for all adapters can be said, not {values}")
        return said.pop()

    def flag(self, name: str, *, default: bool) -> bool:
        self._used.add(name)
        value = self.shared.get(name, default)
        if not isinstance(value, bool | int):
            raise BadRecipe(f"parameters.{name}", f"{value!r} is neither true nor false")
        return bool(value)

    def refuse(self, name: str, *, unless: bool, why: str) -> None:
        if self.flag(name, default=unless) != unless:
            raise BadRecipe(f"parameters.{name}", why)

    def weights(self, *, of_base: bool = False) -> list[dict[str, float]]:
        """Each model's weight in each module; one entry "" where they are the same everywhere."""
        self._used.add("weight")
        settings = []
        for model in self.models:
            place = f"{model.param}.parameters.weight"
            setting = model.parameters.get("weight", self.shared.get("weight"))
            if model.named is None and not of_base:
                setting = 0.0  # its change is nothing, and mergekit passes over it
            if setting is None:
                raise BadRecipe(place, "is missing")
            settings.append((setting, place))
        return self.table(settings)

    def table(self, settings: Sequence[tuple[Setting, str]]) -> list[dict[str, float]]:
        if all(is_constant(setting) for setting, _ in settings):
            return [{"": constant(setting, place)} for setting, place in settings]
        modules: dict[str, None] = {}
        for model in self.adapters:
            if model.named is None or model.named.modules is None:
                why = "filters and gradients need the adapters at hand; give their folder"
                raise BadRecipe(f"{model.param}.model", why)
            modules |= dict.fromkeys(model.named.modules)
        return strength_table(settings, list(modules), self.notes)

    def arithmetic(self, method: str) -> dict[str, Any]:
        """A method of the task arithmetic family."""
        sparse, elects, normalises = _ARITHMETIC[method]
        weights = self.weights()
        is_divided = self.flag("normalize", default=normalises)
        scale = self.number("lambda", 1.0)
        self.strengths = weights if not is_divided else self._shares(weights, elects=elects)
        if sparse is None:
            self.strengths = _times(self.strengths, scale)
            return {"name": "linear"}
        rescales = sparse in _RESCALED
        self.refuse(
            "rescale",
            unless=rescales,
            why=f"{method} {'without' if rescales else 'with'} rescaling cannot be said",
        )
        chosen = {name: self.number(name, default) for name, default in _SPARSE[sparse].items()}
        found: dict[str, Any] = {"name": sparse, **chosen, "scale": scale}
        if sparse != "ties":
            found["elect"] = elects
        if elects:
            found["combine"] = "mean" if is_divided else "sum"
        if rescales:
            self.notes.append(
                f"{method} draws other random numbers than mergekit and divides by the probability, "
                "where mergekit restores the sum of magnitudes of each draw"
            )
        return found

    def _shares(self, weights: list[dict[str, float]], *, elects: bool) -> list[dict[str, float]]:
        """Weights divided by their sum; or, where signs are elected, so that the mean of all that
        agree is mergekit's weighted mean.
        """
        count = len(self.adapters) if elects else 1
        found: list[dict[str, float]] = [{} for _ in weights]
        for module in weights[0]:
            total = sum(its[module] for its in weights)
            if abs(total) < 1e-8:
                raise BadRecipe("parameters.normalize", "the weights add up to 0")
            for its, shares in zip(weights, found, strict=True):
                shares[module] = its[module] * count / total
        own = [its for its, model in zip(found, self.models, strict=True) if model.named]
        if elects and any(its != own[0] for its in own):
            self.notes.append(
                "where only some adapters agree in sign mergekit takes their weighted mean, and "
                "this recipe the mean of their weighted changes; with equal weights both are one"
            )
        return found


def _times(strengths: list[dict[str, float]], scale: float) -> list[dict[str, float]]:
    return [{module: value * scale for module, value in its.items()} for its in strengths]


def _linear(reader: _Reader, document: dict[str, Any]) -> dict[str, Any]:
    """sum w_i W_i / sum w_i; with W_i = W + D_i the base stays whole."""
    weights = reader.weights(of_base=True)
    is_divided = reader.flag("normalize", default=True)
    if not is_divided:
        for module in weights[0]:
            total = sum(its[module] for its in weights)
            if abs(total - 1) > 1e-6:
                why = f"the weights add up to {total:g} without it, which would scale the base too"
                raise BadRecipe("parameters.normalize", why)
    reader.strengths = reader._shares(weights, elects=False) if is_divided else weights
    return {"name": "linear"}


def _slerp(reader: _Reader, document: dict[str, Any]) -> dict[str, Any]:
    """From the model that base_model names (t = 0) to the other one."""
    reader._used.add("t")
    if len(reader.models) != 2:
        raise BadRecipe("models", "slerp is between two models")
    if "t" not in reader.shared:
        raise BadRecipe("parameters.t", "is missing")
    (shares,) = reader.table([(reader.shared["t"], "parameters.t")])
    rest = {module: 1 - t for module, t in shares.items()}
    names = [_name_of(document, i) for i in range(2)]
    said = document.get("base_model")
    if said not in names:
        raise BadRecipe("base_model", "is neither of the two models, so t has no beginning")
    reader.strengths = [rest if name == said else shares for name in names]
    reader.notes.append(_ON_WHOLE_MODELS.format("slerp", "slerp"))
    return {"name": "linear"}


def _name_of(document: dict[str, Any], index: int) -> Any:
    entries = document.get("models") or document["slices"][0]["sources"]
    return entries[index]["model"]


def _nuslerp(reader: _Reader, document: dict[str, Any]) -> dict[str, Any]:
    """On changes where base_model is said, on whole models otherwise."""
    if len(reader.adapters) != 2:
        raise BadRecipe("models", "nuslerp is between two models with an adapter each")
    flat = "only layers as a whole can be turned, not their rows"
    reader.refuse("nuslerp_row_wise", unless=False, why=flat)
    reader.refuse("nuslerp_flatten", unless=True, why=flat)
    weights = reader.weights()
    if document.get("base_model") is None:
        reader.strengths = reader._shares(weights, elects=False)
        reader.notes.append(_ON_WHOLE_MODELS.format("nuslerp without a base_model", "slerp"))
        return {"name": "linear"}
    reader.strengths = weights
    return {"name": "slerp"}


def _karcher(reader: _Reader, document: dict[str, Any]) -> dict[str, Any]:
    """The centre of whole models, all counting the same."""
    reader._used |= {"max_iter", "tol"}
    reader.strengths = [{"": 1 / len(reader.models)} for _ in reader.models]
    reader.notes.append(_ON_WHOLE_MODELS.format("karcher", "karcher"))
    return {"name": "linear"}


def _model_stock(reader: _Reader, document: dict[str, Any]) -> dict[str, Any]:
    reader.refuse("filter_wise", unless=False, why="only layers as a whole are weighed here")
    reader.strengths = [{"": 1.0} for _ in reader.models]
    return {"name": "model_stock"}


_OTHERS = {
    "linear": _linear,
    "slerp": _slerp,
    "nuslerp": _nuslerp,
    "karcher": _karcher,
    "model_stock": _model_stock,
}
