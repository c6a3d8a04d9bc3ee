"""The doctor's diagnosis."""

from __future__ import annotations

import pytest

from blockem import doctor, model
from blockem.doctor import diagnose, lines


def test_a_whole_installation_misses_nothing() -> None:
    found = diagnose()
    assert found["missing"] == []
    assert found["packages"]["torch"]
    assert found["threads"] >= 1
    assert lines(found)[-1] == "nothing is missing"


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package-here"))
    found = diagnose()
    assert found["missing"] == ["pip install no-such-package-here"]
    assert "no-such-package-here NOT INSTALLED" in lines(found)


def test_a_missing_embedded_model_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "EMBEDDED_PACKAGE", "no_such_package_here")
    found = diagnose()
    assert found["embedded_model"] is None
    assert found["missing"] == [model.INSTALL_EMBEDDED]
