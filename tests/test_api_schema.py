"""schemathesis, which makes requests of the API's own document, finds none that the server fails on."""

import contextlib

import pytest
import test_api_answers
import test_api_images
import test_api_speech
from hypothesis import given, settings
from test_api import serving


@contextlib.contextmanager
def hearing(kind):
    model = test_api_speech.make(kind)
    with test_api_speech.serving(model) as port:
        yield port, model


SERVERS = {
    "continues texts": (serving, 9),
    "answers to texts": (test_api_answers.serving, 9),
    "labels images": (test_api_images.serving, 7),
    "is dictated to": (lambda: hearing("dictated"), 9),
    "spells": (lambda: hearing("spelled"), 6),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SERVERS)
def test_no_request_of_the_document_is_a_server_error(kind):
    import schemathesis
    from schemathesis.checks import not_a_server_error

    start, addresses = SERVERS[kind]
    with start() as (port, model):
        schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")
        operations = [operation.ok() for operation in schema.get_all_operations()]
        assert len(operations) >= addresses
        for operation in operations:

            @settings(max_examples=60, deadline=None, database=None, derandomize=True)
            @given(case=operation.as_strategy())
            def send(case):
                answer = case.call(base_url=f"http://127.0.0.1:{port}")
                case.validate_response(answer, checks=(not_a_server_error,))

            send()
        assert model.healthy
