"""Jobs, recipes, lineage."""

import sqlalchemy as sa
from alembic import op

from hub.db import UTCDateTime

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "recipe",
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("canonical", sa.String(), nullable=False),
        sa.Column("created_at", UTCDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_recipe")),
    )
    op.create_table(
        "job",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("requester_id", sa.Integer(), nullable=False),
        sa.Column("idempotency_key", sa.String(), nullable=True),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("request_digest", sa.String(), nullable=False),
        sa.Column("recipe_digest", sa.String(), nullable=False),
        sa.Column("resources", sa.JSON(), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("lease_until", UTCDateTime(), nullable=True),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("progress_done", sa.Integer(), nullable=False),
        sa.Column("progress_total", sa.Integer(), nullable=True),
        sa.Column("eta_s", sa.Float(), nullable=True),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.Column("result", sa.JSON(), nullable=True),
        sa.Column("created_at", UTCDateTime(), nullable=False),
        sa.Column("started_at", UTCDateTime(), nullable=True),
        sa.Column("finished_at", UTCDateTime(), nullable=True),
        sa.ForeignKeyConstraint(
            ["recipe_digest"], ["recipe.digest"], name=op.f("fk_job_recipe_digest")
        ),
        sa.ForeignKeyConstraint(["requester_id"], ["user.id"], name=op.f("fk_job_requester_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job")),
        sa.UniqueConstraint(
            "requester_id", "idempotency_key", name=op.f("uq_job_requester_id_idempotency_key")
        ),
    )
    op.create_index(op.f("ix_job_recipe_digest"), "job", ["recipe_digest"], unique=False)
    op.create_index("ix_job_requester_created", "job", ["requester_id", "created_at"], unique=False)
    op.create_index("ix_job_state_created", "job", ["state", "created_at"], unique=False)
    op.create_table(
        "edge",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("child_repo_id", sa.Integer(), nullable=False),
        sa.Column("child_commit", sa.String(), nullable=False),
        sa.Column("child_path", sa.String(), nullable=False),
        sa.Column("child_sha256", sa.String(), nullable=False),
        sa.Column("parent_repo_id", sa.Integer(), nullable=True),
        sa.Column("parent_commit", sa.String(), nullable=False),
        sa.Column("parent_path", sa.String(), nullable=False),
        sa.Column("parent_sha256", sa.String(), nullable=False),
        sa.Column("relation", sa.String(), nullable=False),
        sa.Column("strength", sa.Float(), nullable=True),
        sa.Column("recipe_digest", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["child_repo_id"], ["repo.id"], name=op.f("fk_edge_child_repo_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["parent_repo_id"],
            ["repo.id"],
            name=op.f("fk_edge_parent_repo_id"),
            ondelete="SET NULL",
        ),
        sa.ForeignKeyConstraint(
            ["recipe_digest"], ["recipe.digest"], name=op.f("fk_edge_recipe_digest")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_edge")),
    )
    op.create_index(
        "ix_edge_child", "edge", ["child_repo_id", "child_commit", "child_path"], unique=False
    )
    op.create_index(op.f("ix_edge_child_sha256"), "edge", ["child_sha256"], unique=False)
    op.create_index(op.f("ix_edge_parent_repo_id"), "edge", ["parent_repo_id"], unique=False)
    op.create_index(op.f("ix_edge_parent_sha256"), "edge", ["parent_sha256"], unique=False)
