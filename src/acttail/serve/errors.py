"""Errors as OpenAI's API words them."""

import json
from typing import Any


class ApiError(Exception):
    """An error that becomes an HTTP response.

    Args:
        status: HTTP status.
        message: one line that names the thing and the remedy.
        kind: OpenAI's ``type``.
        param: the offending field, if there is one.
        code: OpenAI's ``code``, if there is one.
        retry_after: seconds after which to try again.
    """

    def __init__(
        self, status: int, message: str, kind: str = "invalid_request_error", *, param: str | None = None,
        code: str | None = None, retry_after: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.retry_after = param, code, retry_after

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {
            "error": {
                "message": self.message, "type": self.kind, "param": self.param, "code": self.code,
            }
        }  # fmt: skip

    def whole(self, *, closes: bool) -> tuple[bytes, dict[str, str]]:
        """Body and headers, where no application answers.

        Args:
            closes: whether the connection ends with it.
        """
        body = json.dumps(self.body()).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        return body, headers | self.headers() | ({"Connection": "close"} if closes else {})

    def headers(self) -> dict[str, str]:
        """Further headers of the response."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
