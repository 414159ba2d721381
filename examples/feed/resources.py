from pathlib import Path
from typing import Annotated, Any

import msgspec

from harperpy import Blob, Context, ReplayBuffer, RequestTarget, Resource

PAGE = Path(__file__).with_name("index.html")

feed = ReplayBuffer(max_events=1000, max_age=3600, max_bytes=1_000_000)


class News(msgspec.Struct, forbid_unknown_fields=True):
    text: Annotated[str, msgspec.Meta(min_length=1, max_length=10_000)]


class Feed(Resource):
    path = "feed"
    public = {"read"}

    @staticmethod
    def get(target: RequestTarget, context: Context):
        """What came after the reader's `Last-Event-ID`, then each event as it is published."""
        return feed.since(context.last_event_id)

    @staticmethod
    async def post(target: RequestTarget, data: News, context: Context) -> dict[str, Any]:
        """Publish."""
        told = feed.append(data, event="news")
        context.status = 201
        return {"id": told.id}


class Page(Resource):
    path = "page"
    public = {"read"}
    hidden = True

    @staticmethod
    def get() -> Blob:
        return Blob("text/html; charset=utf-8", PAGE.read_bytes())
