import pytest


@pytest.fixture
def harper_environ():
    return {"WEBHOOK_SECRET": "whsec_b25seS15b3UtYW5kLXRoZS1zZW5kZXI="}
