from typing import Annotated

import msgspec

from harperpy import RequestTarget, Resource, get_context, openai_stream


class Who(msgspec.Struct):
    name: str = "world"


class Card(msgspec.Struct, forbid_unknown_fields=True):
    to: Annotated[str, msgspec.Meta(min_length=1)]
    times: Annotated[int, msgspec.Meta(ge=1, le=3)] = 1


class Greeting(Resource):
    public = {"read"}

    @staticmethod
    async def get(target: RequestTarget[Who]) -> dict[str, str]:
        return {"hello": target.query.name}

    @staticmethod
    async def post(target: RequestTarget, data: Card) -> dict[str, str]:
        return {"hello": " and ".join([data.to] * data.times)}


class Ask(Resource):
    path = "ask/chat/completions"

    @staticmethod
    async def post(target, data):
        body = await data
        chunks = get_context().models.generate_stream(body, model=body["model"])
        async for message in openai_stream(chunks, model=body["model"]):
            yield message
