"""`celery -A workers.celery …`: inspect and control a deployment; workers start by `workers`."""

from broker.app import make_app
from config import catalogue, settings

_settings = settings.load()
app = make_app(_settings, model_queues=catalogue.load(_settings.models.catalogue))
app.conf.imports = ("workers.tasks",)
