"""What a plan will take, and the sizes that it is reckoned from."""

from dataclasses import dataclass

# Factors are written in one of these.
FACTOR_BYTES = {"F16": 2, "BF16": 2, "F32": 4}
DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
# Threads that a cost is reckoned for.
WORKERS = 2


@dataclass(frozen=True, slots=True)
class Cost:
    """Tensor bytes on disk, working memory, modules to compute."""

    modules: int
    bytes_to_write: int
    memory_bytes: int


def alpha_bytes(dialect: str) -> int:
    """What a module takes beside its factors: kohya and comfy store alphas, as float32."""
    return 4 if dialect in ("kohya", "comfy") else 0
