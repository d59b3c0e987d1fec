"""The text index of adapters: SQLite's FTS5, or a tsvector on PostgreSQL.

A query is words; each must begin some word of the adapter's text.
Nothing in it is an operator: words are taken apart here and quoted.
"""

import re
from collections.abc import Mapping

from sqlalchemy import ColumnElement, Integer, column, func, literal_column, table, text
from sqlmodel import Session, select
from sqlmodel.sql.expression import Select

MAX_QUERY = 200
MAX_WORDS = 12
# Columns by weight: a hit in the name says more than one in the card.
FIELDS = ("name", "words", "tags", "body")
MAX_BODY = 20_000

_WORD = re.compile(r"\w+")
_index = table("adapter_text", column("rowid"), column("adapter_text"), column("document"))


def words_of(query: str) -> list[str]:
    """The words of a query, capped in number and length; underscores separate as they do in FTS5."""
    return [word for part in _WORD.findall(query[:MAX_QUERY]) for word in part.split("_") if word][
        :MAX_WORDS
    ]


def is_sqlite(session: Session) -> bool:
    return session.get_bind().dialect.name == "sqlite"


def put(session: Session, adapter_id: int, fields: Mapping[str, str]) -> None:
    """Index one adapter; its old text is gone with its old row."""
    values = {name: fields[name] for name in FIELDS} | {"id": adapter_id}
    values["body"] = values["body"][:MAX_BODY]
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


def matches(session: Session, words: list[str]) -> Select[tuple[int, int]]:
    """Rows (adapter id, relevance); relevance is an integer, larger is better."""
    if is_sqlite(session):
        match = " ".join(f'"{word}"*' for word in words)
        rank = literal_column("CAST(-1e6 * bm25(adapter_text, 12, 8, 5, 1) AS INTEGER)", Integer)
        found: ColumnElement[bool] = _index.c.adapter_text.op("MATCH")(match)
        return select(_index.c.rowid.label("id"), rank.label("relevance")).where(found)
    query = func.to_tsquery("simple", " & ".join(f"'{word}':*" for word in words))
    rank = func.cast(1e6 * func.ts_rank(_index.c.document, query), Integer)
    found = _index.c.document.op("@@")(query)
    return select(_index.c.rowid.label("id"), rank.label("relevance")).where(found)
