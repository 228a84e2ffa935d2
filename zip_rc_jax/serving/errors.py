"""Errors as clients read them: `{"error": {"message", "type", "param", "code"}}` and a status."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Response

from zip_rc_jax.config.checks import shown
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.settings import nearest
from zip_rc_jax.serving.schema import Body, StreamOptions, Strict, ZipFields

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
TOO_LONG = re.compile(r" tokens with max_tokens=\d+")


class ApiError(Exception):
    """A refusal of one request.

    Attributes:
      status: of HTTP.
      param: the field of the body that is wrong, e.g. "zip_rc.beta"; None where it is none.
      code: what programs may compare; None where there is none.
      retry_after: seconds after which the client may try again; None says nothing.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error")
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> Response:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return json_response(self.body(), self.status, headers)


def json_response(
    content: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """ASCII alone, so that half of a surrogate pair can be sent back in a message."""
    return Response(
        json.dumps(content, allow_nan=False),
        status,
        dict(headers or {}),
        media_type="application/json",
    )


def of_usage(error: UsageError, prompts: str, zip_fields: Sequence[str] = ()) -> ApiError:
    """A refusal by the decoder.

    Args:
      prompts: the field that holds what is read.
      zip_fields: names that the body has inside `zip_rc`.
    """
    value = error.value.removeprefix("prompt 0: ")
    found = re.match(r"([a-z_]+)=", value)
    name = found[1] if found else None
    if value.startswith(("chat ", "turn ", "messages ", "prompt ", "the prompt ")):
        name = prompts
    message = str(UsageError(value.replace("prompt 0", "the prompt", 1), error.reason, error.fix))
    if name is not None and name in zip_fields:
        name = f"zip_rc.{name}"
    code = "context_length_exceeded" if TOO_LONG.search(error.value) else None
    return ApiError(400, message, param=name, code=code)


def of_validation(problems: Sequence[Mapping[str, Any]], body: type[Body]) -> ApiError:
    """A body that is not what `schema` says; the first of its problems."""
    problem = problems[0]
    place = [str(part) for part in problem["loc"] if part != "body"]
    kind = problem["type"]
    if kind == "json_invalid" or not place:
        message = "the body: it is no JSON object. Fix: send one as application/json."
        return ApiError(400, message, code="invalid_json")
    inside: dict[str, type[Strict]] = {"zip_rc": ZipFields, "stream_options": StreamOptions}
    nested = place[0] in inside and len(place) > 1
    param = ".".join(place[:2]) if nested else place[0]
    if kind == "extra_forbidden":
        fields = inside[place[0]] if nested else body
        fix = nearest(place[-1], list(fields.model_fields), "the fields are")
        wrong = UsageError(f"field {shown(param)}", "nothing reads it", fix)
        return ApiError(400, str(wrong), param=param, code="unknown_field")
    if kind == "missing":
        wrong = UsageError(f"field {shown(param)}", "it is missing", "add it")
        return ApiError(400, str(wrong), param=param, code="missing_field")
    reason = str(problem["msg"]).removeprefix("Value error, ")
    wrong = UsageError(
        f"{param}={shown(problem.get('input'))}", reason[:1].lower() + reason[1:], "correct it"
    )
    return ApiError(400, str(wrong), param=param, code="invalid_value")
