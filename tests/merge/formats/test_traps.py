"""Files as they are found in the wild: each ends in the right answer or in an error of its own."""

import re
from pathlib import Path

import pytest

from merge.algorithms import read_change
from merge.formats.adapters import read_config, read_layout
from merge.formats.reader import TensorFile
from merge.identify import identify
from tests.fixtures.traps import TRAPS, Trap


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.name)
def test_a_trap_ends_in_the_right_answer_or_its_own_error(trap: Trap, tmp_path: Path) -> None:
    path = trap.write(tmp_path)
    with TensorFile(path) as file:
        if trap.error is not None:
            with pytest.raises(trap.error, match=trap.message) as caught:
                read_layout(file, name=path.name, config=read_config(path))
            assert type(caught.value) is trap.error
            assert str(caught.value).startswith(f"{path.name}: ")
            return
        layout = read_layout(file, name=path.name, config=read_config(path))
        claimed = [key for entry in layout.entries for key in entry.keys.values()]
        assert sorted(claimed) == sorted(file.header.tensors)
        assert trap.scales is not None
        if not trap.scales:
            return
        found = {}
        for entry in layout.entries:
            tensors = {role: file.read_tensor(key).double() for role, key in entry.keys.items()}
            inner = {role: tensor for role, tensor in tensors.items() if role != "dora_scale"}
            shape = entry.layer.shape
            change = read_change(entry.layout, inner, shape, entry.facts).weight(0, shape[0], None)
            plain = {role: tensor for role, tensor in inner.items() if role != "alpha"}
            at_one = read_change(entry.layout, plain, shape, {}).weight(0, shape[0], None)
            # An untrained module has no change to measure the scale by.
            found[entry.layer.path] = (
                float((change * at_one).sum() / (at_one**2).sum()) if at_one.any() else 1.0
            )
        assert found == pytest.approx(dict(trap.scales), rel=1e-6)


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.name)
def test_a_trap_is_described_with_its_warnings(trap: Trap, tmp_path: Path) -> None:
    path = trap.write(tmp_path)
    found = identify(path, hashes=False, config=read_config(path))
    assert found.kind == "adapter"
    assert tuple(warning.code for warning in found.warnings) == trap.doubts
    if trap.error is not None:
        # The refusal of merging, in the same words.
        assert re.search(trap.message, found.warnings[0].message)
