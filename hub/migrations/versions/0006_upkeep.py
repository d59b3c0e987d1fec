"""Since when a blob is condemned; whether a restored store was checked."""

import sqlalchemy as sa
from alembic import op

from hub.db import UTCDateTime

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("blob", sa.Column("condemned_at", UTCDateTime(), nullable=True))
    op.create_index(op.f("ix_blob_condemned_at"), "blob", ["condemned_at"], unique=False)
    op.add_column("store_identity", sa.Column("unchecked", sa.String(), nullable=True))
