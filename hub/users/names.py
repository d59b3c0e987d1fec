"""The one rule for the two halves of `namespace/name`, and the one for names that are only shown."""

import re

from hub.errors import BadField, BadName

# huggingface_hub's own check (utils/_validators.py, validate_repo_id), but ASCII and starting with
# a letter or digit, so that no two names look alike and none looks like an option.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_DOS = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")

# First segments of addresses that are not a namespace; a test compares this with the routes.
RESERVED = frozenset(
    (
        "api",
        "assets",
        "bench",
        "collections",
        "datasets",
        "docs",
        "favicon.ico",
        "healthz",
        "invite",
        "jobs",
        "login",
    )
    + ("logout", "me", "metrics", "models", "new", "oauth", "organizations", "readyz", "repos")
    + ("robots.txt", "search", "settings", "signup", "spaces", "static", "upload", "users", "xet")
)


def check_name(name: str, param: str) -> str:
    """`name` if it can be a user, an organisation or a repo; BadName names the rule it breaks."""
    if not _NAME.fullmatch(name):
        raise BadName(
            f"{name!r}: a name has 1 to 96 ASCII letters, digits, dots, dashes or underscores"
            " and starts with a letter or digit",
            param,
        )
    if name[-1] in "-." or "--" in name or ".." in name or name.lower().endswith((".git", ".lock")):
        raise BadName(f"{name!r}: a name has no --, no .., no final dash or dot, no .git", param)
    if _DOS.fullmatch(name.lower()):
        raise BadName(f"{name!r} is a device name on Windows", param)
    return name


def check_namespace(name: str, param: str = "namespace") -> str:
    """A name that can also stand first in an address."""
    if name.lower() in RESERVED:
        raise BadName(f"{name!r} is an address of the hub itself", param)
    return check_name(name, param)


def check_shown(text: str, param: str) -> str:
    """`text` if it can be shown as somebody's or something's name: BadField for control characters."""
    # PostgreSQL refuses NUL, SQLite keeps it and ends texts there in some of its functions.
    if _CONTROL.search(text):
        raise BadField(f"{param}: a name has no control characters", param)
    return text


def key_of(name: str) -> str:
    """What names are compared by: they are ASCII, and case does not tell them apart."""
    return name.lower()
