"""Quotas: what every user and organisation keeps, counted, and may keep."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "quota",
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("used_bytes", sa.BigInteger(), nullable=False),
        sa.Column("limit_bytes", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["key"], ["namespace.key"]),
        sa.PrimaryKeyConstraint("key"),
    )
    op.execute(
        "INSERT INTO quota (key, used_bytes) SELECT namespace_key, SUM(size) FROM (SELECT DISTINCT"
        ' r.namespace_key, e.sha256, e.size FROM repo r JOIN "commit" c ON c.repo_id = r.id'
        " JOIN commit_entry e ON e.commit_id = c.id) AS kept GROUP BY namespace_key"
    )
