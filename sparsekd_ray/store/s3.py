"""The S3 client, and how it fails, in words.

Those words are made from the types and codes of errors, never from the server's own text, which may quote
a key.
"""

import os
import re
from typing import Any

NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "CredentialRetrievalError",
}
UNREACHABLE = {
    "ConnectionError",
    "HTTPClientError",
    "TimeoutError",
    "ClientError",
}  # botocore, builtin, aiohttp


def client(hasty: bool = False) -> Any:
    """An s3fs file system whose credentials and endpoint come from the usual AWS places. ``hasty`` gives
    up on a silent endpoint within about ten seconds instead of minutes."""
    import aiobotocore.session  # half a second that --help need not pay for
    import botocore.handlers
    import s3fs

    session = aiobotocore.session.AioSession()
    # With this header a PUT to an endpoint gone silent waits for its "100 Continue" under no timeout at all.
    session.unregister("before-call.s3", botocore.handlers.add_expect_header)
    connect, read, attempts = (3, 3, 2) if hasty else (10, 60, 4)
    retries = {"total_max_attempts": attempts, "mode": "standard"}
    files = s3fs.S3FileSystem(
        session=session,
        use_listings_cache=False,  # other machines write to the same bucket
        skip_instance_cache=True,
        config_kwargs={"connect_timeout": connect, "read_timeout": read, "retries": retries},
    )
    files.retries = 1 if hasty else 3  # s3fs repeats timeouts on top of botocore's attempts
    return files


def failures() -> tuple[type[Exception], ...]:
    """Everything that a request may raise."""
    import aiohttp
    import botocore.exceptions

    return (OSError, botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError, aiohttp.ClientError)


def code(error: BaseException) -> str | None:
    """The server's error code, such as NoSuchBucket or 403; None if no server answered."""
    for candidate in (error, error.__cause__):
        if isinstance(response := getattr(candidate, "response", None), dict):
            return str(response.get("Error", {}).get("Code", "no code"))
    return None


def words(error: Exception) -> tuple[str, str]:
    """What a failed request found, and what to do about it."""
    answer, kinds = code(error), {kind.__name__ for kind in type(error).__mro__}
    reason = answer or type(error).__name__
    endpoint = (
        os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "the AWS endpoint"
    )
    endpoint = re.sub(r"//[^/]*@", "//", endpoint)
    if kinds & NO_CREDENTIALS:
        todo = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give this machine a role."
        return f"no usable AWS credentials ({reason})", todo
    if isinstance(error, PermissionError):
        todo = "Use credentials that may list, read, write and delete under this root."
        return f"{endpoint} refused the credentials ({reason})", todo
    if isinstance(error, FileNotFoundError):
        todo = "Create the bucket, or correct the store's root or AWS_ENDPOINT_URL."
        return f"{endpoint} has no such bucket ({reason})", todo
    if reason == "InternalError" or reason.startswith("5"):
        return f"{endpoint} failed ({reason}), as a server does whose disk is full", "Mend it, then resubmit."
    if kinds & UNREACHABLE and not answer:
        todo = "Check AWS_ENDPOINT_URL and the network, then resubmit."
        return f"{endpoint} does not answer, or broke off ({reason})", todo
    return f"{endpoint} refused the request ({reason})", "Check the store's root and AWS_ENDPOINT_URL."
