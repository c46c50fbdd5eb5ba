"""rocketchat_API, a client made for Rocket.Chat, unchanged (the JavaScript one: make test-clients)."""

import pytest
from rocketchat_API.APIExceptions.RocketExceptions import RocketApiException
from rocketchat_API.rocketchat import RocketChat


@pytest.fixture
def client(server):
    return RocketChat(server_url=f"http://127.0.0.1:{server.port}")


def test_a_visitor_is_registered_and_read(client):
    fields = [{"key": "address", "value": "Rocket.Chat street", "overwrite": True}]
    registered = client.livechat_register_visitor(
        "iNKE8a6k6cjbqWhWd",
        visitor={"name": "John Doe", "email": "john.doe@email.com", "customFields": fields},
    )
    assert registered["success"] is True
    assert registered["visitor"]["username"] == "guest-2"
    assert registered["visitor"]["livechatData"] == {"address": "Rocket.Chat street"}
    # It sends a literal trailing "?", and does not encode the token.
    assert client.livechat_get_visitor("iNKE8a6k6cjbqWhWd") == registered


@pytest.mark.parametrize("token", ["with space", "a/b", "a//", "é", "%", "a;b", "a&b"])
def test_a_token_that_it_does_not_encode_is_found(client, token):
    registered = client.livechat_register_visitor(token)
    assert client.livechat_get_visitor(token) == registered


@pytest.mark.parametrize(
    ("token", "visitor", "error"),
    [
        (None, {}, "Match error: Expected string, got null in field visitor.token"),
        (" ", {}, "Token cannot be empty [error-invalid-token]"),
        ("t", {"email": "foo"}, "Invalid email foo [error-invalid-email]"),
        ("t", {"name": 5}, "Match error: Expected string, got number in field visitor.name"),
        ("t" * 257, {}, "Match error: Expected at most 256 characters in field visitor.token"),
        ("t", {"name": "x" * 65536}, "The request body is larger than 65536 bytes"),
    ],
)
def test_the_exception_of_a_refusal_contains_our_error(client, token, visitor, error):
    with pytest.raises(RocketApiException) as raised:
        client.livechat_register_visitor(token, visitor=visitor)
    assert error in str(raised.value)


def test_the_exception_of_an_unknown_token_contains_our_error(client):
    with pytest.raises(RocketApiException) as raised:
        client.livechat_get_visitor("unknown")
    assert "[invalid-token]" in str(raised.value)


def test_what_is_not_here_is_a_clear_exception_too(client):
    with pytest.raises(RocketApiException) as raised:
        client.livechat_rooms()
    assert "Resource not found [error-not-found]" in str(raised.value)
