"""What a webhook is told, in the shape of Hugging Face's payloads, version 3."""

from typing import Any

from sqlmodel import Session

from hub.repos.models import DiscussionEvent
from hub.webhooks.models import Delivery, Domain, Webhook

VERSION = 3
# (action, scope) of each kind of event.
EVENTS = {
    "repo.created": ("create", "repo"),
    "repo.deleted": ("delete", "repo"),
    "repo.moved": ("move", "repo"),
    "repo.visibility": ("update", "repo.config"),
    "repo.committed": ("update", "repo.content"),
    "repo.ref": ("update", "repo.content"),
    "discussion.created": ("create", "discussion"),
    "discussion.updated": ("update", "discussion"),
    "comment.created": ("create", "discussion.comment"),
    "comment.updated": ("update", "discussion.comment"),
}


def domain_of(kind: str) -> Domain:
    return Domain.REPO if kind.startswith("repo.") else Domain.DISCUSSION


def payload(session: Session, webhook: Webhook, delivery: Delivery, base: str) -> dict[str, Any]:
    """`base` is this hub's address without a final slash."""
    said = delivery.document
    action, scope = EVENTS[delivery.kind]
    now_called = f"{said['namespace']}/{said['name']}"
    name = said.get("moved_from", now_called)
    folder = "datasets/" if said["type"] == "dataset" else ""
    web, api = f"{base}/{folder}{name}", f"{base}/api/{said['type']}s/{name}"
    owner = _id(said["owner"])
    found: dict[str, Any] = {
        "event": {"action": action, "scope": scope},
        "repo": {
            "type": said["type"],
            "name": name,
            "id": _id(delivery.repo_id)["id"],
            "private": said["private"],
            "url": {"web": web, "api": api},
            "owner": owner,
            "headSha": said["head"],
        },
        "webhook": {"id": webhook.key, "version": VERSION},
    }
    if "moved_from" in said:
        found["movedTo"] = {"name": now_called, "owner": owner}
    if "refs" in said:
        found["updatedRefs"] = said["refs"]
    if "config" in said:
        found["updatedConfig"] = said["config"]
    if "discussion" in said:
        talk = said["discussion"]
        num = talk["num"]
        found["discussion"] = {
            "id": f"{delivery.repo_id:012x}{num:012x}",
            "num": num,
            "title": talk["title"],
            "status": talk["status"],
            "isPullRequest": talk["base"] is not None,
            "author": _id(talk["author"]),
            "url": {"web": f"{web}/discussions/{num}", "api": f"{api}/discussions/{num}"},
        }
        if talk["base"] is not None:
            changes = {"base": f"refs/heads/{talk['base']}", "mergeCommitId": talk["merged_as"]}
            found["discussion"]["changes"] = {k: v for k, v in changes.items() if v is not None}
    if "comment" in said:
        found["comment"] = _comment(session, delivery, f"{web}/discussions/{num}")
    return found


def _comment(session: Session, delivery: Delivery, address: str) -> dict[str, Any]:
    """As it is now: a text that was hidden is told to nobody any more."""
    said = delivery.document["comment"]
    row = session.get(DiscussionEvent, said["id"])
    if row is not None and row.repo_id != delivery.repo_id:
        row = None  # SQLite gives the number of one that is gone to the next.
    hidden = row is None or row.is_hidden
    found = {**_id(said["id"]), "author": _id(said["author"]), "hidden": hidden}
    if row is not None and not row.is_hidden:
        found["content"] = row.text
    return found | {"url": {"web": f"{address}#{found['id']}"}}


def _id(number: int | None) -> dict[str, Any]:
    return {"id": f"{number or 0:024x}"}
