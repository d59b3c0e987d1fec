"""rank_pattern and alpha_pattern give what peft's own function gives."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from merge.errors import Unsupported
from merge.formats.patterns import Patterns

PATHS = [
    "conv_in",
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q",
    "mid_block.attentions.0.proj_in",
    "encoder.layers.1.mlp.fc1",
    "encoder.layers.11.mlp.fc1",
]
PATTERNS = [
    "to_q",
    "attn1.to_q",
    r"attn2\.to_q",
    "^conv_in",
    "conv_in",
    "v1",
    "^to_q",
    r"^mid_block\.attentions\.0\.proj_in",
    "mid_block.attentions.0.proj_in",
    ".*attn[12].to_q",
    r"layers\.1\.mlp\.fc1",
    "layers.1[0-9].mlp.fc1",
    "conv1|fc1",
    ".*",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_pattern_matches_as_in_peft(pattern: str, path: str) -> None:
    theirs = get_pattern_key([pattern], path)  # the path itself if nothing matches
    expected = "yes" if theirs == pattern and pattern != path else "no"
    if pattern == path:
        expected = "yes"
    assert Patterns({pattern: "yes"}, "f").first(path, "no") == expected


@settings(max_examples=200, deadline=None)
@given(patterns=st.lists(st.sampled_from(PATTERNS), unique=True), path=st.sampled_from(PATHS))
def test_the_first_of_several_counts_as_in_peft(patterns: list[str], path: str) -> None:
    values = {pattern: pattern for pattern in patterns}
    assert Patterns(values, "f").first(path, path) == get_pattern_key(patterns, path)


def test_text_encoders_match_with_and_without_text_model() -> None:
    patterns = Patterns(
        {"^encoder.layers.0.mlp.fc1": 1, "^text_model.encoder.layers.1.mlp.fc1": 2}, "f"
    )
    assert patterns.first("text_model.encoder.layers.0.mlp.fc1", 0) == 1
    assert patterns.first("encoder.layers.0.mlp.fc1", 0) == 1
    assert patterns.first("text_model.encoder.layers.1.mlp.fc1", 0) == 2


def test_a_thousand_exact_patterns_cost_nothing_and_expressions_are_few() -> None:
    exact = {f"^blocks.{n}.to_q": n for n in range(20_000)}
    patterns = Patterns(exact, "f")
    assert patterns.first("blocks.19999.to_q", None) == 19_999
    with pytest.raises(Unsupported, match="65 patterns"):
        Patterns({f"a[{n}]": n for n in range(65)}, "f")
