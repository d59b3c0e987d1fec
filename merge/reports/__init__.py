"""What a merge will do, measured from the factors before anything is written.

survey      recipe + headers -> the places that are changed, by our own modules (no torch)
geometry    one place: inner products, subspaces and the joint spectrum, from small Gram matrices
ranks       spectra of all places -> size against error, for every choice of rank
storage     what writing in a dtype costs, in factors and in a baked base, from samples
report      the answer, as values and as JSON (no torch)
suggest     strengths, method and rank that the measurements speak for (no torch)
measure     all of it together: `measure(recipe, files) -> Report`

docs/reports.md defines every number.
"""
