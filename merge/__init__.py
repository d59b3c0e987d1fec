"""The engine: tensors in files -> tensors in files. No network, no database, no users.

`errors` ← `formats`, `recipe` ← `families`, `algorithms`, `methods` ← `plan` ← `execute`.
This package imports nothing by itself, so that `import merge.formats.header` stays light.
"""
