"""Routes that parse and write JSON with pydantic directly.

FastAPI's own handling of a request (dependencies, the body as Python objects, validation of the
answer) takes about as long as a search among a million vectors. Answers and the OpenAPI document
are the same.
"""

import inspect
from email.message import Message
from functools import cached_property

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from pydantic_core import to_json

from indexing.service.middleware import Receive, Scope, Send


class QuickRoute(APIRoute):
    """A route that skips FastAPI's own handling if its coroutine takes only the model of the
    body.
    """

    @cached_property
    def model(self) -> type[BaseModel] | None:
        """The model of the body, if it is the only parameter."""
        parameters = list(inspect.signature(self.endpoint).parameters.values())
        if len(parameters) != 1:
            return None
        model = parameters[0].annotation
        return model if inspect.isclass(model) and issubclass(model, BaseModel) else None

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. Raises RequestValidationError for a wrong body, as any route does."""
        if self.model is None or scope["method"] not in (self.methods or ()):
            await super().handle(scope, receive, send)
            return
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
        try:
            question = self.model.model_validate_json(body)
        except ValidationError as error:
            raise RequestValidationError(
                [
                    {**fault, "loc": ("body", *fault["loc"])}
                    for fault in error.errors(include_input=False)
                ]
            ) from None
        answer = to_json(await self.endpoint(question))
        await Response(answer, self.status_code or 200, media_type="application/json")(
            scope, receive, send
        )


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
