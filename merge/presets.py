"""Names for lists of globs: `@style` in place of a pattern of `only`, `leave_out` or `blocks`.

What they select depends on the family, so the recipe keeps the name and planning looks it up.
"""

from collections.abc import Mapping

from merge.errors import BadRecipe
from merge.recipe import Input

# Frenkel et al. 2024, https://arxiv.org/abs/2403.14572: of SDXL's attention blocks one decides most of
# what is in the picture and the next most of how it looks.
_B_LORA = {
    "@content": ("unet.up_blocks.0.attentions.0.*",),
    "@style": ("unet.up_blocks.0.attentions.1.*",),
}
PRESETS: Mapping[str, Mapping[str, tuple[str, ...]]] = {"sdxl": _B_LORA}


def expand(source: Input, family: str | None, param: str) -> Input:
    """The input with its presets written out; BadRecipe for one that its family does not have."""

    def globs(field: str, glob: str) -> tuple[str, ...]:
        if not glob.startswith("@"):
            return (glob,)
        found = PRESETS.get(family or "", {}).get(glob)
        if found is None:
            having = sorted(name for name, its in PRESETS.items() if glob in its)
            known = f"only {', '.join(having)} has it" if having else "there is no such preset"
            raise BadRecipe(f"{param}.{field}", f"{glob}: {known}; this is {family or 'unknown'}")
        return found

    def listed(field: str, patterns: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(one for glob in patterns for one in globs(field, glob))

    blocks: dict[str, float] = {}
    for glob, factor in source.blocks.items():
        for one in globs("blocks", glob):
            blocks[one] = blocks.get(one, 1.0) * factor
    return source.model_copy(
        update={
            "only": listed("only", source.only),
            "leave_out": listed("leave_out", source.leave_out),
            "blocks": blocks,
        }
    )
