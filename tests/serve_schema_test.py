"""Tests of the API against its own OpenAPI document, with generated requests."""

from pathlib import Path

import hypothesis
import pytest
import schemathesis
from fake_index import CONTENT, FakeIndex, segment, serving
from schemathesis import GenerationMode, checks

from xclip_jax.search import clips

CHECKS = (
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
)


def write(path, start, end, output, *, stop):
    Path(output).write_bytes(CONTENT)


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    """Returns the API's schema, connected to a server that accepts files."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "dog.mp4").write_bytes(CONTENT)
    (folder / "added").mkdir()
    index = FakeIndex([(folder / "dog.mp4", 10.0 * n, 10.0 * n + 10, 10.0 * n) for n in range(40)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clips, "export_clip", write)
        patch.setattr(clips, "make_preview", write)
        patch.setattr(clips, "name_clip", lambda *_: "dog.mp4")
        with serving(index, allow_add=folder / "added") as (host, port):
            schema = schemathesis.openapi.from_url(f"http://{host}:{port}/openapi.json")
            schema.hooks.hook("map_path_parameters")(use_ids)
            yield schema


def use_ids(context, path_parameters):
    """Replaces half of the generated ids by those of the index."""
    given = (path_parameters or {}).get("id")
    if isinstance(given, str) and len(given) % 2:
        path_parameters["id"] = segment(1 + len(given) % 40)
    return path_parameters


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_answers_to_generated_requests_conform(api, mode):
    operations = [operation.ok() for operation in api.get_all_operations()]
    assert len(operations) == 14
    for operation in operations:
        if mode is GenerationMode.POSITIVE or [*operation.query, *operation.body]:
            try_requests(operation.as_strategy(generation_mode=mode))


def try_requests(cases):
    @hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @hypothesis.given(case=cases)
    def check(case):
        case.call_and_validate(checks=CHECKS)

    check()
