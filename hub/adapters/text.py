"""The text index of adapters: SQLite's FTS5, or a tsvector on PostgreSQL.

A query is words; each must begin some word of the adapter's text.
Nothing in it is an operator: words are taken apart here and quoted.
"""

import re
from collections.abc import Mapping
from typing import Any

from sqlalchemy import (
    Integer,
    Select,
    String,
    cast,
    column,
    func,
    literal_column,
    select,
    table,
    text,
)
from sqlmodel import Session

MAX_QUERY = 200
MAX_WORDS = 12
# Columns by weight: a hit in the name says more than one in the card.
FIELDS = ("name", "words", "tags", "body")
MAX_BODY = 20_000

_WORD = re.compile(r"[^\W_]+")  # an underscore separates words, as it does in the index
_sqlite = table("adapter_text", column("rowid", Integer), column("adapter_text", String))
_postgresql = table("adapter_text", column("rowid", Integer), column("document"))


def words_of(query: str) -> list[str]:
    """The words of a query, capped in number and length."""
    return _WORD.findall(query[:MAX_QUERY])[:MAX_WORDS]


def is_sqlite(session: Session) -> bool:
    return session.get_bind().dialect.name == "sqlite"


def put(session: Session, adapter_id: int, fields: Mapping[str, str]) -> None:
    """Index one adapter; its old text is gone with its old row."""
    values: dict[str, Any] = {name: fields[name][:MAX_BODY].replace("\0", " ") for name in FIELDS}
    values["id"] = adapter_id
    if is_sqlite(session):
        statement = (
            "INSERT INTO adapter_text(rowid, name, words, tags, body)"
            " VALUES (:id, :name, :words, :tags, :body)"
        )
    else:
        document = " || ".join(
            f"setweight(to_tsvector('simple', replace(:{name}, '_', ' ')), '{weight}')"
            for name, weight in zip(FIELDS, "ABCD", strict=True)
        )
        statement = f"INSERT INTO adapter_text(rowid, document) VALUES (:id, {document})"
    session.execute(text(statement), values)


def forget(session: Session, repo_id: int) -> None:
    """Drop the texts of a repo, before its rows go: with `trusted_schema=OFF` no trigger may."""
    if is_sqlite(session):
        session.execute(
            text(
                "DELETE FROM adapter_text WHERE rowid IN"
                " (SELECT id FROM adapter WHERE repo_id = :repo_id)"
            ),
            {"repo_id": repo_id},
        )


def sweep(session: Session) -> None:
    """After a repo was deleted: drop texts that no adapter has."""
    if is_sqlite(session):
        session.execute(
            text("DELETE FROM adapter_text WHERE rowid NOT IN (SELECT id FROM adapter)")
        )


def matches(session: Session, words: list[str]) -> Select[Any]:
    """Rows (id of an adapter, relevance); relevance is an integer, larger is better."""
    if is_sqlite(session):
        match = " ".join(f'"{word}"*' for word in words)
        # bm25 is negative, and smaller for better hits.
        rank = literal_column("CAST(-1e6 * bm25(adapter_text, 12, 8, 5, 1) AS INTEGER)", Integer)
        return select(_sqlite.c.rowid.label("id"), rank.label("relevance")).where(
            _sqlite.c.adapter_text.op("MATCH")(match)
        )
    document = _postgresql.c.document
    wanted = func.to_tsquery("simple", " & ".join(f"'{word}':*" for word in words))
    relevance = cast(1e6 * func.ts_rank(document, wanted), Integer)
    return select(_postgresql.c.rowid.label("id"), relevance.label("relevance")).where(
        document.op("@@")(wanted)
    )
