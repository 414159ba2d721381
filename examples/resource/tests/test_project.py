async def test_greeting(harper_client):
    answer = await harper_client.get("/Greeting?name=Ada")
    assert await answer.json() == {"hello": "Ada"}
    answer = await harper_client.post("/Greeting", json={"to": "Ada", "times": 2})
    assert await answer.json() == {"hello": "Ada and Ada"}


async def test_what_does_not_fit_is_refused(harper_client):
    answer = await harper_client.post("/Greeting", json={"to": "Ada", "times": 4})
    assert answer.status == 400
    assert (await answer.json())["errors"][0]["path"] == "/times"


async def test_shout(harper_client):
    body = {"model": "shout", "messages": [{"role": "user", "content": "hello"}]}
    answer = await (await harper_client.post("/v1/chat/completions", json=body)).json()
    assert answer["choices"][0]["message"]["content"] == "HELLO "
