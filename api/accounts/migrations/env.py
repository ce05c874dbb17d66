"""Run by Alembic for every command; the connection and its transaction are the caller's."""

from __future__ import annotations

from alembic import context

from api.accounts.tables import Base


def run() -> None:
    connection = context.config.attributes.get("connection")
    if connection is None:
        raise RuntimeError("migrations run through `forebay db upgrade`")
    # SQLite can't alter most things in place; batch mode copies the table instead.
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=connection.dialect.name == "sqlite",
    )
    with context.begin_transaction():
        context.run_migrations()


run()
