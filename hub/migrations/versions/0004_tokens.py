"""Tokens: scope admin, places, last use; sessions of the web page beside them."""

import sqlalchemy as sa
from alembic import op

from hub.db import UTCDateTime

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("token") as table:
        table.add_column(sa.Column("kind", sa.String(), nullable=False, server_default="access"))
        table.add_column(sa.Column("places", sa.JSON(), nullable=True))
        table.add_column(sa.Column("parent_id", sa.Integer(), nullable=True))
        table.add_column(sa.Column("address", sa.String(), nullable=True))
        table.add_column(sa.Column("last_used_at", UTCDateTime(), nullable=True))
    # Tokens keep what they could do: before, writing included tokens, organisations and users.
    op.execute("UPDATE token SET scope = 'admin' WHERE scope = 'write'")
