"""What the job routes take and give."""

import json
from datetime import datetime
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field

from hub.jobs.models import Job, JobKind, Recipe

# What merge.execute counts.
_UNITS = {JobKind.BAKE: "bytes", JobKind.EXTRACT: "steps"}


class Publish(BaseModel):
    """Where a result goes: one file, or for a baked folder the repo's root."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    repo: str = Field(description="`namespace/name`; made when it does not exist")
    path: str | None = Field(
        None, description="the file's path in the repo; left out for a result that is a folder"
    )
    private: bool | None = Field(
        None, description="of a new repo; left out: private when an input is private"
    )
    message: str | None = Field(None, max_length=500, description="commit message")


class JobRequest(BaseModel):
    """A recipe to run and where to publish what it makes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: dict[str, Any]
    publish: Publish


class JobProgress(BaseModel):
    """How far a job is, in steps of its engine."""

    done: int
    total: int | None
    unit: str
    eta_s: float | None


class JobError(BaseModel):
    """Why a job failed; `param` is the field of the recipe when there is one."""

    code: str
    message: str
    param: str | None


class JobResult(BaseModel):
    """What a job published; `path` is empty for a folder at the repo's root."""

    repo: str
    commit: str
    path: str
    sha256: str
    recipe_digest: str
    certificate: dict[str, Any]


class JobPublic(BaseModel):
    """A job as its requester sees it."""

    id: str
    kind: str
    state: str
    progress: JobProgress
    attempts: int
    cancel_requested: bool
    recipe_digest: str
    publish: Publish
    error: JobError | None
    result: JobResult | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @classmethod
    def of(cls, job: Job) -> Self:
        """The public side of a row."""
        progress = {
            "done": job.progress_done,
            "total": job.progress_total,
            "unit": _UNITS.get(JobKind(job.kind), "modules"),
            "eta_s": job.eta_s,
        }
        shown = job.model_dump(include=set(cls.model_fields) - {"progress", "publish"})
        return cls.model_validate(shown | {"progress": progress, "publish": job.request["publish"]})

    @classmethod
    def brief(cls, job: Job) -> Self:
        """As `of`, but a certificate's figures for every single module are left out."""
        whole = cls.of(job)
        if whole.result is not None:
            whole.result.certificate.pop("modules", None)
            whole.result.certificate.pop("summed", None)
        return whole


class JobPage(BaseModel):
    """Jobs, newest first; `next_cursor` asks for those before them."""

    items: list[JobPublic]
    next_cursor: str | None


class RecipePublic(BaseModel):
    """A recipe by digest: its canonical JSON as an object."""

    digest: str
    recipe: dict[str, Any]
    created_at: datetime

    @classmethod
    def of(cls, row: Recipe) -> Self:
        """The public side of a row."""
        return cls(digest=row.digest, recipe=json.loads(row.canonical), created_at=row.created_at)
