"""Errors in the form of the OpenAI API, and what becomes one."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from lmjax.errors import UserError
from lmjax.serving import schema
from lmjax.serving.requests import Busy

INVALID, SERVER = "invalid_request_error", "server_error"
MANY = 200  # faults of a body of which none is named
KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
# The names of all fields of bodies.
FIELDS = {name for model in vars(schema).values()
          if isinstance(model, type) and issubclass(model, schema.Body)
          for name in model.model_fields}


class ApiError(Exception):
    """What a client is told in place of an answer."""

    def __init__(self, status: int, message: str, *, param: str | None = None,
                 code: str | None = None, headers: Mapping[str, str] | None = None):
        """
        Args:
          status: of HTTP.
          message: one sentence for people.
          param: the field of the body that it is about.
          code: for programs, such as model_not_found.
          headers: of the response.
        """
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> dict[str, Any]:
        """What is sent."""
        kind = KINDS.get(self.status, INVALID if self.status < 500 else SERVER)
        return {"error": {"message": str(self), "type": kind, "param": self.param,
                          "code": self.code}}

    def response(self) -> Response:
        """The response that says so."""
        return JSONResponse(self.body(), self.status, headers=self.headers)


def of_validation(error: ValidationError) -> ApiError:
    """What is wrong with a body, by its deepest fault: the others are of other forms of a field."""
    if error.error_count() > MANY:  # listing them all would take longer than anything else here
        return ApiError(400, f"The body has {error.error_count():,} faults.", code="invalid_value")
    fault = max(error.errors(include_url=False, include_input=False),
                key=lambda found: len(found["loc"]))
    loc = fault["loc"]
    # Pydantic also names the members of unions, such as list[str].
    param = ".".join(str(part) for part in loc if isinstance(part, int) or part in FIELDS
                     or (part, fault["type"]) == (loc[-1], "extra_forbidden"))
    if fault["type"] == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {fault['ctx']['error']}.",
                        code="invalid_json")
    if fault["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument: {param}.", param=param,
                        code="unknown_parameter")
    return ApiError(400, f"{param or 'body'}: {fault['msg'].rstrip('.')}.", param=param or None,
                    code="missing_required_parameter" if fault["type"] == "missing"
                    else "invalid_value")


def of_exception(error: Exception) -> ApiError:
    """The error that a client is told of an exception."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        return ApiError(429, f"{str(error)[:1].upper()}{str(error)[1:]}.", code="queue_full",
                        headers={"Retry-After": str(error.retry_after_seconds)})
    if isinstance(error, UserError):
        return ApiError(400, str(error), param=error.where or None, code="invalid_value")
    if isinstance(error, ClientDisconnect):
        return ApiError(499, "The client has gone.", code="gone")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, f"{error.detail}.", headers=error.headers)
    return ApiError(500, "The server failed; its log says why.", code="fault")


async def respond(request: Request, error: Exception) -> Response:
    """The handler of exceptions of the application."""
    return of_exception(error).response()
