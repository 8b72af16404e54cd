"""The end of a job: one file that says what there is; and the check that it is still there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from genembed.errors import CheckpointError, JobError
from genembed.jobs.claim import claimed
from genembed.jobs.folder import FORMAT_VERSION, Description, JobFolder, Receipt
from genembed.jobs.plan import Plan
from genembed.jobs.storage import commit, commit_json, file_hash, read_object


def finish(folder: JobFolder) -> dict[str, Any]:
    """Write the list of rejected rows and the manifest once every shard is there, and return the manifest. May be called again.

    Raises:
        JobError: If a shard is missing, or has another size than its receipt says.
    """
    if not folder.manifest.exists():
        _complete(folder)
    shutil.rmtree(folder.locks, ignore_errors=True)  # nobody looks for a lock where a manifest is
    shutil.rmtree(folder.workers, ignore_errors=True)
    return read_object(folder.manifest)


def _complete(folder: JobFolder) -> None:
    with claimed(folder.lock_file("finish"), wait=True):
        if folder.manifest.exists():
            return
        description, plan = folder.read_description(), folder.read_plan()
        receipts = [_receipt(folder, plan, index) for index in range(len(plan.shards))]
        commit(folder.rejects, b"".join(folder.rejects_file(one.shard).read_bytes() for one in receipts if one.rejects))
        if description.output == "lance":
            from genembed.jobs.lance import write_lance

            write_lance(folder, [folder.shard_file(one.shard) for one in receipts])
        commit_json(folder.manifest, _manifest(description, plan, receipts))


def _receipt(folder: JobFolder, plan: Plan, index: int) -> Receipt:
    """Return the receipt of a shard whose file fits it."""
    if not folder.receipt_file(index).exists():
        raise JobError(f"shard {index} of {len(plan.shards)} is not done; go on with the same command.")
    receipt = folder.read_receipt(index)
    file = folder.shard_file(index)
    size = file.stat().st_size if file.exists() else None
    if size != receipt.bytes or receipt.rows + receipt.rejects != plan.shards[index].rows:
        found = "is not there" if size is None else f"has {size:,} bytes, and its receipt says {receipt.bytes:,}"
        raise JobError(f"{file}: {found}; delete {folder.receipt_file(index)}, and the same command makes the shard again.")
    return receipt


def _manifest(description: Description, plan: Plan, receipts: Sequence[Receipt]) -> dict[str, Any]:
    rows = sum(receipt.rows for receipt in receipts)
    identity = dict(description.identity)
    return {
        "format_version": FORMAT_VERSION,
        **description.origin,
        "identity": identity,
        "identity_sha256": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        "input": [{"url": file.url, "bytes": file.size, "sha256": digest} for file, digest in zip(plan.files, plan.hashes, strict=True)],
        "columns": {"id": plan.columns.id, "text": plan.columns.text},
        "output": description.output,
        "rows": rows,
        "rejects": sum(receipt.rejects for receipt in receipts),
        "truncated": sum(receipt.truncated for receipt in receipts),
        "tokens": sum(receipt.tokens for receipt in receipts),
        "mean_steps": sum(receipt.steps for receipt in receipts) / rows if rows else 0.0,
        "shard_rows": plan.shard_rows,
        "shards": [
            {
                "file": f"shards/{receipt.shard:06d}.parquet",
                "rows": receipt.rows,
                "rejects": receipt.rejects,
                "bytes": receipt.bytes,
                "sha256": receipt.sha256,
                "input_sha256": shard.sha256,
            }
            for shard, receipt in zip(plan.shards, receipts, strict=True)
        ],
    }


def damage(folder: JobFolder, *, show_progress_bar: bool = False) -> Iterator[str]:
    """Yield what is wrong with the files of a job, finished or not: those that are missing, and those whose bytes have changed.

    Every shard is read.

    Raises:
        ConfigurationError: If there is no job.
    """
    folder.read_description()
    plan = folder.read_plan()
    complete = folder.manifest.exists()
    for shard in tqdm(plan.shards, desc="verifying", unit="shard", delay=1, leave=False, disable=not show_progress_bar):
        if not folder.receipt_file(shard.index).exists():
            if complete:
                yield f"{folder.receipt_file(shard.index)}: is missing"
            continue
        try:
            receipt = folder.read_receipt(shard.index)
        except CheckpointError as error:
            yield str(error)
            continue
        yield from _damaged(folder, receipt)
    if complete:
        yield from _manifest_damage(folder, plan)


def _damaged(folder: JobFolder, receipt: Receipt) -> Iterator[str]:
    for path, digest in (
        (folder.shard_file(receipt.shard), receipt.sha256),
        (folder.rejects_file(receipt.shard), receipt.rejects_sha256),
    ):
        if digest is None:
            continue
        if not path.exists():
            yield f"{path}: is missing"
        elif file_hash(path) != digest:
            yield f"{path}: its bytes are not those that were written"


def _manifest_damage(folder: JobFolder, plan: Plan) -> Iterator[str]:
    try:
        receipts = [folder.read_receipt(shard.index) for shard in plan.shards]
        if read_object(folder.manifest) != _manifest(folder.read_description(), plan, receipts):
            yield f"{folder.manifest}: does not say what the receipts say"
    except CheckpointError as error:
        yield str(error)
