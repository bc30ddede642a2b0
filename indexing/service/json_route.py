"""Routes that parse and write JSON with pydantic directly.

FastAPI's own handling of a request (dependencies, the body as Python objects, validation of the
answer) takes about as long as a search among a million vectors. Answers and the OpenAPI document
are the same, but a body with too much JSON is refused before it is parsed.
"""

import inspect
import re
from email.message import Message
from functools import cached_property

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from pydantic_core import to_json

from indexing.service.middleware import JSON_BYTES, Receive, Scope, Send

EMBEDDING_BYTES = 256 << 10
"""Maximum bytes of an embedding that do not count as other JSON: 8192 numbers of 32 characters."""
MAX_FAULTS = 1000
"""A body with more faults is refused without listing any of them."""
IMAGE = re.compile(rb'"image"\s*:\s*"(?:[^"\\]++|\\.)*+"', re.DOTALL)
EMBEDDING = re.compile(rb'"embedding(?:_input)?"\s*:\s*\[[0-9eE+\-.,\s]*+\]')


class QuickRoute(APIRoute):
    """A route that skips FastAPI's own handling if its coroutine takes only the model of the body,
    and perhaps the request.
    """

    @cached_property
    def body_parameter(self) -> tuple[str, type[BaseModel]] | None:
        """Name and model of the body, if the route can skip FastAPI's own handling."""
        parameters = inspect.signature(self.endpoint).parameters.values()
        models = [
            (parameter.name, parameter.annotation)
            for parameter in parameters
            if parameter.annotation is not Request
        ]
        if len(models) != 1 or not inspect.isclass(models[0][1]):
            return None
        return models[0] if issubclass(models[0][1], BaseModel) else None

    @cached_property
    def request_parameters(self) -> list[str]:
        """Names of the parameters that take the request."""
        parameters = inspect.signature(self.endpoint).parameters.values()
        return [parameter.name for parameter in parameters if parameter.annotation is Request]

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. Raises RequestValidationError for a wrong body, as any route does."""
        if self.body_parameter is None or scope["method"] not in (self.methods or ()):
            await super().handle(scope, receive, send)
            return
        name, model = self.body_parameter
        request = Request(scope, receive)
        body = await request.body()
        if not is_json(request.headers.get("content-type", "")):
            # A browser sends any other type for a page of another site without a preflight.
            raise RequestValidationError(
                [
                    {
                        "loc": ("body",),
                        "msg": "content-type must be application/json",
                        "type": "json_type",
                    }
                ]
            )
        if other_json_bytes(body) > JSON_BYTES:
            raise HTTPException(
                413, f"the JSON has more than {JSON_BYTES} bytes outside of image and embedding"
            )
        try:
            question = model.model_validate_json(body)
        except ValidationError as error:
            raise RequestValidationError(_faults(error)) from None
        requests = dict.fromkeys(self.request_parameters, request)
        answer = await self.endpoint(**{name: question}, **requests)
        if not isinstance(answer, Response):
            answer = Response(
                to_json(answer), self.status_code or 200, media_type="application/json"
            )
        await answer(scope, receive, send)


def other_json_bytes(body: bytes) -> int:
    """Return the bytes of a body outside of its first picture and its first embedding, without
    parsing it.

    What is left out is one string or one list of numbers, so it holds no further keys or objects.
    """
    if len(body) <= JSON_BYTES:
        return len(body)
    image, embedding = IMAGE.search(body), EMBEDDING.search(body)
    image_bytes = image.end() - image.start() if image else 0
    embedding_bytes = embedding.end() - embedding.start() if embedding else 0
    return len(body) - image_bytes - min(embedding_bytes, EMBEDDING_BYTES)


def _faults(error: ValidationError) -> list[dict[str, object]]:
    """Return what is wrong with a body, field by field unless that is too much."""
    if error.error_count() > MAX_FAULTS:
        message = f"the body has {error.error_count()} faults, too many to list"
        return [{"loc": ("body",), "msg": message, "type": "too_many_faults"}]
    return [
        {**fault, "loc": ("body", *fault["loc"])} for fault in error.errors(include_input=False)
    ]


def is_json(content_type: str) -> bool:
    """Return whether a body of that content type is JSON, by FastAPI's rule."""
    if content_type == "application/json":
        return True
    message = Message()
    message["content-type"] = content_type
    kind = message.get_content_subtype()
    return message.get_content_maintype() == "application" and (
        kind == "json" or kind.endswith("+json")
    )
