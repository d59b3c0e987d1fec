"""Request bodies of the Hugging Face protocol.

Unknown fields are ignored: clients of other versions send more than we need.
"""

import re
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from hub.errors import BadRequest
from hub.repos.models import AccessState, DiscussionStatus, Gate

Oid = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=0, le=2**53, strict=True)]
Place = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Path = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
RepoType = Literal["model", "dataset", "space"]


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    @model_validator(mode="after")
    def _is_text(self) -> Self:
        """JSON can spell characters that no database keeps: NUL and halves of surrogate pairs."""
        for value in self.__dict__.values():
            if isinstance(value, str) and b"\0" in value.encode():
                raise ValueError("text without NUL is expected")
        return self


Parsed = TypeVar("Parsed", bound=_Body)


def parse(kind: type[Parsed], body: bytes | dict[str, Any], where: str = "the body") -> Parsed:
    """A body that a route reads by itself; BadRequest names the field that is wrong."""
    try:
        if isinstance(body, bytes):
            return kind.model_validate_json(body)
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise BadRequest(f"{where}: {field}: {first['msg']}", field or None) from error


def _number_of(identifier: object) -> object:
    """Ids of rows are shown as 24 hexadecimal digits."""
    if isinstance(identifier, str) and re.fullmatch("[0-9a-f]{24}", identifier):
        return min(int(identifier, 16), 2**63 - 1)
    return identifier


class _Visible(_Body):
    """`private` up to huggingface_hub 1.8, `visibility` after; whoever reads only one of the two
    makes private repos public."""

    private: bool | None = None
    visibility: str | None = None

    def is_private(self) -> bool | None:
        """None where the client said nothing; any visibility but "public" is private."""
        if self.visibility is not None:
            return self.visibility != "public"
        return self.private


class CreateRepo(_Visible):
    name: str
    organization: str | None = None
    type: RepoType | None = None


class DeleteRepo(_Body):
    name: str
    organization: str | None = None
    type: RepoType | None = None


class MoveRepo(_Body):
    fromRepo: str
    toRepo: str
    type: RepoType | None = None


class Settings(_Visible):
    gated: Gate | Literal[False] | None = None


class Decision(_Body):
    """About the request of `user`, or the one with `requestId`."""

    status: AccessState
    user: str | None = None
    requestId: Annotated[int | None, BeforeValidator(_number_of)] = None
    rejectionReason: str | None = Field(None, max_length=1000)


class Grant(_Body):
    user: str


class Squash(_Body):
    message: str | None = Field(None, min_length=1, max_length=1000)


class Revert(_Body):
    branch: str = "main"


class _Deletions(_Body):
    sha: list[Oid] = Field(max_length=1000)
    rewriteHistory: bool = True


class LFSDeletions(_Body):
    deletions: _Deletions


class Duplicate(_Visible):
    repository: str


class NewDiscussion(_Body):
    title: str
    description: str = ""
    pullRequest: bool = False


class Comment(_Body):
    comment: str


class Edit(_Body):
    content: str


class Title(_Body):
    title: str


class Status(_Body):
    status: DiscussionStatus
    comment: str | None = None


class Merge(_Body):
    comment: str | None = None


class NewCollection(_Body):
    title: str
    namespace: str | None = None
    description: str | None = None
    private: bool = False
    resourceGroupId: str | None = None


class ChangedCollection(_Body):
    title: str | None = None
    description: str | None = None
    position: Place | None = None
    private: bool | None = None
    theme: str | None = None


class _Item(_Body):
    id: str
    type: Literal["model", "dataset", "collection", "space", "paper", "bucket"]


class NewCollectionItem(_Body):
    item: _Item
    note: str | None = None


class ChangedCollectionItem(_Body):
    note: str | None = None
    position: Place | None = None


class Card(_Body):
    content: str = Field(max_length=8 * 2**20)
    repoType: str | None = None


class PreuploadFile(_Body):
    path: Path
    size: Size
    sample: str = ""


class Preupload(_Body):
    files: list[PreuploadFile] = Field(max_length=10_000)
    gitIgnore: str | None = Field(None, max_length=2**20)


class CreateBranch(_Body):
    startingPoint: str | None = None


class CreateTag(_Body):
    tag: str
    message: str | None = None


class LFSObject(_Body):
    oid: Oid
    size: Size


class LFSBatch(_Body):
    operation: Literal["upload", "download"]
    transfers: list[str] = ["basic"]
    objects: list[LFSObject] = Field(max_length=1000)
    hash_algo: str = "sha256"


class LFSPart(_Body):
    partNumber: Annotated[int, Field(ge=1, le=10_000, strict=True)]
    etag: str = Field(min_length=1, max_length=1024)


class LFSParts(_Body):
    oid: Oid
    parts: list[LFSPart] = Field(max_length=10_000)


class PathsInfo(_Body):
    paths: list[str] = Field(max_length=10_000)
    expand: bool = False


class CommitHeader(_Body):
    summary: str = Field(max_length=4096)
    description: str = Field("", max_length=2**16)
    parentCommit: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{5,40}$")] | None = None


class RegularFile(_Body):
    path: Path
    encoding: Literal["base64", "utf-8"] = "base64"


class LFSFile(_Body):
    path: Path
    oid: Oid
    algo: Literal["sha256"] = "sha256"
    size: Size | None = None


class DeletedFile(_Body):
    path: Path


class CopiedFile(_Body):
    path: Path
    srcPath: Path
    srcRevision: str | None = None
