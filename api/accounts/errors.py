"""What can go wrong with accounts; every message is one line, fit to be printed."""

from __future__ import annotations


class AccountsError(Exception):
    """Anything the accounts can't do."""


class DatabaseUnavailableError(AccountsError):
    """The database can't be reached or used right now."""


class SchemaError(AccountsError):
    """The schema isn't the one this version of Forebay works with."""


class UnknownAccountError(AccountsError):
    """No such tenant or key."""


class NameTakenError(AccountsError):
    """Another tenant has this name."""


class InvalidAccountError(AccountsError):
    """A name, weight, bound, scope or date that isn't allowed."""
