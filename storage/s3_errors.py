"""Typed errors for what an S3 client raises, by the service's codes and the client's class names."""

from __future__ import annotations

from dataclasses import dataclass

from storage.errors import (
    KeyMissing,
    OutcomeUnknown,
    RangeMissing,
    StoreDenied,
    StoreError,
    StoreFailed,
    StoreFull,
    StoreUnavailable,
)

_MISSING = frozenset({"NoSuchKey", "NotFound", "404"})
_CONFLICT = frozenset({"PreconditionFailed", "412"})
_DENIED = frozenset(
    {
        "AccessDenied",
        "AccountProblem",
        "AllAccessDisabled",
        "ExpiredToken",
        "Forbidden",
        "InvalidAccessKeyId",
        "InvalidSecurity",
        "InvalidToken",
        "NotSignedUp",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
        "401",
        "403",
    }
)
_FULL = frozenset({"InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"})
_NOT_DONE = frozenset(
    {
        # the service says that it did nothing: busy, or the body did not arrive whole
        "BadDigest",
        "ConditionalRequestConflict",
        "IncompleteBody",
        "OperationAborted",
        "RequestLimitExceeded",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "XAmzContentChecksumMismatch",
        "XAmzContentSHA256Mismatch",
        "409",
        "429",
    }
)
_NEVER_SENT = frozenset({"ConnectTimeoutError", "EndpointConnectionError", "ProxyConnectionError", "SSLError"})
_NO_CREDENTIALS = frozenset(
    {
        "CredentialRetrievalError",
        "LoginError",
        "NoAuthTokenError",
        "NoCredentialsError",
        "PartialCredentialsError",
        "ProfileNotFound",
        "SSOError",
        "TokenRetrievalError",
    }
)
_CONNECTION = frozenset(
    {
        "ChecksumError",
        "ClientError",  # aiohttp's; botocore's has a response and is told apart before
        "ConnectionError",
        "FSTimeoutError",
        "HTTPClientError",
        "HTTPException",
        "IncompleteReadError",
        "MetadataRetrievalError",
        "ResponseParserError",
        "TimeoutError",
    }
)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the service answered: its code and HTTP status; empty and 0 if there was no answer."""

    code: str
    status: int


def answer(error: BaseException) -> Answer:
    """The service's answer inside an error of s3fs, whose cause is botocore's."""
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)
        if isinstance(response, dict) and "Error" in response:
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return Answer(code=str(response["Error"].get("Code", "")), status=int(status))
        seen = seen.__cause__
    return Answer(code="", status=0)


def is_conflict(error: BaseException) -> bool:
    """Whether a conditional put was refused because the key exists."""
    said = answer(error)
    return said.code in _CONFLICT or said.status == 412 or isinstance(error, FileExistsError)


def typed(error: BaseException, where: str, *, writing: bool) -> StoreError:
    """The store's error. Holds codes and class names only: texts of foreign errors may hold addresses and keys."""
    said = answer(error)
    if said.code or said.status:
        return _of_answer(said, where, writing=writing)
    names = {kind.__name__ for kind in type(error).__mro__}
    name = type(error).__name__
    if names & _NO_CREDENTIALS or isinstance(error, PermissionError):
        return StoreDenied(f"there are no usable credentials ({name})", where=where, next=_CREDENTIALS)
    if names & _NEVER_SENT:
        return StoreUnavailable(
            f"the object store cannot be reached ({name})", where=where, next="check the endpoint and the network"
        )
    if isinstance(error, FileNotFoundError):
        return KeyMissing("there is no such object", where=where, next="check the key")
    if names & _CONNECTION:
        return _no_reply(name, where, writing=writing)
    return StoreFailed(f"the object store's client failed ({name})", where=where, next="check URL and storage_options")


_CREDENTIALS = (
    "check keys, profile or role, and the clock; without the right to list the bucket S3 also says this "
    "of a key that is missing"
)


def _of_answer(said: Answer, where: str, *, writing: bool) -> StoreError:
    shown = f"{said.code or 'no code'}, HTTP {said.status}"
    if said.code == "NoSuchBucket":
        return StoreFailed(f"there is no such bucket ({shown})", where=where, next="create it or correct the URL")
    if said.code in _CONFLICT or said.status == 412:
        return StoreUnavailable(f"the object was replaced meanwhile ({shown})", where=where, next="try again")
    if said.code in _MISSING or said.status == 404:
        return KeyMissing("there is no such object", where=where, next="check the key")
    if said.code == "InvalidRange" or said.status == 416:
        return RangeMissing(f"the object ends before this range ({shown})", where=where)
    if said.code in _FULL or said.status == 507:
        return StoreFull(f"no space or quota left ({shown})", where=where, next="free space or raise the quota")
    if said.code in _NOT_DONE or said.status in (409, 429):
        return StoreUnavailable(f"the object store asks to try again ({shown})", where=where, next="try again")
    if said.status >= 500 or said.code in ("InternalError", "RequestTimeout", "ServiceUnavailable"):
        return _no_reply(shown, where, writing=writing)
    if said.code in _DENIED or said.status in (401, 403):
        return StoreDenied(f"the object store refused ({shown})", where=where, next=_CREDENTIALS)
    return StoreFailed(
        f"the object store refused the request ({shown})", where=where, next="check region, endpoint and bucket"
    )


def _no_reply(shown: str, where: str, *, writing: bool) -> StoreUnavailable:
    if writing:
        return OutcomeUnknown(
            f"no usable reply to a write ({shown})", where=where, next="repeat it with the same bytes"
        )
    return StoreUnavailable(f"no usable reply ({shown})", where=where, next="try again")
