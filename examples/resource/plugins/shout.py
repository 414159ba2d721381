from harperpy import define_backend


async def answer(prompt):
    for word in prompt.text.split():
        yield word.upper() + " "


def handle_application(scope):
    shout = define_backend("shout", generate_stream=answer)
    scope.models.register_backend("generative", "shout", shout)
