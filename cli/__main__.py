"""`graft`: one Typer application; each module of this package adds its own commands.

Heavy imports (torch, the web server) happen inside the commands that need them,
so that `graft inspect` and `graft --help` answer at once.
"""

import sys

import typer

from cli import (
    admin,
    convert,
    doctor,
    extract,
    import_folder,
    inspect,
    merge,
    recipes,
    report,
    repos,
    serve,
    train,
    unbake,
    whatis,
)
from cli.console import CommandError, WrongUsage, fail
from merge.errors import MergeError

app = typer.Typer(
    name="graft",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

# One row per module, in the order of `graft --help`.
for module in (
    repos,
    import_folder,
    inspect,
    convert,
    merge,
    extract,
    unbake,
    whatis,
    report,
    recipes,
    serve,
    doctor,
    admin,
    train,
):
    module.register(app)


@app.callback()
def _root() -> None:
    """Keep, find, download, convert, merge, bake, train and publish adapters."""


def main() -> None:
    """Run a command; exit 0 on success, 1 on failure with one sentence, 2 on wrong usage."""
    try:
        app()
    except WrongUsage as error:
        fail(str(error), 2)
    except (CommandError, MergeError) as error:
        fail(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        fail(f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
