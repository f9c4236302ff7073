"""The store on S3 and compatible services: ranged reads, retries and conditional writes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3
from botocore.config import Config as ClientConfig
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError
from pyarrow import fs

from pipelines.errors import UserError
from pipelines.storage.faults import Attempts, BadAnswerError, has_answered, note_answer
from pipelines.storage.store import Store, atomic_file, check_relative_path, disk_errors, ends_early, is_partial

T = TypeVar("T")
_CONNECT_TIMEOUT_S = 3
_READ_TIMEOUT_S = 20
_MIN_BYTES_PER_S = 16 << 10  # a slower answer is requested again
_CHUNK_BYTES = 256 << 10  # the rate is checked after each
_PART_BYTES = 8 << 20  # of a download
_NUM_PARTS_AT_ONCE = 10


class _ShortError(BadAnswerError):
    """Fewer bytes than announced: a broken connection."""


def open_s3(url: str, endpoint: str | None) -> S3Store:
    """Open `s3://bucket/folder`. Nothing is contacted."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if not bucket:
        raise UserError(url, "names no bucket", "write s3://bucket/folder")
    return S3Store(bucket, prefix.strip("/"), endpoint)


def _reopened(bucket: str, prefix: str, endpoint: str | None, answered: bool) -> S3Store:
    """Return a store that was pickled by a process to which the endpoint may have answered."""
    if answered:
        note_answer(endpoint)
    return S3Store(bucket, prefix, endpoint)


@dataclass(frozen=True, slots=True)
class S3Store(Store):
    """A folder in an S3 bucket, or in a compatible service at `endpoint`."""

    bucket: str
    prefix: str
    endpoint: str | None = None

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def _key(self, path: str) -> str:
        key = (PurePosixPath(self.prefix) / check_relative_path(path)).as_posix()
        return "" if key == "." else key

    def _call(self, path: str, operation: Callable[[Any], T]) -> T:
        """Run an operation, again on transient faults. A lasting fault becomes `FileNotFoundError` or `UserError`."""
        attempts = Attempts(self.endpoint)
        while True:
            try:
                result = operation(_client(self.endpoint, os.getpid()))
            except (ClientError, BotoCoreError, BadAnswerError) as error:
                if not attempts.wait(error):
                    raise _explained(f"{self.url}/{path}", self.endpoint, error) from error
            else:
                attempts.succeed()
                return result

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.bucket, self.prefix, self.endpoint, has_answered(self.endpoint))

    def child(self, path: str) -> S3Store:
        return replace(self, prefix=self._key(path))

    def read(self, path: str) -> bytes:
        return self._call(path, lambda client: _body(client.get_object(Bucket=self.bucket, Key=self._key(path))))

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        return self._range(path, offset, length)

    def read_range_if(self, path: str, offset: int, length: int, tag: str) -> bytes | None:
        try:
            return self._range(path, offset, length, IfMatch=tag)
        except UserError as error:
            if _is_precondition(error.__cause__):
                return None
            raise

    def _range(self, path: str, offset: int, length: int, **conditions: str) -> bytes:
        def get(client: Any) -> bytes:
            span = f"bytes={offset}-{offset + length - 1}"
            answer = client.get_object(Bucket=self.bucket, Key=self._key(path), Range=span, **conditions)
            num_bytes = int(answer["ContentRange"].rpartition("/")[2])
            if num_bytes < offset + length:
                problem = f"the object has {num_bytes} bytes, {length} from offset {offset} were requested"
                raise ends_early(f"{self.url}/{path}", problem)
            return _body(answer, length)

        return self._call(path, get) if length else b""

    def write(self, path: str, data: bytes) -> None:
        self._call(path, lambda client: client.put_object(Bucket=self.bucket, Key=self._key(path), Body=data))

    def read_tagged(self, path: str) -> tuple[bytes, str]:
        def get(client: Any) -> tuple[bytes, str]:
            answer = client.get_object(Bucket=self.bucket, Key=self._key(path))
            return _body(answer), answer["ETag"]

        return self._call(path, get)

    def write_if(self, path: str, data: bytes, tag: str | None) -> bool:
        condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}

        def put(client: Any) -> bool:
            try:
                client.put_object(Bucket=self.bucket, Key=self._key(path), Body=data, **condition)
            except ClientError as error:
                code = error.response["Error"]["Code"]
                if code == "NoSuchKey" and tag is not None:
                    return False
                if code in ("PreconditionFailed", "ConditionalRequestConflict", "412"):
                    # An earlier attempt may have written it, and its answer was lost.
                    return self.read(path) == data
                raise
            return True

        return self._call(path, put)

    def upload(self, local_file: Path, path: str) -> None:
        def put(client: Any) -> None:
            with local_file.open("rb") as file:
                client.upload_fileobj(file, self.bucket, self._key(path))

        self._call(path, put)

    def download(self, path: str, local_file: Path) -> None:
        head = self._head(path)
        num_bytes, tag = head["ContentLength"], head["ETag"]

        def copy_part(temporary: Path, offset: int) -> None:
            """Copy one part, so that a fault costs this part only. The tag ensures that all are of one object."""
            data = self._range(path, offset, min(_PART_BYTES, num_bytes - offset), IfMatch=tag)
            with temporary.open("r+b") as file:
                file.seek(offset)
                file.write(data)

        with disk_errors(local_file), atomic_file(local_file) as temporary:
            temporary.touch()
            with ThreadPoolExecutor(_NUM_PARTS_AT_ONCE) as pool:
                list(pool.map(partial(copy_part, temporary), range(0, num_bytes, _PART_BYTES)))

    def tags(self, prefix: str = "") -> dict[str, str]:
        folder = f"{self._key(prefix)}/".lstrip("/")
        root = f"{self.prefix}/".lstrip("/")

        def scan(client: Any) -> dict[str, str]:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=folder)
            found = (entry for page in pages for entry in _entries(page))
            relative = ((entry["Key"].removeprefix(root), entry["ETag"]) for entry in found)
            skipped = len(folder) - len(root)  # a folder of unfinished writes may be listed itself
            return dict(sorted((path, tag) for path, tag in relative if not is_partial(PurePosixPath(path[skipped:]))))

        return self._call(prefix, scan)

    def tag(self, path: str) -> str:
        return str(self._head(path)["ETag"])

    def size(self, path: str) -> int:
        return int(self._head(path)["ContentLength"])

    def _head(self, path: str) -> dict[str, Any]:
        return self._call(path, lambda client: client.head_object(Bucket=self.bucket, Key=self._key(path)))

    def walk(self, prefix: str = "") -> Iterator[str]:
        folder, root = (f"{key}/".lstrip("/") for key in (self._key(prefix), self.prefix))
        token: dict[str, str] = {}
        while True:
            page = self._call(prefix, partial(_list_page, Bucket=self.bucket, Prefix=folder, **token))
            yield from (entry["Key"].removeprefix(root) for entry in _entries(page))
            if not page["IsTruncated"]:
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def copy(self, source: str, target: str) -> None:
        place = {"Bucket": self.bucket, "Key": self._key(source)}
        self._call(target, lambda client: client.copy(place, self.bucket, self._key(target)))

    def exists(self, path: str) -> bool:
        key = self._key(path)

        def look(client: Any) -> bool:  # HEAD gives a missing object and a missing bucket the same status
            answer = client.list_objects_v2(Bucket=self.bucket, Prefix=key, MaxKeys=1)
            return any(entry["Key"] == key for entry in _entries(answer))

        return self._call(path, look)

    def delete(self, path: str) -> None:
        self._call(path, lambda client: client.delete_object(Bucket=self.bucket, Key=self._key(path)))

    def delete_tree(self, prefix: str) -> None:
        paths = self.list(prefix)
        for start in range(0, len(paths), 1000):  # the most that one request takes
            keys = [{"Key": self._key(path)} for path in paths[start : start + 1000]]
            self._call(prefix, partial(self._delete_keys, keys))

    def _delete_keys(self, keys: Sequence[dict[str, str]], client: Any) -> None:
        answer = client.delete_objects(Bucket=self.bucket, Delete={"Objects": keys, "Quiet": True})
        for failed in answer.get("Errors", ()):
            problem = f"not deleted ({failed['Code']})"
            raise UserError(f"s3://{self.bucket}/{failed['Key']}", problem, "check the policy of the bucket")

    def ensure_bucket(self) -> None:
        def create(client: Any) -> None:
            try:
                client.head_bucket(Bucket=self.bucket)
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
                    raise
                region = client.meta.region_name
                place = {} if region in (None, "us-east-1", "aws-global") else {"LocationConstraint": region}
                client.create_bucket(Bucket=self.bucket, **({"CreateBucketConfiguration": place} if place else {}))

        self._call("", create)

    def arrow_filesystem(self) -> tuple[fs.FileSystem, str]:
        where: dict[str, str] = {}
        if self.endpoint:
            parts = urlsplit(self.endpoint)
            where = {"endpoint_override": parts.netloc, "scheme": parts.scheme}
        system = fs.S3FileSystem(connect_timeout=_CONNECT_TIMEOUT_S, request_timeout=_READ_TIMEOUT_S, **where)
        return system, f"{self.bucket}/{self.prefix}".rstrip("/")


def _is_precondition(error: BaseException | None) -> bool:
    """Return whether a store has refused a request because the object has another tag."""
    return isinstance(error, ClientError) and error.response["ResponseMetadata"]["HTTPStatusCode"] == 412


@dataclass(frozen=True, slots=True)
class S3Bucket(S3Store):
    """A whole bucket, in which a path is a key as it is: with `..`, `//` or anything else that a key may hold."""

    def _key(self, path: str) -> str:
        return path


def _body(answer: dict[str, Any], length: int | None = None) -> bytes:
    wanted = answer["ContentLength"] if length is None else length
    last_s = time.monotonic() + _READ_TIMEOUT_S + wanted / _MIN_BYTES_PER_S
    chunks = []
    while chunk := answer["Body"].read(_CHUNK_BYTES):
        chunks.append(chunk)
        if time.monotonic() > last_s:  # the client's own limit is for silence only
            answer["Body"].close()
            raise BadAnswerError(f"less than {_MIN_BYTES_PER_S} bytes per second")
    data = b"".join(chunks)
    if len(data) != wanted:
        raise _ShortError(f"{len(data)} of {wanted} bytes")
    return data


def _list_page(client: Any, **request: str) -> dict[str, Any]:
    page: dict[str, Any] = client.list_objects_v2(**request)
    _entries(page)
    return page


def _entries(page: dict[str, Any]) -> Sequence[dict[str, Any]]:
    """Return the entries of a listing. A listing that lost its content looks empty to the client."""
    if "IsTruncated" not in page:
        raise BadAnswerError("a listing without content")
    entries: Sequence[dict[str, Any]] = page.get("Contents", ())
    return entries


@cache
def _client(endpoint: str | None, _process: int) -> Any:
    """Return the S3 client of this process. A client must not be used by both processes of a fork."""
    config = ClientConfig(
        connect_timeout=_CONNECT_TIMEOUT_S,
        read_timeout=_READ_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": 2},
        max_pool_connections=32,
        s3={"addressing_style": "path"} if endpoint else None,
    )
    try:
        return boto3.session.Session().client("s3", endpoint_url=endpoint, config=config)
    except ValueError as error:
        raise UserError(endpoint or "AWS", str(error), "write the endpoint as http://host:port") from error


def _explained(place: str, endpoint: str | None, error: Exception) -> Exception:
    """Return the fault as an error that names place, problem and fix."""
    place = place.rstrip("/")
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        fix = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or give the machine a role"
        return UserError(place, "no credentials for the object store", fix)
    if isinstance(error, _ShortError):
        return ends_early(place, str(error))
    if not isinstance(error, ClientError):
        problem = f"no proper answer from {endpoint or 'AWS'} ({error})"
        return UserError(place, problem, "check the URL, the endpoint and the network")
    code, message = error.response["Error"]["Code"], error.response["Error"].get("Message", "")
    if code in ("404", "NoSuchKey"):
        return FileNotFoundError(place)
    if code == "NoSuchBucket":
        return UserError(place, "there is no such bucket", "create it, or correct the URL")
    if code == "InvalidRange":
        return ends_early(place, "the requested range is behind the end")
    if error.response["ResponseMetadata"]["HTTPStatusCode"] in (401, 403):
        return UserError(place, f"access refused ({code})", "check the credentials and the policy of the bucket")
    return UserError(place, f"the object store answered {code}: {message}", "try again later, or check its status")
