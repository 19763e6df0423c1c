import sys

import pytest

from utils.registry import AnyOf, OfDims, Registry, lazily


class Flat:
    dims = 2


def test_a_class_is_imported_when_it_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "late_module.py").write_text("class Late:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry({"late": "late_module:Late", "flat": Flat})
    assert list(registry) == ["late", "flat"] and "late" in registry and len(registry) == 2
    assert registry["flat"] is Flat and "late_module" not in sys.modules
    assert registry["late"] is sys.modules["late_module"].Late
    with pytest.raises(KeyError):
        registry["other"]


def test_a_registry_takes_and_loses_classes():
    registry = Registry({"flat": Flat})
    registry["own"] = int
    assert registry | {"more": str} == {"flat": Flat, "own": int, "more": str}
    assert {"more": str} | registry == {"more": str, "flat": Flat, "own": int}
    del registry["own"]
    assert dict(registry) == {"flat": Flat}


def test_names_are_looked_up_when_they_are_asked_for():
    registry = Registry({"flat": Flat, "deep": int})
    flat, any_of = OfDims(registry, 2), AnyOf(("alone",), registry)
    registry["later"] = Flat
    assert list(flat) == ["flat", "later"] and list(OfDims(registry, 3)) == ["deep"]
    assert "deep" not in flat and "none" not in flat
    assert list(any_of) == ["alone", "flat", "deep", "later"]
    assert "alone" in any_of and "later" in any_of and "none" not in any_of


def test_a_module_offers_what_others_define():
    find = lazily("package", {"sqrt": "math"})
    assert find("sqrt")(9) == 3
    with pytest.raises(AttributeError, match="module 'package' has no attribute 'cube'"):
        find("cube")
