"""Xet uploads: large files arrive in pieces that clients share between files, and leave whole.

huggingface_hub from 1.20 on sends large files no other way.
A client cuts files into chunks, packs chunks into xorbs, sends each xorb once, and then a shard
that says which chunks of which xorbs make which file.
We rebuild every file as a plain blob at once, so that downloads need no Xet.

hashes    the BLAKE3 hashes of chunks, xorbs and files
xorbs     the chunks of a serialized xorb          shards    the files that a shard describes
models    which xorbs are here                     service   receive a xorb, rebuild the files

Specification: huggingface.co/docs/xet, version 1.1.0. Routes are in `hub.hf.xet`.
"""
