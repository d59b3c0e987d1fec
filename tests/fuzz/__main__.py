"""`python -m tests.fuzz headers|commits FOLDER [options of libFuzzer]`.

FOLDER keeps what the fuzzer found worth trying again; an input that breaks a rule is printed and
written to the working directory, and the exit status is not 0.
"""

import hashlib
import sys
from pathlib import Path

import atheris


def main() -> None:
    """Fuzz until an option of libFuzzer ends it."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    if name == "headers":
        from tests.fuzz.headers import one_input, seeds
    else:
        from tests.fuzz.commits import one_input, seeds
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds():
        (folder / hashlib.sha256(seed).hexdigest()).write_bytes(seed)
    atheris.Setup([sys.argv[0], *sys.argv[3:], str(folder)], one_input)
    atheris.Fuzz()


main()
