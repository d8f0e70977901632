"""Tests of what is known about the devices."""

from types import SimpleNamespace

import jax
import pytest

from xclip_jax.devices import is_recent_gpu


@pytest.mark.parametrize(
    ("backend", "capability", "recent"),
    [
        ("gpu", "7.5", False),
        ("gpu", "8.0", True),
        ("gpu", "10.0", True),
        ("gpu", "gfx90a", False),  # AMD's
        ("gpu", None, False),
        ("cpu", "9.0", False),
    ],
)
def test_recent_gpu_has_a_compute_capability_of_8_or_more(monkeypatch, backend, capability, recent):
    fields = {} if capability is None else {"compute_capability": capability}
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(**fields)])
    assert is_recent_gpu() == recent
