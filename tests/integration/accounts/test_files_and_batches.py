"""Records of files and batches, on SQLite and PostgreSQL."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine

from api.accounts.batch import Batch
from api.accounts.batches import (
    BatchRecords,
    TooManyBatchesError,
    UnknownInputError,
)
from api.accounts.errors import SchemaError
from api.accounts.files import (
    FileInUseError,
    FileRecords,
    QuotaError,
    StoredFile,
    UnknownCursorError,
)
from api.accounts.records import Tenant
from api.accounts.store import AccountStore
from api.files.ids import new_batch_id, new_file_id
from broker.jobs import Usage
from broker.policies import TenantPolicy

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
GIB = 2**30


@pytest.fixture
def files(engine: Engine, store: AccountStore) -> FileRecords:
    for name in ("a", "b"):
        store.add_tenant(
            Tenant(id=f"ten_{name}", name=name, policy=TenantPolicy(), created_at=NOW,
                   updated_at=NOW)
        )  # fmt: skip
    return FileRecords(engine)


@pytest.fixture
def batches(engine: Engine, files: FileRecords) -> BatchRecords:
    return BatchRecords(engine)


def _file(**changes: Any) -> StoredFile:
    made: dict[str, Any] = {
        "id": new_file_id(), "tenant": "ten_a", "filename": "x", "purpose": "batch",
        "bytes": 10, "created_at": NOW,
    }  # fmt: skip
    return StoredFile(**{**made, **changes})


def _batch(files: FileRecords, **changes: Any) -> Batch:
    tenant = changes.get("tenant", "ten_a")
    file = _file(tenant=tenant)
    files.add(file, quota_bytes=GIB)
    made: dict[str, Any] = {
        "id": new_batch_id(), "tenant": tenant, "key_id": "key_a", "endpoint": "/v1/embeddings",
        "input_file_id": file.id, "window": 4, "created_at": NOW,
        "expires_at": NOW + timedelta(days=1),
    }  # fmt: skip
    return Batch(**{**made, **changes})


# -- files ----------------------------------------------------------------------------------------
def test_a_file_is_its_tenants_alone(files: FileRecords) -> None:
    file = _file(bytes=5 * GIB)
    files.add(file, quota_bytes=6 * GIB)
    assert files.get(file.id, tenant="ten_a", now=NOW) == file
    assert files.get(file.id, tenant="ten_b", now=NOW) is None
    assert not files.remove(file.id, tenant="ten_b")
    assert (files.usage("ten_a"), files.usage("ten_b")) == (5 * GIB, 0)
    assert files.known([file.id, "file-x"]) == {file.id}
    assert files.remove(file.id, tenant="ten_a")
    assert not files.remove(file.id, tenant="ten_a")


def test_the_quota_holds_for_uploads_that_end_together(files: FileRecords) -> None:
    def add(_: int) -> bool:
        try:
            files.add(_file(bytes=30), quota_bytes=100)
        except QuotaError:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(add, range(8))) == 3
    assert files.usage("ten_a") == 90


def test_pages_of_files_made_in_the_same_moment(files: FileRecords) -> None:
    made = [_file(purpose="user_data" if n % 2 else "batch") for n in range(7)]
    for file in made:
        files.add(file, quota_bytes=GIB)
    ids = sorted(file.id for file in made)
    seen: list[str] = []
    more, after = True, None
    while more:
        page, more = files.page("ten_a", now=NOW, after=after, limit=3, newest_first=False)
        seen += [file.id for file in page]
        after = seen[-1]
    assert seen == ids
    first, _ = files.page("ten_a", now=NOW, purpose="user_data", limit=1)
    assert first[0].id == max(file.id for file in made if file.purpose == "user_data")
    with pytest.raises(UnknownCursorError):
        files.page("ten_b", now=NOW, after=ids[0], limit=3)


def test_expired_files_are_gone_before_they_are_removed(
    files: FileRecords, batches: BatchRecords
) -> None:
    soon = NOW + timedelta(hours=1)
    expiring, reading, kept = _file(expires_at=soon), _file(expires_at=soon), _file()
    for file in (expiring, reading, kept):
        files.add(file, quota_bytes=GIB)
    batches.add(replace(_batch(files), input_file_id=reading.id), max_unfinished=9)
    assert files.get(expiring.id, tenant="ten_a", now=NOW) is not None
    assert files.get(expiring.id, tenant="ten_a", now=soon) is None
    assert expiring.id not in {f.id for f in files.page("ten_a", now=soon, limit=9)[0]}
    assert files.remove_expired(now=soon, limit=9) == [expiring.id]
    assert files.known([reading.id, kept.id]) == {reading.id, kept.id}


# -- batches --------------------------------------------------------------------------------------
def test_a_batch_needs_a_file_of_its_tenant(files: FileRecords, batches: BatchRecords) -> None:
    batch = _batch(files)
    foreign = _file(tenant="ten_b")
    wrong = _file(purpose="user_data")
    expired = _file(expires_at=NOW)
    for file in (foreign, wrong, expired):
        files.add(file, quota_bytes=GIB)
        with pytest.raises(UnknownInputError):
            batches.add(replace(batch, input_file_id=file.id), max_unfinished=9)
    batches.add(batch, max_unfinished=1)
    assert batches.get(batch.id, tenant="ten_a") == batch
    assert batches.get(batch.id, tenant="ten_b") is None
    assert batches.cancel(batch.id, tenant="ten_b", now=NOW) is None
    with pytest.raises(FileInUseError):
        files.remove(batch.input_file_id, tenant="ten_a")
    with pytest.raises(TooManyBatchesError):
        batches.add(_batch(files), max_unfinished=1)
    batches.add(_batch(files, tenant="ten_b"), max_unfinished=1)


def test_each_batch_is_claimed_once(files: FileRecords, batches: BatchRecords) -> None:
    made = [_batch(files) for _ in range(6)]
    for batch in made:
        batches.add(batch, max_unfinished=9)

    def claim(number: int) -> str | None:
        taken = batches.claim(f"p{number}", now=NOW, lease_s=10)
        return taken.id if taken else None

    with ThreadPoolExecutor(4) as threads:
        claimed = [each for each in threads.map(claim, range(24)) if each]
    assert sorted(claimed) == sorted(batch.id for batch in made)


def test_tenants_take_turns(files: FileRecords, batches: BatchRecords) -> None:
    for number in range(3):
        created = NOW + timedelta(seconds=number)
        batches.add(_batch(files, created_at=created), max_unfinished=9)
    late = _batch(files, tenant="ten_b", created_at=NOW + timedelta(seconds=9))
    batches.add(late, max_unfinished=9)
    claimed = [batches.claim("p", now=NOW, lease_s=10) for _ in range(4)]
    assert [batch.tenant for batch in claimed if batch] == ["ten_a", "ten_b", "ten_a", "ten_a"]


def test_a_claim_that_was_lost_writes_nothing(files: FileRecords, batches: BatchRecords) -> None:
    batches.add(_batch(files), max_unfinished=9)
    old = batches.claim("p1", now=NOW, lease_s=10)
    assert old is not None
    assert batches.renew(old, now=NOW, lease_s=10, completed=1, failed=0) == "validating"
    assert batches.claim("p2", now=NOW + timedelta(seconds=9), lease_s=10) is None
    late = NOW + timedelta(seconds=11)
    new = batches.claim("p2", now=late, lease_s=10)
    assert new is not None
    assert (new.id, new.epoch, new.completed) == (old.id, old.epoch + 1, 1)
    assert batches.renew(old, now=late, lease_s=10, completed=9, failed=9) is None
    assert not batches.begin(old, now=late, total=3)
    assert not batches.finalizing(old, now=late)
    assert not batches.fail(old, [{"code": "x"}], now=late)
    ended = {
        "now": late,
        "output": _file(),
        "errors": None,
        "completed": 9,
        "failed": 9,
        "usage": Usage(),
    }
    assert batches.finish(old, "completed", **ended) is None
    batches.release(old, until=late)
    assert batches.claim("p3", now=late, lease_s=10) is None
    assert files.page("ten_a", now=late, limit=9)[0][0].purpose == "batch"
    assert batches.begin(new, now=late, total=3, model="m")
    output = _file(purpose="batch_output")
    used = Usage(input_tokens=2**40, cached_tokens=5, output_tokens=7)
    ended = {"now": late, "output": output, "errors": None, "completed": 3, "failed": 0}
    ended["usage"] = used
    assert batches.finish(new, "completed", **ended) == "completed"
    shown = batches.get(new.id, tenant="ten_a")
    assert shown is not None
    assert (shown.status, shown.total, shown.completed) == ("completed", 3, 3)
    assert (shown.model, shown.usage) == ("m", used)
    # Webhooks are told once it is known that they were.
    assert [each.id for each in batches.untold(limit=9)] == [new.id]
    batches.told(new.id)
    assert batches.untold(limit=9) == []
    assert shown.output_file_id == output.id
    assert files.get(output.id, tenant="ten_a", now=late) == output
    # What has ended isn't driven again.
    assert batches.claim("p4", now=late + timedelta(days=1), lease_s=10) is None
    assert batches.unfinished([new.id]) == set()


def test_a_cancel_is_kept_through_every_step(files: FileRecords, batches: BatchRecords) -> None:
    batches.add(_batch(files), max_unfinished=9)
    batch = batches.claim("p", now=NOW, lease_s=10)
    assert batch is not None
    cancelled = batches.cancel(batch.id, tenant="ten_a", now=NOW)
    assert cancelled is not None
    assert (cancelled.status, cancelled.cancelling_at) == ("cancelling", NOW)
    assert batches.renew(batch, now=NOW, lease_s=10, completed=0, failed=0) == "cancelling"
    assert batches.begin(batch, now=NOW, total=2)
    assert batches.finalizing(batch, now=NOW)
    ended: dict[str, Any] = {"now": NOW, "output": None, "errors": None}
    assert (
        batches.finish(batch, "completed", **ended, completed=0, failed=2, usage=Usage())
        == "cancelled"
    )
    again = batches.cancel(batch.id, tenant="ten_a", now=NOW)
    assert again is not None
    assert again.status == "cancelled"


def test_a_released_batch_waits_as_long_as_was_said(
    files: FileRecords, batches: BatchRecords
) -> None:
    batches.add(_batch(files), max_unfinished=9)
    batch = batches.claim("p", now=NOW, lease_s=100)
    assert batch is not None
    batches.release(batch, until=NOW + timedelta(seconds=5))
    assert batches.claim("p", now=NOW + timedelta(seconds=4), lease_s=10) is None
    assert batches.claim("p", now=NOW + timedelta(seconds=5), lease_s=10) is not None


def test_a_database_that_is_not_there_is_not_made(tmp_path: Any) -> None:
    from pydantic import SecretStr

    from api.accounts.database import make_engine
    from config.settings import Database

    path = tmp_path / "none" / "a.db"
    engine = make_engine(Database(url=SecretStr(f"sqlite:///{path}")))
    with pytest.raises(SchemaError):
        BatchRecords(engine).claim("p", now=NOW, lease_s=1)
    assert not path.parent.exists()
    engine.dispose()
