"""Baseline of `loadtests.submit`: FastAPI that hands jobs to Celery with `send_task`.

Run by uvicorn with uvloop and httptools, without access log. Both usual shapes are here: a sync
handler (in Starlette's thread pool) and an async one (on the loop). No result backend, no
authentication, no limits, no job record: what a quick service of this kind looks like at its best.
"""

from __future__ import annotations

import os
from typing import Any
from uuid import uuid4

import celery
from fastapi import FastAPI
from pydantic import BaseModel

broker = celery.Celery("baseline", broker=os.environ["BASELINE_REDIS"])
broker.conf.update(task_ignore_result=True, worker_send_task_events=False)

app = FastAPI()


class JobRequest(BaseModel):
    endpoint: str
    body: dict[str, Any]
    priority: str = "interactive"
    metadata: dict[str, str] = {}


class Accepted(BaseModel):
    id: str
    status: str


def _send(job: JobRequest) -> Accepted:
    job_id = uuid4().hex
    broker.send_task("run", args=[job.model_dump()], task_id=job_id)
    return Accepted(id=job_id, status="queued")


@app.post("/sync", status_code=202)
def submit_sync(job: JobRequest) -> Accepted:
    return _send(job)


@app.post("/async", status_code=202)
async def submit_async(job: JobRequest) -> Accepted:
    return _send(job)
