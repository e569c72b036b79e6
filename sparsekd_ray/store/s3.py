"""The S3 client, and messages for its errors.

A message is made from the type and code of an error, never from the server's own text, because that may quote a key.
"""

import os
import re
from typing import Any

NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "SSOTokenLoadError",
    "UnauthorizedSSOTokenError",
}
# The names botocore, Python and aiohttp give to a connection that fails.
UNREACHABLE = {"ConnectionError", "HTTPClientError", "TimeoutError", "ClientError"}
PROXIES = ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY")
UNTRUSTED = {"SSLError", "ClientConnectorCertificateError"}

EXPIRED = (
    "refused the credentials: the session token has expired",
    "Renew the credentials (for example with `aws sso login`, or a new AWS_SESSION_TOKEN), then resubmit.",
)
WRONG_CLOCK = (
    "refused the request: this machine's clock and the server's differ by too much",
    "Set the clock of this machine (`timedatectl set-ntp true`), then resubmit.",
)
WRONG_KEY = (
    "refused the credentials: it does not know the access key, or the secret key does not belong to it",
    "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.",
)
WRONG_REGION = (
    "refused the request: the bucket lies in another region",
    "Set AWS_REGION to the region of the bucket.",
)
CODES = {
    "ExpiredToken": EXPIRED,
    "ExpiredTokenException": EXPIRED,
    "TokenRefreshRequired": EXPIRED,
    "RequestExpired": WRONG_CLOCK,
    "RequestTimeTooSkewed": WRONG_CLOCK,
    "InvalidAccessKeyId": WRONG_KEY,
    "SignatureDoesNotMatch": WRONG_KEY,
    "InvalidToken": WRONG_KEY,
    "AuthorizationHeaderMalformed": WRONG_REGION,
    "PermanentRedirect": WRONG_REGION,
    "IllegalLocationConstraintException": WRONG_REGION,
}
"""Error code of the server → what it means, and what to do about it."""


def client(hasty: bool = False) -> Any:
    """An s3fs file system with credentials and endpoint from the usual AWS places. With ``hasty``, it gives up on a
    silent endpoint after about ten seconds instead of minutes."""
    import aiobotocore.session  # takes half a second, which --help does not need
    import botocore.handlers
    import s3fs

    session = aiobotocore.session.AioSession()
    # With this header, a PUT to a silent endpoint waits for "100 Continue" without any timeout.
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
    """Types of the errors that a request may raise. botocore raises ValueError for an endpoint that is no URL."""
    import aiohttp
    from botocore import exceptions

    return (OSError, ValueError, exceptions.BotoCoreError, exceptions.ClientError, aiohttp.ClientError)


def code(error: BaseException) -> str | None:
    """The server's error code, such as NoSuchBucket or 403; None if no server answered."""
    for candidate in (error, error.__cause__):
        if isinstance(response := getattr(candidate, "response", None), dict):
            return str(response.get("Error", {}).get("Code", "no code"))
    return None


def explain(error: Exception) -> tuple[str, str]:
    """(what a failed request found, what to do about it), in words."""
    answer, kinds = code(error), {kind.__name__ for kind in type(error).__mro__}
    reason, endpoint = answer or type(error).__name__, _endpoint()
    if reason in CODES:
        answered, advice = CODES[reason]
        return f"{endpoint} {answered} ({reason})", advice
    if kinds & NO_CREDENTIALS:
        advice = (
            "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give this machine a role."
        )
        return f"no usable AWS credentials ({reason})", advice
    if isinstance(error, PermissionError):
        advice = "Use credentials that may list, read, write and delete under this root."
        return f"{endpoint} refused the credentials ({reason})", advice
    if isinstance(error, FileNotFoundError):
        advice = "Create the bucket, or correct the store's root or AWS_ENDPOINT_URL."
        return f"{endpoint} has no such bucket ({reason})", advice
    if reason == "InternalError" or reason.startswith("5"):
        return (
            f"{endpoint} failed ({reason}), as a server does whose disk is full",
            "Mend the server, then resubmit.",
        )
    if answer is None and (kinds & UNTRUSTED or kinds & UNREACHABLE):
        return _unreachable(endpoint, reason, untrusted=bool(kinds & UNTRUSTED))
    if "ValueError" in kinds:
        advice = "Give AWS_ENDPOINT_URL as http://host:port or https://host."
        return f"{endpoint} is not the URL of a server", advice
    return f"{endpoint} refused the request ({reason})", "Check the store's root and AWS_ENDPOINT_URL."


def _endpoint() -> str:
    """The server that requests go to, without the password that its URL may hold."""
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "the AWS endpoint"
    return re.sub(r"//[^/]*@", "//", url)


def _unreachable(endpoint: str, reason: str, untrusted: bool) -> tuple[str, str]:
    if untrusted:
        advice = "Set AWS_CA_BUNDLE to the certificate of its authority, or correct AWS_ENDPOINT_URL (http or https)."
        return f"the certificate of {endpoint} is not trusted ({reason})", advice
    advice = "Check AWS_ENDPOINT_URL and the network, then resubmit."
    if proxy := next((name for name in PROXIES if os.environ.get(name)), None):
        advice += (
            f" Requests go through {proxy}: name the server in no_proxy if the proxy does not lead to it."
        )
    return f"{endpoint} does not answer, or broke off ({reason})", advice
