"""Manifests of commits and repos."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "manifest",
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["sha256"], ["blob.sha256"], name=op.f("fk_manifest_sha256")),
        sa.PrimaryKeyConstraint("subject", name=op.f("pk_manifest")),
    )
    # The collection asks of every blob whether a manifest is it.
    op.create_index(op.f("ix_manifest_sha256"), "manifest", ["sha256"], unique=False)
