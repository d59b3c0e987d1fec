"""Merges, bakes and extractions over HTTP, and the jobs they become."""

from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import Response, StreamingResponse

from hub.deps import HubDep, ReadSession, ViewerDep, WriterDep
from hub.jobs import events, service
from hub.jobs.models import Job, JobKind, JobState
from hub.jobs.schemas import JobPage, JobPublic, JobRequest, RecipePublic

router = APIRouter(prefix="/api", tags=["jobs"])

IdempotencyKey = Annotated[
    str | None,
    Header(max_length=200, description="a repeat with the same key answers the first job"),
]


@router.post("/merges", status_code=202)
def create_merge(
    request: Request,
    response: Response,
    hub: HubDep,
    viewer: WriterDep,
    body: JobRequest,
    idempotency_key: IdempotencyKey = None,
) -> JobPublic:
    """Merge adapters into one, or resize one; 422 at once when the recipe is impossible."""
    kinds = (JobKind.MERGE, JobKind.RESIZE)
    job = service.submit(hub, viewer, kinds, body, idempotency_key)
    return _accepted(request, response, job)


@router.post("/bakes", status_code=202)
def create_bake(
    request: Request,
    response: Response,
    hub: HubDep,
    viewer: WriterDep,
    body: JobRequest,
    idempotency_key: IdempotencyKey = None,
) -> JobPublic:
    """Bake adapters into a base checkpoint; 422 at once when the recipe is impossible."""
    job = service.submit(hub, viewer, (JobKind.BAKE,), body, idempotency_key)
    return _accepted(request, response, job)


@router.post("/extracts", status_code=202)
def create_extract(
    request: Request,
    response: Response,
    hub: HubDep,
    viewer: WriterDep,
    body: JobRequest,
    idempotency_key: IdempotencyKey = None,
) -> JobPublic:
    """Make an adapter of what separates a tuned checkpoint from its base."""
    job = service.submit(hub, viewer, (JobKind.EXTRACT,), body, idempotency_key)
    return _accepted(request, response, job)


@router.get("/jobs")
def list_jobs(
    session: ReadSession,
    viewer: ViewerDep,
    state: JobState | None = None,
    kind: JobKind | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    cursor: str | None = None,
) -> JobPage:
    """Your jobs, newest first."""
    jobs, following = service.page(
        session, viewer, state=state, kind=kind, limit=limit, cursor=cursor
    )
    return JobPage(items=[JobPublic.brief(job) for job in jobs], next_cursor=following)


@router.get("/jobs/{job_id}")
def read_job(session: ReadSession, viewer: ViewerDep, job_id: str) -> JobPublic:
    """One of your jobs."""
    return JobPublic.of(service.read(session, viewer, job_id))


@router.delete("/jobs/{job_id}")
def cancel_job(hub: HubDep, viewer: WriterDep, job_id: str) -> JobPublic:
    """Cancel a job; one that is over stays as it is."""
    return JobPublic.of(service.cancel(hub, viewer, job_id))


@router.get("/jobs/{job_id}/events", response_class=StreamingResponse)
def follow_job(
    request: Request,
    hub: HubDep,
    session: ReadSession,
    viewer: ViewerDep,
    job_id: str,
    last_event_id: Annotated[int | None, Header()] = None,
) -> Response:
    """Server-sent events until the job is over; 204 when there is nothing left to tell."""
    job = service.read(session, viewer, job_id)
    if events.is_over(job, last_event_id):
        return Response(status_code=204)  # tells an EventSource not to come back

    def present() -> Job:
        with hub.db.read() as later:
            return later.get_one(Job, job_id)

    return StreamingResponse(
        events.stream(present, last_event_id, request.app.state.stopping.is_set),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


@router.get("/recipes/{digest}")
def read_recipe(session: ReadSession, viewer: ViewerDep, digest: str) -> RecipePublic:
    """A recipe by its digest, for those who may read something it made."""
    return RecipePublic.of(service.read_recipe(session, viewer, digest))


def _accepted(request: Request, response: Response, job: Job) -> JobPublic:
    request.app.state.jobs.offer()
    response.headers["Location"] = f"/api/jobs/{job.id}"
    return JobPublic.of(job)
