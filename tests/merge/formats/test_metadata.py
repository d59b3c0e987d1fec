"""Trigger words by order of evidence, from metadata as trainers write it."""

import json

import pytest

from merge.formats.metadata import tag_counts, trigger_words, triggers

KOHYA = {
    "ss_dataset_dirs": json.dumps({"10_mychar woman": {"n_repeats": 10, "img_count": 20}}),
    "ss_tag_frequency": json.dumps(
        {"10_mychar woman": {"mychar": 20, "1girl": 20, "red hat": 19, "smile": 7}}
    ),
    "ss_datasets": json.dumps(
        [
            {
                "subsets": [
                    {"class_tokens": "mychar woman", "is_reg": False},
                    {"class_tokens": "woman", "is_reg": True},
                    {"class_tokens": "None"},
                ]
            }
        ]
    ),
}


def test_the_author_s_words_come_before_the_folder_s_and_the_tags() -> None:
    metadata = KOHYA | {"modelspec.trigger_phrase": "mychr, hat lady"}
    assert trigger_words(metadata) == ["mychr", "hat lady", "mychar woman", "mychar", "red hat"]


def test_our_own_list_comes_first_and_case_does_not_repeat_a_word() -> None:
    metadata = {"graft.triggers": '["Ink Wash", "ink"]', "modelspec.trigger_phrase": "ink wash"}
    found = triggers(metadata)
    assert [(t.word, t.source, t.confidence) for t in found] == [
        ("Ink Wash", "graft.triggers", 1.0),
        ("ink", "graft.triggers", 1.0),
    ]


def test_regularisation_and_generic_tags_call_nothing() -> None:
    words = trigger_words(KOHYA)
    assert "woman" not in words
    assert "1girl" not in words
    assert "smile" not in words
    assert "None" not in words


@pytest.mark.parametrize(
    "value", ["None", "", "[]", "{}", "[1,[2]]", '{"a":1}', '{"a":{"b":"c"}}', "[" * 100_000]
)
@pytest.mark.parametrize(
    "key", ["ss_datasets", "ss_dataset_dirs", "ss_tag_frequency", "graft.triggers"]
)
def test_what_is_not_the_expected_json_says_nothing(key: str, value: str) -> None:
    assert trigger_words({key: value}) == []


def test_tags_are_counted_over_folders() -> None:
    frequency = {"1_a": {"cat": 2, " cat ": 1}, "1_b": {"cat": 4, "dog": 1}}
    counts = tag_counts({"ss_tag_frequency": json.dumps(frequency)})
    assert counts == {"cat": 7, "dog": 1}
