"""Celery workers that hold a model each and run jobs in batches on it."""
