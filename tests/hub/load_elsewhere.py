"""Run by test_other_loaders.py: the parts of vLLM and InvokeAI that fetch adapters, as they are.

    load_elsewhere.py vllm-hub BASE NAME ...      vLLM's Hugging Face resolver
    load_elsewhere.py vllm-folder BASE NAME ...   vLLM's filesystem resolver
    load_elsewhere.py invokeai FOLDER TOKEN URL   InvokeAI's download queue

Prints a path, or `None`, a line for each name or address.
"""

import asyncio
import re
import sys
from pathlib import Path


def resolve_with_vllm(resolver: str, base: str, names: list[str]) -> None:
    from vllm.lora.resolver import LoRAResolverRegistry
    from vllm.plugins.lora_resolvers import (
        filesystem_resolver,
        hf_hub_resolver,
    )

    hf_hub_resolver.register_hf_hub_resolver()
    filesystem_resolver.register_filesystem_resolver()
    found = LoRAResolverRegistry.get_resolver(resolver)
    for name in names:
        request = asyncio.run(found.resolve_lora(base, name))
        print(request and request.lora_path)


def download_with_invokeai(folder: Path, token: str, url: str) -> None:
    from invokeai.app.services.config import InvokeAIAppConfig
    from invokeai.app.services.config.config_default import URLRegexTokenPair
    from invokeai.app.services.download import DownloadQueueService
    from pydantic.networks import AnyHttpUrl

    tokens = [URLRegexTokenPair(url_regex=re.escape(url), token=token)] if token else []
    config = InvokeAIAppConfig(allow_private_download_urls=True, remote_api_tokens=tokens)
    queue = DownloadQueueService(app_config=config)
    queue.start()
    job = queue.download(source=AnyHttpUrl(url), dest=folder)
    queue.wait_for_job(job, timeout=60)
    queue.stop()
    print(job.download_path if job.complete else f"{job.status}: {job.error_type}")


def main() -> None:
    program, *rest = sys.argv[1:]
    if program == "invokeai":
        download_with_invokeai(Path(rest[0]), rest[1], rest[2])
    else:
        resolvers = {"vllm-hub": "Hf Hub Resolver", "vllm-folder": "Filesystem Resolver"}
        resolve_with_vllm(resolvers[program], rest[0], rest[1:])


if __name__ == "__main__":
    main()
