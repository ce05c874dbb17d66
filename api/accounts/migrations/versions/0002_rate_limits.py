"""Rate limits of tenants and API keys; 0 is without a bound.

Revision 0002.
"""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_COLUMNS = (
    ("tenants", "requests_per_minute"),
    ("tenants", "tokens_per_minute"),
    ("tenants", "max_jobs"),
    ("api_keys", "requests_per_minute"),
    ("api_keys", "tokens_per_minute"),
)


def upgrade() -> None:
    # Plain SQL, in place on every database: a copied table would lose the keys that refer to it.
    for table, column in _COLUMNS:
        op.execute(f"ALTER TABLE {table} ADD COLUMN {column} INTEGER DEFAULT 0 NOT NULL")


def downgrade() -> None:
    for table, column in reversed(_COLUMNS):
        op.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
