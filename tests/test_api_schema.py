"""schemathesis, which makes requests of the API's own document, finds none that the server fails on."""

import pytest
from hypothesis import given, settings
from test_api import serving


@pytest.mark.slow
def test_no_request_of_the_document_is_a_server_error():
    import schemathesis
    from schemathesis.checks import not_a_server_error

    with serving() as (port, model):
        schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")
        operations = [operation.ok() for operation in schema.get_all_operations()]
        assert len(operations) >= 9
        for operation in operations:

            @settings(max_examples=60, deadline=None, database=None, derandomize=True)
            @given(case=operation.as_strategy())
            def send(case):
                answer = case.call(base_url=f"http://127.0.0.1:{port}")
                case.validate_response(answer, checks=(not_a_server_error,))

            send()
        assert model.healthy
