"""Jobs in their queues, and answers that are kept."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, SecretStr, field_validator, model_validator

from config.sections.base import Part, Positive, Seconds, Section


class Queue(Section):
    """Leases, bounds and lifetimes of jobs."""

    #: `amqp://` or `amqps://` URL of a RabbitMQ over which workers get their turns; empty: over the
    #: Redis that holds the jobs, at 1.5 times the rate. A password in it is never printed.
    broker_url: SecretStr = SecretStr("")
    #: A job whose worker is silent for this long is given to another one.
    lease_ttl_s: Seconds = 10.0
    renew_every_s: Seconds = 3.0
    #: Jobs taken by one claim at most.
    claim_batch: Annotated[int, Field(ge=1, le=64)] = 4
    #: Part of a worker's slots that batch jobs may fill (one slot at least); the rest stays free
    #: for more urgent ones, which then needn't wait for a batch job to end.
    batch_slots: Annotated[float, Field(ge=0.1, le=1)] = 0.75
    #: Starts a job may have, crashes included.
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 3
    #: How long a finished job can be read.
    result_ttl_s: Positive = 86_400
    #: Queued jobs one model queue may hold, all tenants together.
    max_queued_total: Positive = 1_000_000
    #: Replicas that must have a new job before it is answered with 202; without them 503.
    await_replicas: Annotated[int, Field(ge=0, le=16)] = 0
    #: Parts of that at which new jobs of a band are refused: the least urgent first.
    shed_batch_at: Part = 0.8
    shed_standard_at: Part = 0.9
    shed_interactive_at: Part = 1.0
    #: Policy of a tenant that has none of its own.
    default_weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    default_max_in_flight: Positive = 64
    default_max_queued: Positive = 10_000

    @field_validator("broker_url")
    @classmethod
    def _known_broker(cls, value: SecretStr) -> SecretStr:
        url = value.get_secret_value()
        if url and not url.startswith(("amqp://", "amqps://")):
            raise ValueError("must be empty or start with amqp:// or amqps://")
        return value

    @model_validator(mode="after")
    def _in_order(self) -> Queue:
        if not self.shed_batch_at <= self.shed_standard_at <= self.shed_interactive_at:
            raise ValueError("SHED_BATCH_AT, SHED_STANDARD_AT and SHED_INTERACTIVE_AT must rise")
        return self


class Answers(Section):
    """Answers kept for the same request of the same tenant; which models: `keep_answers` there."""

    #: 0 keeps none.
    ttl_s: Annotated[float, Field(ge=0)] = 3_600.0
    #: Answers of one tenant; the oldest go first.
    most: Positive = 1_000
    #: A longer one isn't kept.
    max_bytes: Positive = 65_536
