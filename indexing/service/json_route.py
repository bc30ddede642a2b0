"""Routes whose questions pydantic reads and whose answers it writes, in one step each.

FastAPI's own way through a request (dependencies, contexts to close, the body as Python's objects,
the answer held against a model) takes about as long as a search among a million vectors. Clients
are told the same, and so is whoever reads the OpenAPI document.
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
    """A route that goes the short way where its coroutine takes nothing but the model in the body,
    and FastAPI's own way elsewhere.
    """

    @cached_property
    def model(self) -> type[BaseModel] | None:
        """The model, where that is all that is taken."""
        taken = [
            parameter.annotation
            for parameter in inspect.signature(self.endpoint).parameters.values()
        ]
        return (
            taken[0]
            if len(taken) == 1 and inspect.isclass(taken[0]) and issubclass(taken[0], BaseModel)
            else None
        )

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. What is wrong with it is raised, for the application's handlers, as by
        any route.
        """
        if self.model is None or scope["method"] not in (self.methods or ()):
            await super().handle(scope, receive, send)
            return
        request = Request(scope, receive)
        body = await request.body()
        if not is_json(request.headers.get("content-type", "")):
            # Anything else a browser would send for the page of another site without asking us.
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
    """Say whether a body of that content type is JSON, by FastAPI's rule."""
    if content_type == "application/json":
        return True
    message = Message()
    message["content-type"] = content_type
    kind = message.get_content_subtype()
    return message.get_content_maintype() == "application" and (
        kind == "json" or kind.endswith("+json")
    )
