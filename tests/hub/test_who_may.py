"""Every route of the hub, asked by everybody: the table says who may, and a new route needs a row.

The table is about a private repo `acme/ink` of an organisation: ada writes there (with a token
that may read and one that may write), bob reads, olga administers, eve is a stranger.
"""

import hashlib
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import iter_route_contexts
from sqlalchemy import text
from starlette.testclient import TestClient

from hub.app import create_app
from hub.context import Hub
from hub.repos import collections, curation
from hub.repos.models import RepoType
from hub.settings import Settings
from hub.users import organizations
from hub.users import service as users
from hub.users.models import Role, Scope
from hub.users.service import Viewer
from hub.webhooks.models import Delivery, DeliveryState, Webhook
from tests.fixtures.catalogue import lora_bytes, publish_files
from tests.hub.conftest import bearer, make_user, new_token, sqlite_only
from tests.hub.test_app import filled as filled_with_samples

HOST = "http://127.0.0.1:8470"
VIEWERS = ("anonymous", "reading token", "writing token", "stranger", "reader", "admin", "boss")

# Who is let in. "admin" administers the organisation, "boss" the hub.
NOBODY: frozenset[str] = frozenset()
ALL = frozenset(VIEWERS)
USERS = ALL - {"anonymous"}
MEMBERS = USERS - {"stranger"}
WRITING = USERS - {"reading token"}
WRITERS = frozenset({"writing token", "admin", "boss"})
PARTICIPANTS = MEMBERS - {"reading token"}
ACCOUNTS = frozenset({"stranger", "reader", "admin", "boss"})
MANAGERS = frozenset({"admin", "boss"})
BOSS = frozenset({"boss"})
ADA = frozenset({"reading token", "writing token", "boss"})  # and who may see everything
ADA_WRITING = ADA - {"reading token"}
STRANGER = frozenset({"stranger"})

# What a refusal says; any other answer means that the caller was let in.
HIDDEN = {"RepoNotFound", "JobNotFound", "RecipeNotFound", "HashNotFound", "UserNotFound"}
HIDDEN |= {"WebhookNotFound", "CollectionNotFound"}


@dataclass(frozen=True)
class Row:
    """`path` and `body` let a caller come far enough that only rights can refuse."""

    may: frozenset[str]
    path: str = ""
    json: Any = None
    form: dict[str, str] | None = None
    lines: str | None = None
    hidden: frozenset[str] = field(default_factory=frozenset)


API = "/api/{kind:repos}/{namespace}/{name}"
TALK = API + "/discussions/{num}"
LFS = "{namespace}/{name}.git/info/lfs/objects"
HOOKS = "/api/settings/webhooks"
HOOK = HOOKS + "/{webhook_id}"
EVES_HOOK = HOOKS + "/$HOOK"
PACKS = "/api/collections"
PACK, PACKED = PACKS + "/{namespace}/{slug}", PACKS + "/{namespace}/{slug}/items/{item_id}"
ACMES_PACK, PACKED_INK = PACKS + "/acme/$PACK", PACKS + "/acme/$PACK/items/$ITEM"
PACK_PAGE, ACMES_PAGE = "/collections/{namespace}/{slug}", "/collections/acme/$PACK"
OBJECT = {"oid": "$SHA", "size": 3}
COMMIT = '{"key": "header", "value": {"summary": "x"}}\n'
COMMIT += '{"key": "file", "value": {"path": "b.txt", "content": "aGk=", "encoding": "base64"}}\n'
RECIPE = {
    "recipe": {"kind": "merge", "inputs": [{"ref": "acme/ink:a.safetensors"}]},
    "publish": {"repo": "acme/new", "path": "x.safetensors"},
}

TABLE: dict[str, Row] = {
    # Operations
    "GET /api/openapi.json": Row(ALL),
    "GET /healthz": Row(ALL),
    "GET /readyz": Row(ALL),
    "GET /metrics": Row(BOSS),
    # Users, organisations, tokens
    "POST /api/users": Row(BOSS, json={"name": "new"}),
    "GET /api/users": Row(BOSS),
    "PATCH /api/users/{name}": Row(BOSS, "/api/users/eve", json={"full_name": "Eve"}),
    "GET /api/organizations": Row(USERS),
    "POST /api/organizations": Row(ACCOUNTS, json={"name": "neworg"}),
    "PUT /api/organizations/{name}/members/{user}": Row(
        MANAGERS, "/api/organizations/acme/members/eve", json={"role": "reader"}
    ),
    "DELETE /api/organizations/{name}/members/{user}": Row(
        MANAGERS, "/api/organizations/acme/members/ada"
    ),
    "GET /api/tokens": Row(USERS),
    "POST /api/tokens": Row(ACCOUNTS, json={"name": "more"}),
    "DELETE /api/tokens/{token_id}": Row(STRANGER, "/api/tokens/$EVES_TOKEN"),
    "GET /api/audit": Row(BOSS),
    "GET /api/audit/verify": Row(BOSS),
    "POST /api/mirrors": Row(BOSS, json={"repo": "a/b"}),
    "GET /api/quotas": Row(BOSS),
    "GET /api/quotas/{namespace}": Row(MEMBERS, "/api/quotas/acme"),
    "PUT /api/quotas/{namespace}": Row(BOSS, json={"limit_bytes": 9}),
    # The catalogue
    "GET /api/adapters": Row(ALL),
    "GET /api/adapters/{namespace}/{name}/{file:path}": Row(
        MEMBERS, "/api/adapters/acme/ink/a.safetensors"
    ),
    "GET /api/hashes/{hash}": Row(MEMBERS, "/api/hashes/$LORA"),
    "GET /static/thumbs/{sha256}-{width}.webp": Row(ALL),  # by the hash of a public picture
    # Jobs
    "POST /api/merges": Row(WRITERS, json=RECIPE, hidden=frozenset({"BadRecipe"})),
    # A recipe of the wrong kind: these differ from a merge in nothing else.
    "POST /api/bakes": Row(WRITING, json=RECIPE),
    "POST /api/extracts": Row(WRITING, json=RECIPE),
    "POST /api/reports": Row(
        MEMBERS, json={"recipe": RECIPE["recipe"]}, hidden=frozenset({"BadRecipe"})
    ),
    "GET /api/jobs": Row(USERS),
    "GET /api/jobs/{job_id}": Row(ADA, "/api/jobs/j1"),
    "DELETE /api/jobs/{job_id}": Row(ADA_WRITING, "/api/jobs/j1"),
    "GET /api/jobs/{job_id}/events": Row(ADA, "/api/jobs/j1/events"),
    "GET /api/recipes/{digest}": Row(ADA - {"boss"}, "/api/recipes/d1"),
    # Repos, as Hugging Face clients see them
    "GET /api/whoami-v2": Row(USERS),
    "POST /api/repos/create": Row(WRITERS, json={"name": "new", "organization": "acme"}),
    "DELETE /api/repos/delete": Row(WRITERS, json={"name": "ink", "organization": "acme"}),
    "POST /api/repos/move": Row(WRITERS, json={"fromRepo": "acme/ink", "toRepo": "acme/oil"}),
    f"PUT {API}/settings": Row(WRITERS, json={"private": False}),
    f"GET {API}": Row(MEMBERS),
    f"GET {API}/revision/{{revision}}": Row(MEMBERS),
    "GET /api/{kind:repos}": Row(ALL),
    f"GET {API}/tree/{{revision}}": Row(MEMBERS),
    f"GET {API}/tree/{{revision}}/{{path:path}}": Row(MEMBERS),
    f"POST {API}/paths-info/{{revision}}": Row(MEMBERS, json={"paths": ["a.txt"]}),
    f"GET {API}/refs": Row(MEMBERS),
    f"POST {API}/branch/{{branch}}": Row(WRITERS, json={}),
    f"DELETE {API}/branch/{{branch}}": Row(WRITERS, "/api/models/acme/ink/branch/old"),
    f"POST {API}/tag/{{revision}}": Row(WRITERS, json={"tag": "v2"}),
    f"DELETE {API}/tag/{{tag}}": Row(WRITERS, "/api/models/acme/ink/tag/v1"),
    f"GET {API}/commits/{{revision}}": Row(MEMBERS),
    f"GET {API}/auth-check": Row(MEMBERS),
    f"GET {API}/auth-check/write": Row(WRITERS),
    f"POST {API}/ask-access": Row(PARTICIPANTS),
    f"GET {API}/user-access-request/{{state}}": Row(
        WRITERS, "/api/models/acme/ink/user-access-request/pending"
    ),
    f"POST {API}/user-access-request/handle": Row(
        WRITERS, json={"user": "bob", "status": "accepted"}
    ),
    f"POST {API}/user-access-request/grant": Row(WRITERS, json={"user": "bob"}),
    f"POST {API}/like": Row(PARTICIPANTS),
    f"DELETE {API}/like": Row(PARTICIPANTS),
    f"GET {API}/likers": Row(MEMBERS),
    "GET /api/users/{user}/likes": Row(ALL, "/api/users/ada/likes"),
    "GET /api/users/{user}/overview": Row(ALL, "/api/users/ada/overview"),
    "GET /api/organizations/{organization}/overview": Row(ALL, "/api/organizations/acme/overview"),
    "GET /api/organizations/{organization}/members": Row(
        MEMBERS, "/api/organizations/acme/members"
    ),
    "GET /api/settings/repositories": Row(USERS),
    "GET /api/organizations/{organization}/settings/repositories": Row(
        MEMBERS, "/api/organizations/acme/settings/repositories"
    ),
    "GET /api/models-tags-by-type": Row(ALL),
    "GET /api/datasets-tags-by-type": Row(ALL),
    f"POST {API}/super-squash/{{revision}}": Row(WRITERS, json={}),
    f"POST {API}/revert/{{revision}}": Row(WRITERS, json={}),
    f"GET {API}/lfs-files": Row(MEMBERS),
    f"POST {API}/lfs-files/batch": Row(WRITERS, json={"deletions": {"sha": []}}),
    f"GET {API}/safetensors-metadata/{{path:path}}": Row(MEMBERS),
    f"POST {API}/duplicate": Row(WRITERS, json={"repository": "acme/copy"}),
    f"GET {API}/discussions": Row(MEMBERS),
    f"POST {API}/discussions": Row(PARTICIPANTS, json={"title": "x"}),
    f"GET {TALK}": Row(MEMBERS),
    f"POST {TALK}/comment": Row(PARTICIPANTS, json={"comment": "x"}),
    f"POST {TALK}/comment/{{comment_id}}/edit": Row(
        frozenset({"writing token"}),
        "/api/models/acme/ink/discussions/1/comment/$COMMENT/edit",
        {"content": "y"},
    ),
    f"POST {TALK}/comment/{{comment_id}}/hide": Row(
        WRITERS, "/api/models/acme/ink/discussions/1/comment/$COMMENT/hide"
    ),
    f"POST {TALK}/title": Row(WRITERS, json={"title": "another"}),
    f"POST {TALK}/status": Row(WRITERS, json={"status": "closed"}),
    f"POST {TALK}/merge": Row(WRITERS, "/api/models/acme/ink/discussions/2/merge", json={}),
    f"POST {API}/preupload/{{revision}}": Row(
        WRITERS, json={"files": [{"path": "b.txt", "size": 1}]}
    ),
    f"POST {API}/commit/{{revision}}": Row(WRITERS, lines=COMMIT),
    f"GET {API}/xet-write-token/{{revision}}": Row(WRITERS),
    # Webhooks: eve's own.
    f"GET {HOOKS}": Row(ACCOUNTS),
    f"POST {HOOKS}": Row(ACCOUNTS, json={"url": "https://a.example", "watched": []}),
    f"GET {HOOK}": Row(STRANGER, EVES_HOOK),
    f"POST {HOOK}": Row(STRANGER, EVES_HOOK, json={"watched": []}),
    f"DELETE {HOOK}": Row(STRANGER, EVES_HOOK),
    f"POST {HOOK}/enable": Row(STRANGER, f"{EVES_HOOK}/enable"),
    f"POST {HOOK}/disable": Row(STRANGER, f"{EVES_HOOK}/disable"),
    f"GET {HOOK}/deliveries": Row(STRANGER, f"{EVES_HOOK}/deliveries"),
    f"POST {HOOK}/deliveries/{{delivery_id}}/redeliver": Row(
        STRANGER, f"{EVES_HOOK}/deliveries/$DELIVERY/redeliver"
    ),
    # Collections: a private one of acme.
    f"GET {PACKS}": Row(ALL),
    f"POST {PACKS}": Row(WRITERS, json={"title": "More", "namespace": "acme"}),
    f"GET {PACK}": Row(MEMBERS, ACMES_PACK),
    f"PATCH {PACK}": Row(WRITERS, ACMES_PACK, json={"private": False}),
    f"DELETE {PACK}": Row(WRITERS, ACMES_PACK),
    f"POST {PACK}/items": Row(
        WRITERS, f"{ACMES_PACK}/items", json={"item": {"type": "dataset", "id": "acme/ink"}}
    ),
    f"PATCH {PACKED}": Row(WRITERS, PACKED_INK, json={"note": "x"}),
    f"DELETE {PACKED}": Row(WRITERS, PACKED_INK),
    "POST /api/validate-yaml": Row(ALL, json={"content": ""}),
    "GET /api/agent-harnesses": Row(ALL),
    "HEAD /api/telemetry/{path:path}": Row(ALL),
    # Without a token of its own kind nobody sends xorbs.
    "POST /xet/{cache}/v1/xorbs/{prefix}/{xorb}": Row(NOBODY),
    "POST /xet/{cache}/v1/shards": Row(NOBODY),
    "POST /xet/{cache}/shards": Row(NOBODY),
    # The pages
    "GET /static/files/{build}/{name}": Row(ALL),
    "GET /static/patterns/{profile}-{seed}.svg": Row(ALL),
    "GET /favicon.ico": Row(ALL),
    "GET /": Row(ALL),
    "POST /settings/theme": Row(ALL, form={"theme": "dark"}),
    "GET /login": Row(ALL),
    "POST /login": Row(NOBODY, form={"name": "x", "password": "y"}),
    "POST /logout": Row(ALL),
    "GET /signup": Row(NOBODY),
    "POST /signup": Row(NOBODY, form={"name": "new", "password": "correct horse battery"}),
    "GET /invite": Row(NOBODY, "/invite?code=x", hidden=frozenset({"InvitationNotFound"})),
    "POST /invite": Row(
        NOBODY, form={"code": "x", "password": "y"}, hidden=frozenset({"InvitationNotFound"})
    ),
    "GET /login/oidc": Row(NOBODY, hidden=frozenset({"PageNotFound"})),
    "GET /login/oidc/callback": Row(NOBODY, hidden=frozenset({"PageNotFound"})),
    "GET /login/oidc/name": Row(NOBODY),
    "POST /login/oidc/name": Row(NOBODY, form={"name": "new"}),
    "GET /settings": Row(USERS),
    "POST /settings/name": Row(ACCOUNTS, form={"full_name": "x"}),
    "POST /settings/password": Row(ACCOUNTS, form={"password": "correct horse battery"}),
    "POST /settings/identities/{identity_id}/remove": Row(
        STRANGER, "/settings/identities/1/remove"
    ),
    "GET /settings/tokens": Row(USERS),
    "POST /settings/tokens": Row(ACCOUNTS, form={"name": "x"}),
    "POST /settings/tokens/{token_id}/revoke": Row(STRANGER, "/settings/tokens/$EVES_TOKEN/revoke"),
    "GET /settings/sessions": Row(USERS),
    "POST /settings/sessions/{token_id}/end": Row(STRANGER, "/settings/sessions/$EVES_TOKEN/end"),
    "POST /settings/sessions/end-others": Row(ACCOUNTS),
    "GET /settings/organizations": Row(USERS),
    "POST /settings/organizations": Row(ACCOUNTS, form={"name": "neworg"}),
    "GET /organizations/{name}": Row(MEMBERS, "/organizations/acme"),
    "POST /organizations/{name}/members": Row(
        MANAGERS, "/organizations/acme/members", form={"user": "eve", "role": "reader"}
    ),
    "POST /organizations/{name}/remove": Row(
        MANAGERS, "/organizations/acme/remove", form={"user": "ada"}
    ),
    "GET /settings/webhooks": Row(ACCOUNTS),
    "POST /settings/webhooks": Row(ACCOUNTS, form={"url": "https://a.example", "watched": "a"}),
    "GET /settings/webhooks/{key}": Row(STRANGER, "/settings/webhooks/$HOOK"),
    "POST /settings/webhooks/{key}": Row(
        STRANGER, "/settings/webhooks/$HOOK", form={"url": "https://a.example", "watched": "a"}
    ),
    "POST /settings/webhooks/{key}/{turn}": Row(STRANGER, "/settings/webhooks/$HOOK/disable"),
    "POST /settings/webhooks/{key}/deliveries/{delivery_id}/redeliver": Row(
        STRANGER, "/settings/webhooks/$HOOK/deliveries/$DELIVERY/redeliver"
    ),
    "GET /settings/users": Row(BOSS),
    "POST /settings/users/invite": Row(BOSS),
    "POST /settings/users/{name}/reset": Row(BOSS, "/settings/users/eve/reset"),
    "POST /settings/users/{name}/{change}": Row(BOSS, "/settings/users/eve/disable"),
    "GET /settings/audit": Row(BOSS),
    "GET /jobs": Row(ALL),
    "GET /jobs/{job_id}": Row(ADA, "/jobs/j1"),
    "POST /jobs/{job_id}/cancel": Row(ADA_WRITING, "/jobs/j1/cancel"),
    "GET /bench": Row(ALL),
    "GET /bench/add": Row(ALL),
    "GET /bench/report": Row(ALL),
    "GET /bench/adapters": Row(ALL),
    "POST /bench/merge": Row(WRITING),
    "POST /bench/bake": Row(WRITING),
    f"GET {PACK_PAGE}": Row(MEMBERS, ACMES_PAGE),
    "GET /collections/new": Row(WRITING),
    "POST /collections/new": Row(WRITERS, form={"namespace": "acme", "title": "More"}),
    f"GET {PACK_PAGE}/edit": Row(WRITERS, f"{ACMES_PAGE}/edit"),
    f"POST {PACK_PAGE}/edit": Row(
        WRITERS, f"{ACMES_PAGE}/edit", form={"title": "Pack", "visibility": "public"}
    ),
    f"POST {PACK_PAGE}/delete": Row(WRITERS, f"{ACMES_PAGE}/delete", form={"confirm": "Pack"}),
    f"POST {PACK_PAGE}/items/{{item_id}}/{{turn}}": Row(
        WRITERS, f"{ACMES_PAGE}/items/$INSIDE/save", form={"note": "x"}
    ),
    "GET /{namespace}": Row(ALL),
    "GET /{path:path}": Row(ALL, "/no/such/page"),
}
# The same under two addresses: models have no prefix, datasets have one.
for prefix, kind in (("/", "/"), ("/{kind:repos}/", "/datasets/")):
    there = kind + "acme/ink.git/info/lfs/objects"
    name = prefix + LFS
    TABLE |= {
        f"POST {name}/batch": Row(
            PARTICIPANTS, f"{there}/batch", json={"operation": "upload", "objects": [OBJECT]}
        ),
        f"PUT {name}/{{oid}}": Row(NOBODY, f"{there}/$SHA?signature=x"),
        f"POST {name}/{{oid}}/verify": Row(PARTICIPANTS, f"{there}/$SHA/verify", json=OBJECT),
        f"GET {name}/{{oid}}": Row(MEMBERS, f"{there}/$SHA"),
        f"PUT {name}/{{oid}}/parts/{{number}}": Row(NOBODY, f"{there}/$SHA/parts/1?signature=x"),
        f"GET {name}/{{oid}}/parts": Row(NOBODY, f"{there}/$SHA/parts?signature=x"),
        f"POST {name}/{{oid}}/parts": Row(
            NOBODY, f"{there}/$SHA/parts?signature=x", json={"oid": "$SHA", "parts": []}
        ),
        f"GET {prefix}{{namespace}}/{{name}}/resolve/{{revision}}/{{path:path}}": Row(
            MEMBERS, f"{kind}acme/ink/resolve/main/a.txt"
        ),
    }
for prefix, kind in (("/", "models"), ("/datasets/", "datasets")):
    name, there = prefix + "{namespace}/{name}", prefix + "acme/ink"
    TABLE |= {
        f"GET {name}": Row(MEMBERS, there),
        f"GET {name}/tree/{{place:path}}": Row(MEMBERS, f"{there}/tree/main"),
        f"GET {name}/blob/{{place:path}}": Row(MEMBERS, f"{there}/blob/main/a.txt"),
        f"GET {name}/commits/{{revision:path}}": Row(MEMBERS, f"{there}/commits/main"),
        f"POST {name}/ask-access": Row(PARTICIPANTS, f"{there}/ask-access"),
        f"POST {name}/like": Row(PARTICIPANTS, f"{there}/like"),
        f"POST {name}/collect": Row(WRITERS, f"{there}/collect", form={"collection": "acme/$PACK"}),
        f"GET {name}/discussions": Row(MEMBERS, f"{there}/discussions"),
        f"GET {name}/discussions/new": Row(PARTICIPANTS, f"{there}/discussions/new"),
        f"POST {name}/discussions/new": Row(
            PARTICIPANTS, f"{there}/discussions/new", form={"title": "x"}
        ),
        f"GET {name}/discussions/{{num}}": Row(MEMBERS, f"{there}/discussions/1"),
        f"POST {name}/discussions/{{num}}/comment": Row(
            PARTICIPANTS, f"{there}/discussions/1/comment", form={"text": "x"}
        ),
        f"POST {name}/discussions/{{num}}/status": Row(
            WRITERS, f"{there}/discussions/1/status", form={"status": "closed"}
        ),
        f"POST {name}/discussions/{{num}}/title": Row(
            WRITERS, f"{there}/discussions/1/title", form={"title": "another"}
        ),
        f"POST {name}/discussions/{{num}}/comments/{{comment_id}}/edit": Row(
            frozenset({"writing token"}),
            f"{there}/discussions/1/comments/$N{kind}/edit",
            form={"text": "y"},
        ),
        f"POST {name}/discussions/{{num}}/comments/{{comment_id}}/hide": Row(
            WRITERS, f"{there}/discussions/1/comments/$N{kind}/hide"
        ),
        f"POST {name}/discussions/{{num}}/merge": Row(WRITERS, f"{there}/discussions/2/merge"),
        f"GET {name}/settings": Row(WRITERS, f"{there}/settings"),
        f"POST {name}/settings": Row(
            WRITERS, f"{there}/settings", form={"visibility": "public", "gate": "open"}
        ),
        f"POST {name}/settings/move": Row(
            WRITERS, f"{there}/settings/move", form={"to_namespace": "acme", "to_name": "oil"}
        ),
        f"POST {name}/settings/delete": Row(
            WRITERS, f"{there}/settings/delete", form={"confirm": "acme/ink"}
        ),
        f"GET {name}/access": Row(WRITERS, f"{there}/access"),
        f"POST {name}/access": Row(
            WRITERS, f"{there}/access", form={"request_id": "1", "state": "accepted"}
        ),
        f"POST {name}/access/grant": Row(WRITERS, f"{there}/access/grant", form={"user": "bob"}),
    }
# Features and names that the hub does not have: the same answer for everybody.
ABSENT = (
    "/api/{path:path}",
    "/xet/{cache}/{path:path}",
    "/{name}/resolve/{revision}/{path:path}",
    "/api/{kind:repos}/{name}",
    "/api/{kind:repos}/{name}/{what:of_repo}",
    "/api/{kind:repos}/{name}/{what:of_repo}/{rest:path}",
)


def routes() -> set[str]:
    """`METHOD /template` of every route; HEAD goes with GET."""
    found = set()
    for route in iter_route_contexts(create_app(Settings()).routes):
        methods = (route.methods or set()) - {"OPTIONS"}
        methods -= {"HEAD"} if "GET" in methods else set()
        found |= {f"{method} {route.path}" for method in methods if route.path not in ABSENT}
    return found


def test_every_route_has_a_row_and_every_row_a_route() -> None:
    assert routes() - set(TABLE) == set(), "say in the table who may use these"
    assert set(TABLE) - routes() == set(), "these are gone"


def sample_of(template: str) -> str:
    path = filled_with_samples(template).replace("/admin/ink", "/acme/ink")
    return path.replace("/discussions/x", "/discussions/1")


class World:
    """The hub of the table, put back as it was after each request that may have changed it."""

    def __init__(self, hub: Hub, client: TestClient, folder: Path) -> None:
        self.hub, self.client = hub, client
        self.tokens: dict[str, str | None] = {"anonymous": None, "boss": hub.admin_token}
        self.values: dict[str, str] = {}
        self._populate(folder)
        self._snapshot = sqlite3.connect(":memory:", check_same_thread=False)
        with self._database() as live:
            live.backup(self._snapshot)

    def ask(self, who: str, method: str, row: Row, template: str) -> tuple[bool, str]:
        """Whether the request was let in, and what was answered."""
        path = row.path or sample_of(template)
        headers = {} if self.tokens[who] is None else bearer(self.tokens[who])
        answer = self.client.request(
            method,
            self._filled(path),
            json=self._filled(row.json),
            data=self._filled(row.form),
            content=row.lines,
            headers=headers,
        )
        code = answer.headers.get("X-Error-Code", "")
        is_json = answer.headers.get("Content-Type", "") == "application/json"
        if not code and is_json and answer.content:
            body = answer.json()
            error = body.get("error") if isinstance(body, dict) else None
            code = error["code"] if isinstance(error, dict) else ""
        is_hidden = answer.status_code == 404 and code in HIDDEN
        is_refused = answer.status_code in (401, 403) or is_hidden or code in row.hidden
        assert answer.status_code < 500 or answer.status_code == 501, (template, answer.text)
        return not is_refused, f"{answer.status_code} {code}"

    def restore(self) -> None:
        self.client.cookies.clear()
        with self._database() as live:
            self._snapshot.backup(live)

    def close(self) -> None:
        self._snapshot.close()

    def _filled(self, value: Any) -> Any:
        if isinstance(value, str):
            for name, known in self.values.items():
                value = value.replace(f"${name}", known)
        elif isinstance(value, dict):
            value = {key: self._filled(inner) for key, inner in value.items()}
        elif isinstance(value, list):
            value = [self._filled(inner) for inner in value]
        return value

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        connection = self.hub.db.writer.raw_connection()
        try:
            assert isinstance(connection.driver_connection, sqlite3.Connection)
            yield connection.driver_connection
        finally:
            connection.close()

    def _populate(self, folder: Path) -> None:
        hub = self.hub
        ada, self.tokens["writing token"] = make_user(hub, "ada")
        self.tokens["reading token"] = new_token(hub, "ada", Scope.READ)[1]
        for name, who in (("olga", "admin"), ("bob", "reader"), ("eve", "stranger")):
            viewer, self.tokens[who] = make_user(hub, name, Scope.ADMIN)
            if name == "olga":
                olga: Viewer = viewer
        _, spare = new_token(hub, "eve")
        with hub.db.write() as session:
            self.values["EVES_TOKEN"] = str(users.viewer_of(session, spare).token_id)
            assert olga.user is not None
            users.create_organization(session, "acme", olga.user)
            hook = Webhook(
                key="h" * 24,
                user_id=users.find_user(session, "eve").id or 0,
                url="https://a.example",
                watched=[],
                domains=[],
            )
            session.add(hook)
            session.flush()
            said = {"type": "model", "namespace": "eve", "name": "x", "private": False}
            said |= {"head": None, "owner": None}
            delivery = Delivery(
                webhook_id=hook.id or 0,
                kind="repo.created",
                repo_id=999,
                document=said,
                state=DeliveryState.DEAD,
            )
            session.add(delivery)
            session.flush()
            self.values |= {"HOOK": hook.key, "DELIVERY": str(delivery.id)}
            organizations.set_role(session, olga, "acme", "ada", Role.WRITER)
            organizations.set_role(session, olga, "acme", "bob", Role.READER)
        files = {"a.txt": b"abc", "a.safetensors": lora_bytes(folder)}
        for type in RepoType:
            publish_files(hub, ada, "acme/ink", files, private=True, type=type)
        self.values["SHA"] = hashlib.sha256(files["a.txt"]).hexdigest()
        self.values["LORA"] = hashlib.sha256(files["a.safetensors"]).hexdigest()
        writer = bearer(self.tokens["writing token"])
        for kind in ("datasets", "models"):
            for path, body in (
                ("branch/old", {}),
                ("tag/main", {"tag": "v1"}),
                ("discussions", {"title": "one", "description": "first"}),
                ("discussions", {"title": "two", "pullRequest": True}),
                ("discussions/1/comment", {"comment": "hello"}),
            ):
                made = self.client.post(f"/api/{kind}/acme/ink/{path}", json=body, headers=writer)
                assert made.is_success, (path, made.text)
                if "comment" in path:
                    self.values["COMMENT"] = made.json()["newMessage"]["id"]
                    self.values[f"N{kind}"] = str(int(self.values["COMMENT"], 16))
        with hub.db.write() as session:
            pack = curation.create(session, ada, "acme", title="Pack", private=True)
            curation.add_repo(session, ada, pack, RepoType.MODEL, "acme/ink")
            (shown,) = collections.contents(session, ada, [pack])[pack.id or 0]
            self.values |= {"PACK": f"pack-{pack.key}", "ITEM": f"{shown.item.id:024x}"}
            self.values["INSIDE"] = str(shown.item.id)
        with hub.db.write() as session:
            moment = "2026-01-01 00:00:00.000000"
            recipe = "INSERT INTO recipe VALUES ('d1', '{}', :at)"
            session.execute(text(recipe), {"at": moment})
            job = (
                "INSERT INTO job (id, kind, state, requester_id, request, request_digest,"
                " recipe_digest, resources, fence, attempts, cancel_requested, sequence,"
                " progress_done, created_at, error, finished_at) VALUES ('j1', 'merge', 'failed',"
                ' :ada, \'{"publish": {"repo": "acme/x", "path": "x.safetensors"},'
                " \"recipe\": \"{}\"}', '', 'd1', '{}', 1, 1, 0, 1, 0, :at,"
                ' \'{"code": "x", "message": "y", "param": null}\', :at)'
            )
            session.execute(text(job), {"ada": ada.user_id, "at": moment})
            identity = "INSERT INTO identity (user_id, issuer, subject, name, created_at)"
            identity += " SELECT id, 'https://id.example', n, '', :at FROM \"user\","
            identity += " (SELECT 'a' AS n UNION SELECT 'b') WHERE key = 'eve'"
            session.execute(text(identity), {"at": moment})


@pytest.fixture
def world(hub: Hub, tmp_path: Path) -> Iterator[World]:
    settings = hub.settings.model_copy(
        update={"requests_per_token": 0, "requests_per_address": 0, "workers": 0}
    )
    app = create_app(settings, hub=replace(hub, settings=settings))
    with TestClient(app, base_url=HOST, follow_redirects=False) as client:
        made = World(hub, client, tmp_path)
        yield made
        made.close()


@sqlite_only
def test_everybody_may_what_the_table_says_and_nothing_else(world: World) -> None:
    wrong = []
    for name, row in TABLE.items():
        method, _, template = name.partition(" ")
        for who in VIEWERS:
            is_in, answer = world.ask(who, method, row, template)
            if is_in != (who in row.may):
                wrong.append(f"{name} as {who}: {answer}")
            if is_in and method != "GET":
                world.restore()
    assert not wrong, "\n" + "\n".join(wrong)


@sqlite_only
def test_what_the_hub_does_not_have_is_nobodys(world: World) -> None:
    samples = {"cache": "x", "path": "nothing", "name": "ink", "revision": "main", "rest": "main"}
    samples |= {"kind": "models", "what": "tree"}
    for template in ABSENT:
        path = re.sub(r"\{(\w+)[^}]*\}", lambda m: samples[m[1]], template)
        for who in VIEWERS:
            token = world.tokens[who]
            headers = {} if token is None else bearer(token)
            for method in ("GET", "POST", "DELETE"):
                status = world.client.request(method, path, headers=headers).status_code
                assert status in (401, 404, 405, 501), (method, path, who, status)
