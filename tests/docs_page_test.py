"""Test of the API's page /docs in a browser: it loads nothing from elsewhere."""

from browsing import api, chromium
from fake_index import FakeIndex, serving

__all__ = ["chromium"]  # the fixture


def test_api_can_be_tried_without_other_servers(chromium, tmp_path):
    (tmp_path / "dog.mp4").write_bytes(b"dog")
    index = FakeIndex([(tmp_path / "dog.mp4", 0.0, 8.0, 3.0)])
    with serving(index, token="secret") as (host, port):
        address, urls, errors = f"http://{host}:{port}", [], []
        page = chromium.new_page()
        page.on("request", lambda request: urls.append(request.url))
        page.on("console", lambda message: message.type == "error" and errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{address}/docs?token=secret")
        operation = page.locator(".opblock", has_text="/api/search")
        operation.locator("button").first.click()
        operation.get_by_role("button", name="Try it out").click()
        operation.get_by_role("button", name="Execute").click()
        answer = operation.locator(".live-responses-table .response-col_description pre").first
        api.expect(answer).to_contain_text("dog.mp4")
        page.close()
    assert index.queries == [("a dog on a skateboard", None, None, None)]
    assert errors == []
    assert [url for url in urls if not url.startswith((address, "data:"))] == []
