"""Errors of the merge engine. Each carries its data; its message is one sentence a user can act on.

MergeError
├── BadFile            not a valid safetensors file        .file .code
├── BadAdapter         the tensors do not form an adapter  .file
│   ├── UnknownKeys    keys nobody claims                  .keys
│   ├── MissingKeys    a factor without its partner        .keys
│   ├── UnknownModules modules the family does not have    .modules
│   ├── ShapeMismatch  factors or base do not fit          .module
│   ├── NotFinite      NaN or Inf in a tensor              .key
│   └── Unsupported    recognised, but not mergeable here  .why
├── BadCheckpoint      the base is not one we can bake     .file
├── BadRecipe          asks for something impossible       .param (path into the recipe)
├── BadHistory         what a file says it was made of is not true   .file
├── MissingSources     files that a recipe names are nowhere         .digests
├── Overflow           a value does not fit the output's dtype   .key
└── CannotWrite        the output could not be written     .file
"""

from collections.abc import Sequence


class MergeError(Exception):
    """Anything the engine refuses. `code` is stable; the message may change."""

    @property
    def code(self) -> str:
        return type(self).__name__


class BadFile(MergeError):
    """Not a valid safetensors file; `reason` is the stable name of the malformation class."""

    def __init__(self, file: str, reason: str, detail: str) -> None:
        super().__init__(f"{file}: {detail} ({reason})")
        self.file = file
        self.reason = reason


class BadAdapter(MergeError):
    """The tensors of `file` do not form an adapter we know."""

    def __init__(self, file: str, detail: str) -> None:
        super().__init__(f"{file}: {detail}")
        self.file = file


class UnknownKeys(BadAdapter):
    """Keys that no algorithm or dialect claims."""

    def __init__(self, file: str, keys: Sequence[str]) -> None:
        what = counted(keys, "key belongs", "keys belong")
        super().__init__(file, f"{what} to no known algorithm: {_some(keys)}")
        self.keys = tuple(keys)


class MissingKeys(BadAdapter):
    """A factor whose partner is not in the file."""

    def __init__(self, file: str, keys: Sequence[str]) -> None:
        what = counted(keys, "key is missing beside its partner", "keys are missing beside theirs")
        super().__init__(file, f"{what}: {_some(keys)}")
        self.keys = tuple(keys)


class UnknownModules(BadAdapter):
    """Modules that the family, or the base in hand, does not have."""

    def __init__(self, file: str, modules: Sequence[str], where: str) -> None:
        what = counted(modules, "module is", "modules are")
        super().__init__(file, f"{what} not in {where}: {_some(modules)}")
        self.modules = tuple(modules)


class ShapeMismatch(BadAdapter):
    """Two factors, or a delta and its base weight, do not fit."""

    def __init__(self, file: str, module: str, detail: str) -> None:
        super().__init__(file, f"{module}: {detail}")
        self.module = module


class NotFinite(BadAdapter):
    """NaN or Inf in a tensor that would enter the result."""

    def __init__(self, file: str, key: str) -> None:
        super().__init__(file, f"{key} holds NaN or Inf")
        self.key = key


class Unsupported(BadAdapter):
    """Recognised, but not something this command can do."""

    def __init__(self, file: str, why: str) -> None:
        super().__init__(file, why)
        self.why = why


class BadCheckpoint(MergeError):
    """The base is not a checkpoint in a layout we know."""

    def __init__(self, file: str, detail: str) -> None:
        super().__init__(f"{file}: {detail}")
        self.file = file


class BadRecipe(MergeError):
    """The recipe asks for something impossible; `param` is the path of the field in it, or ""."""

    def __init__(self, param: str, detail: str) -> None:
        super().__init__(f"recipe field {param}: {detail}" if param else f"recipe: {detail}")
        self.param = param
        self.detail = detail


class BadHistory(MergeError):
    """The recipe that a file carries is not the one its digest names, or cannot be read."""

    def __init__(self, file: str, detail: str) -> None:
        super().__init__(f"{file}: {detail}")
        self.file = file


class MissingSources(MergeError):
    """What a recipe was made of and neither was found nor can be made again, by SHA-256."""

    def __init__(self, file: str, digests: Sequence[str]) -> None:
        what = counted(digests, "file that it needs was", "files that it needs were")
        names = ", ".join(f"sha256:{digest}" for digest in digests)
        super().__init__(f"{file}: {what} not found: {names}")
        self.digests = tuple(digests)


class Overflow(MergeError):
    """A finite value became Inf when rounded to the output's dtype."""

    def __init__(self, file: str, key: str, dtype: str) -> None:
        super().__init__(f"{file}: {key} does not fit {dtype}; a wider dtype would hold it")
        self.key = key


class CannotWrite(MergeError):
    """The output could not be written; nothing was left behind."""

    def __init__(self, file: str, detail: str) -> None:
        super().__init__(f"{file}: {detail}; nothing was written")
        self.file = file


def counted(things: Sequence[object], one: str, more: str) -> str:
    """How many there are: "1 key", "2 keys"."""
    return f"{len(things)} {one if len(things) == 1 else more}"


def _some(names: Sequence[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
