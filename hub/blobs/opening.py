"""The S3 store that settings name, as far as it can be trusted."""

import logging
from datetime import timedelta

from pydantic import ValidationError

from hub.blobs.bucket import Bucket, make_client
from hub.blobs.probe import TOLD, USED, Probe, probe
from hub.blobs.s3 import S3BlobStore
from hub.db import now
from hub.errors import CannotStart, StoreFailed
from hub.settings import Settings

# A store is brought up to date, too.
KEEP_FOR = timedelta(days=7)

log = logging.getLogger(__name__)


def open_s3(settings: Settings, *, must_exist: bool, probed: str | None) -> tuple[S3BlobStore, str]:
    """The store, and what its probe found as JSON, which is `probed` while that is still about it.

    CannotStart, also where there must be a store and is none.
    """
    try:
        client = make_client(settings.s3_endpoint, settings.s3_region)
        public = settings.s3_public_endpoint
        presigner = make_client(public, settings.s3_region) if public is not None else None
        bucket = Bucket(client, settings.s3_bucket or "", settings.s3_prefix)
        if must_exist and not S3BlobStore.is_at(bucket):
            raise CannotStart(
                f"the blobs of this catalogue are not at {bucket}; nothing was changed"
            )
        found = _parse(probed)
        if found is None or not found.is_about(bucket, public) or now() - found.at > KEEP_FOR:
            found = probe(bucket, presigner, public)
            _tell(found)
        if found.missing is not None:
            raise CannotStart(found.missing)
        store = S3BlobStore(
            bucket,
            settings.data_dir / "store",
            cache_bytes=settings.s3_cache_bytes,
            min_free_bytes=settings.min_free_bytes,
            presigner=presigner if found.can_presign else None,
            can_copy=found.can_copy,
            can_redirect=found.can_redirect,
        )
    except StoreFailed as error:
        raise CannotStart(error.message) from error
    return store, found.model_dump_json()


def _parse(probed: str | None) -> Probe | None:
    try:
        return Probe.model_validate_json(probed) if probed is not None else None
    except ValidationError:  # written by another version
        return None


def _tell(found: Probe) -> None:
    for name, reason in found.failures.items():
        meaning = USED.get(name) or TOLD.get(name)
        log.warning("%s: not true that %s (%s)", found.where, meaning or name, reason)
