"""Alembic's folder: how the accounts schema came to be, one revision per file."""
