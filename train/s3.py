"""The S3 client of every command, and what a store's refusal means.

Credentials, region and endpoint come from the environment (AWS_ACCESS_KEY_ID,
AWS_ENDPOINT_URL_S3 …), as boto3 reads them.
"""

import os
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

CONNECTIONS = 32
ERRORS = (ClientError, BotoCoreError)


def s3_client() -> Any:
    """A client that stores other than AWS understand too; BotoCoreError or ValueError without one."""
    has_own_endpoint = any(os.environ.get(n) for n in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"))
    config = Config(
        # Other stores than AWS get the newer default checksums wrong.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        connect_timeout=10,
        read_timeout=60,
        retries={"mode": "standard", "max_attempts": 3},
        max_pool_connections=CONNECTIONS,
        s3={"addressing_style": "path" if has_own_endpoint else "auto"},
    )
    return boto3.Session().client("s3", config=config)


def code_of(error: Exception) -> str:
    """The store's name of an error, "" where it never came to an answer."""
    if isinstance(error, ClientError):
        return str(error.response.get("Error", {}).get("Code", "an unknown error"))
    return ""


def reason(error: Exception) -> str:
    """Why a store or the way to it failed, as a part of a sentence."""
    if isinstance(error, NoCredentialsError):
        return "no S3 credentials (AWS_ACCESS_KEY_ID …)"
    code = code_of(error)
    if code:
        return _CODES.get(code, f"the store answers {code}")
    return " ".join(str(error).split())


_CODES = {
    "NoSuchKey": "there is no such object",
    "NoSuchBucket": "there is no such bucket",
    "AccessDenied": "the store does not let these credentials do this",
    "InvalidAccessKeyId": "the store does not know this access key",
    "SignatureDoesNotMatch": "the store does not accept this secret key",
}
