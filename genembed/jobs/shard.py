"""One shard: read, embed, write, and only then say that it is done."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence

import numpy as np

from genembed.errors import missing_extra
from genembed.jobs.encoder import Encoded, Encoder, encode_rows
from genembed.jobs.folder import JobFolder, Receipt
from genembed.jobs.plan import Plan, Shard
from genembed.jobs.rows import Reject, read_shard
from genembed.jobs.storage import commit, commit_json, sweep


def embed_shard(
    folder: JobFolder,
    plan: Plan,
    shard: Shard,
    encoder: Encoder,
    *,
    advance: Callable[[Encoded, int], None],
    check_rejects: Callable[[Sequence[Reject]], None],
) -> Receipt:
    """Embed the rows of a shard and put its files in place: vectors, rejects, and last the receipt.

    The caller holds the shard's lock. The files depend on the rows and the encoder alone.

    Args:
        folder: Of the job.
        plan: Of the job.
        shard: Which rows.
        encoder: Embeds them.
        advance: Told of every some thousand rows.
        check_rejects: Called with the rejected rows before anything is written; raises if they are too many.

    Raises:
        JobError: If the input has changed, or the disk refuses.
    """
    for path in (folder.shard_file(shard.index), folder.rejects_file(shard.index), folder.receipt_file(shard.index)):
        sweep(path)
    rows, unreadable = read_shard(plan, shard)
    encoded, positions, failed = encode_rows(encoder, rows, advance=advance)
    rejects = sorted([*unreadable, *failed])
    check_rejects(rejects)
    if encoded is None:
        encoded = encoder([])
    content = _parquet([rows[position].id for position in positions], encoded)
    commit(folder.shard_file(shard.index), content)
    rejected = _lines(rejects) if rejects else None
    if rejected is not None:
        commit(folder.rejects_file(shard.index), rejected)
    receipt = Receipt(
        shard=shard.index,
        rows=len(positions),
        rejects=len(rejects),
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        rejects_sha256=None if rejected is None else hashlib.sha256(rejected).hexdigest(),
        steps=int(encoded.steps.sum()),
        tokens=int(encoded.tokens.sum()),
        truncated=int(encoded.truncated.sum()),
    )
    commit_json(folder.receipt_file(shard.index), vars(receipt))
    return receipt


def _parquet(ids: Sequence[str], encoded: Encoded) -> memoryview:
    """Return the bytes of a Parquet file with the columns id, vector, steps, truncated: plain types, the vector a list of fixed size."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise missing_extra("jobs", "pyarrow") from error
    vectors = np.ascontiguousarray(encoded.vectors)
    columns = {
        "id": pyarrow.array(ids, type=pyarrow.string()),
        "vector": pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.reshape(-1)), vectors.shape[1]),
        "steps": pyarrow.array(encoded.steps, type=pyarrow.int32()),
        "truncated": pyarrow.array(encoded.truncated, type=pyarrow.bool_()),
    }
    sink = pyarrow.BufferOutputStream()
    # Numbers of unit vectors do not shrink; a checksum on every page lets any reader find a flipped bit.
    compression = {"id": "ZSTD", "vector": "NONE", "steps": "ZSTD", "truncated": "ZSTD"}
    parquet.write_table(pyarrow.table(columns), sink, compression=compression, use_dictionary=False, write_page_checksum=True)
    return memoryview(sink.getvalue())


def _lines(rejects: Sequence[Reject]) -> bytes:
    lines = io.BytesIO()
    for reject in rejects:
        lines.write(json.dumps(reject._asdict(), ensure_ascii=False).encode() + b"\n")
    return lines.getvalue()
