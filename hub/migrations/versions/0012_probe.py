"""What the store of the blobs can do."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("store_identity", sa.Column("probe", sa.String(), nullable=True))
