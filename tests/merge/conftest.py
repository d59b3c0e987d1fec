"""Shapes in the signatures of merge.algorithms and merge.methods are checked at every call."""

from jaxtyping import install_import_hook

install_import_hook(["merge.algorithms", "merge.methods"], "beartype.beartype")
