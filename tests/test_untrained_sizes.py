"""A model that says what it was trained on warns off other sizes."""

from __future__ import annotations

import json

import pytest

from opensora import components
from opensora.pipeline import _tell_untrained
from opensora.request import Size


def test_a_checkpoint_says_what_it_was_trained_on(tmp_path):
    assert components.trained_sizes(tmp_path) == []
    (tmp_path / "config.json").write_text(json.dumps({"trained_sizes": [[17, 64, 64]]}))
    assert components.trained_sizes(tmp_path) == [[17, 64, 64]]


@pytest.mark.parametrize(("size", "warned"), [(Size(17, 64, 64), False), (Size(1, 64, 64), True)])
def test_other_sizes_are_warned_off(size: Size, warned: bool, caplog: pytest.LogCaptureFixture):
    _tell_untrained(size, [[17, 64, 64]])
    assert ("expect noise at 1 frames of 64x64" in caplog.text) == warned


def test_nothing_is_said_where_nothing_is_known(caplog: pytest.LogCaptureFixture):
    _tell_untrained(Size(51, 240, 426), [])
    assert not caplog.text
