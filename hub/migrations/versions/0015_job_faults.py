"""Jobs that wait for a store or a database that was away."""

import sqlalchemy as sa
from alembic import op

from hub.db import UTCDateTime

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("job", sa.Column("faults", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("job", sa.Column("not_before", UTCDateTime(), nullable=True))
