"""The Hugging Face Hub protocol over this hub's repos and blobs.

Unmodified `huggingface_hub`, `hf`, diffusers, peft and transformers work with HF_ENDPOINT set to us.

routing     routes matched on the raw path; errors rendered as those clients read them
bodies      request bodies          ranges    the Range header
ndjson      the commit body, streamed          info   answers built from rows
cards       front matter of README.md          listing   which repos, page by page
deps        the repo and the commit of an address
repos       create, settings, info, tree, refs  files    downloads
commits     preupload and commit               lfs    batch, upload, verify
xet         the upload token, xorbs and shards
lfs_parts   LFS objects in parts, on local disk or in S3
routes      the routers that `hub.app` includes
"""
