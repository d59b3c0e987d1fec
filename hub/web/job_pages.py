"""Jobs as pages: a list that keeps itself fresh, and one job followed as it runs."""

from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request
from fastapi.responses import RedirectResponse, Response

from hub.deps import HubDep, ReadSession, ViewerDep, WriterDep
from hub.jobs import service
from hub.jobs.models import TERMINAL, Job, JobState
from hub.jobs.schemas import JobPublic
from hub.web.render import page, percent

router = APIRouter(include_in_schema=False, tags=["web"])

PAGE_OF_JOBS = 30
KINDS = {"merge": "Merge", "bake": "Bake", "extract": "Extraction", "resize": "Resize"}
STATES = {
    JobState.QUEUED: ("waiting", ""),
    JobState.RUNNING: ("running", "good"),
    JobState.SUCCEEDED: ("done", ""),
    JobState.FAILED: ("failed", "bad"),
    JobState.CANCELLED: ("cancelled", ""),
}
# Figures of a certificate that a person compares, in the words of the page.
FIGURES = {
    "truncation": "lost by cutting to the chosen rank",
    "rounding": "lost by rounding to the stored precision",
    "unchanged": "of the changed weights kept their old value after rounding",
}


@router.get("/jobs")
def show_jobs(
    request: Request,
    session: ReadSession,
    viewer: ViewerDep,
    state: JobState | None = None,
    cursor: Annotated[str | None, Query(max_length=64)] = None,
) -> Response:
    """One's own jobs, newest first."""
    found: list[Job] = []
    following = None
    if viewer.user is not None:
        found, following = service.page(
            session, viewer, state=state, kind=None, limit=PAGE_OF_JOBS, cursor=cursor or None
        )
    jobs = [_shown(JobPublic.brief(job)) for job in found]
    more = {"state": state.value if state else "", "cursor": following}
    return page(
        request,
        "jobs.html",
        viewer,
        room="jobs",
        jobs=jobs,
        is_live=any(not job["is_over"] for job in jobs) and cursor is None,
        filters=[
            (name, f"/jobs?state={value}", state == value) for value, (name, _) in STATES.items()
        ],
        is_filtered=state is not None,
        more_url="/jobs?" + urlencode(more) if following else None,
    )


@router.get("/jobs/{job_id}")
def show_job(request: Request, session: ReadSession, viewer: ViewerDep, job_id: str) -> Response:
    """One of one's own jobs; its progress comes as server-sent events."""
    job = service.read(session, viewer, job_id)
    return page(
        request,
        "job.html",
        viewer,
        room="jobs",
        job=_shown(JobPublic.of(job)),
        recipe=job.request["recipe"],
    )


@router.post("/jobs/{job_id}/cancel")
def cancel_job(hub: HubDep, viewer: WriterDep, job_id: str) -> Response:
    """Ask it to stop, and come back to its page."""
    service.cancel(hub, viewer, job_id)
    return RedirectResponse(f"/jobs/{job_id}", 303)


def _shown(job: JobPublic) -> dict[str, Any]:
    name, tone = STATES[JobState(job.state)]
    target = job.publish.repo + (f"/{job.publish.path}" if job.publish.path else "")
    result = job.result
    return {
        "id": job.id,
        "url": f"/jobs/{job.id}",
        "kind": KINDS.get(job.kind, job.kind),
        "state": "stopping" if job.cancel_requested and job.state == JobState.RUNNING else name,
        "tone": tone,
        "is_over": job.state in TERMINAL,
        "is_running": job.state == JobState.RUNNING,
        "target": target,
        "progress": job.progress,
        "attempts": job.attempts,
        "error": job.error,
        "created_at": job.created_at,
        "finished_at": job.finished_at,
        "recipe_digest": job.recipe_digest,
        "result": result,
        "result_url": f"/{result.repo}" if result else None,
        "figures": _figures(result.certificate) if result else [],
    }


def _figures(certificate: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (percent(certificate[name]), words)
        for name, words in FIGURES.items()
        if isinstance(certificate.get(name), int | float)
    ]
