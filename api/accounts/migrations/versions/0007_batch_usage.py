"""What a batch used, its model, and whether its end has still to be told to webhooks.

Revision 0007.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_NUMBERS = ("input_tokens", "cached_tokens", "output_tokens")


def upgrade() -> None:
    op.execute("ALTER TABLE batches ADD COLUMN model VARCHAR(255)")
    for name in _NUMBERS:
        op.execute(f"ALTER TABLE batches ADD COLUMN {name} BIGINT DEFAULT 0 NOT NULL")
    # Batches that ended before aren't told: nobody could ask for it then.
    op.add_column(
        "batches",
        sa.Column("untold", sa.Boolean(), server_default=sa.false(), nullable=False),
    )
    op.create_index("ix_batches_untold", "batches", ["untold"])


def downgrade() -> None:
    op.drop_index("ix_batches_untold", "batches")
    for name in ("untold", *reversed(_NUMBERS), "model"):
        op.execute(f"ALTER TABLE batches DROP COLUMN {name}")
