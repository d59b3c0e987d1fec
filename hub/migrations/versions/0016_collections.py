"""Collections of repos."""

import sqlalchemy as sa
from alembic import op

from hub.db import UTCDateTime

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "collection",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("namespace", sa.String(), nullable=False),
        sa.Column("namespace_key", sa.String(), nullable=False),
        sa.Column("title", sa.String(), nullable=False),
        sa.Column("description", sa.String(), nullable=True),
        sa.Column("theme", sa.String(), nullable=False),
        sa.Column("private", sa.Boolean(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("created_at", UTCDateTime(), nullable=False),
        sa.Column("last_updated", UTCDateTime(), nullable=False),
        sa.ForeignKeyConstraint(
            ["namespace_key"], ["namespace.key"], name=op.f("fk_collection_namespace_key")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_collection")),
        sa.UniqueConstraint("key", name=op.f("uq_collection_key")),
        sa.UniqueConstraint(
            "namespace_key", "title", name=op.f("uq_collection_namespace_key_title")
        ),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_collection_last_updated"), "collection", ["last_updated"])
    op.create_table(
        "collection_item",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("collection_id", sa.Integer(), nullable=False),
        sa.Column("repo_id", sa.Integer(), nullable=True),
        sa.Column("child_id", sa.Integer(), nullable=True),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("note", sa.String(), nullable=True),
        sa.ForeignKeyConstraint(
            ["collection_id"],
            ["collection.id"],
            name=op.f("fk_collection_item_collection_id"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["repo_id"], ["repo.id"], name=op.f("fk_collection_item_repo_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["child_id"],
            ["collection.id"],
            name=op.f("fk_collection_item_child_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_collection_item")),
        sa.UniqueConstraint(
            "collection_id", "repo_id", name=op.f("uq_collection_item_collection_id_repo_id")
        ),
        sa.UniqueConstraint(
            "collection_id", "child_id", name=op.f("uq_collection_item_collection_id_child_id")
        ),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_collection_item_repo_id"), "collection_item", ["repo_id"])
    op.create_index(op.f("ix_collection_item_child_id"), "collection_item", ["child_id"])
