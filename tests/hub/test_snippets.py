"""What a repo's page offers to copy, for adapters that differ in what can load them."""

from datetime import UTC, datetime

import pytest

from hub.adapters.items import AdapterItem
from hub.web.snippets import ways_to_use


def _item(**fields: object) -> AdapterItem:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    blank: dict[str, object] = {name: None for name in AdapterItem.model_fields}
    known = {
        "repo": "ada/ink",
        "file": "ink.safetensors",
        "title": "Ink",
        "author": "ada",
        "kind": "adapter",
        "algorithm": "lora",
        "family": "sd15",
        "sha256": "0" * 64,
        "parameters": 1,
        "size_bytes": 1,
        "trigger_words": ["ink"],
        "tags": [],
        "previews": [],
        "downloads": 0,
        "likes": 0,
        "private": False,
        "files": 1,
        "created_at": moment,
        "updated_at": moment,
        "url": "/ada/ink",
        "download_url": "/d",
        "pattern_url": "/p",
    }
    return AdapterItem.model_validate(blank | known | fields)


@pytest.mark.parametrize(
    ("family", "line"),
    [
        ("sdxl", 'pipe.unet = PeftModel.from_pretrained(pipe.unet, "ada/ink")'),
        ("flux1", 'pipe.transformer = PeftModel.from_pretrained(pipe.transformer, "ada/ink")'),
        (None, 'model = PeftModel.from_pretrained(base, "ada/ink")'),
    ],
)
def test_a_peft_adapter_goes_into_the_model_it_was_made_for(family: str | None, line: str) -> None:
    item = _item(file="adapter_model.safetensors", family=family, algorithm="oft")
    paths = ["adapter_model.safetensors", "adapter_config.json"]
    way = ways_to_use(item, "ada/ink", paths, "acme/base", "http://hub")[0]
    compile(way.text, "snippet", "exec")
    assert way.name == "peft"
    assert line in way.text.splitlines()


@pytest.mark.parametrize(("algorithm", "is_warned"), [("lora", False), ("lokr", True)])
def test_an_adapter_that_diffusers_cannot_load_says_so(algorithm: str, is_warned: bool) -> None:
    item = _item(algorithm=algorithm)
    way = ways_to_use(item, "ada/ink", ["ink.safetensors"], "acme/base", "http://hub")[0]
    assert way.name == "diffusers"
    assert ("graft convert" in way.note) is is_warned
