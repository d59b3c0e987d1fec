"""Adapter and checkpoint files: bytes <-> named tensors. No torch until a tensor is asked for.

header     every rule a safetensors header must keep, in one place
reader     one tensor at a time, by positioned reads
writer     streaming output that appears whole or not at all
metadata   the strings a header carries, and the trigger words in them
hashes     every hash by which people look a file up, in one pass
folders    a diffusers folder: components, shards, variants, its digest
grammar    which suffixes make which algorithm, and their shape rules
keys       key <-> (component, module, suffix) in every dialect
adapters   what an adapter file holds, resolved against a family's modules; keys for outputs
scales     alpha / rank where a configuration states it, by the patterns of PEFT (`patterns`)
"""
