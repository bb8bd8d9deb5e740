"""The schema: closed lists, and errors that say what is allowed."""

import tomllib

import pytest

from regard.catalog import registry
from regard.catalog.facets import (
    FLAGS,
    MULTIPLE,
    SINGLE,
    Application,
    Cost,
    Domain,
    Facets,
    Kind,
    State,
    nearest,
    read_facets,
)
from regard.catalog.papers import BIBLIOGRAPHY, FILE

ROW = {k: v for k, v in tomllib.loads(FILE.read_text())["rela"].items() if k not in BIBLIOGRAPHY}


def test_a_good_row_is_read_as_it_stands() -> None:
    facets = read_facets("rela", ROW)
    for key, value in ROW.items():
        assert getattr(facets, key) == (tuple(value) if isinstance(value, list) else value)


def test_every_facet_has_one_type() -> None:
    assert {*SINGLE, *MULTIPLE, *FLAGS, "host"} == set(Facets.__dataclass_fields__)
    assert (len(SINGLE), len(MULTIPLE), len(FLAGS)) == (12, 6, 3)


def test_values_that_are_not_small_words() -> None:
    assert list(Cost) == ["N2", "N2_lower_const", "NW", "NK", "NlogN", "N", "NM"]
    assert list(State) == ["kv_N", "kv_reduced", "kv_window", "constant", "none"]
    assert Domain("language-vision") in list(Domain)


def test_kinds_are_those_of_the_registry_and_domains_are_applications() -> None:
    assert set(Kind) == set(registry.FOLDERS)
    assert set(Domain) <= set(Application)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("distribution", "reluu", "rela: distribution='reluu' is not one of relu, relu_squared, "),
        ("distribution", None, "rela: distribution=None is not one of "),
        ("distribution", ["relu"], "rela: distribution=\\['relu'\\] is not one of "),
        ("axis", ["token", "spce"], "rela: axis='spce' is not one of space, "),
        ("axis", "token", "rela: axis='token' must be a list of different values"),
        ("axis", [], "rela: axis=\\[\\] must be a list of different values"),
        ("axis", ["token", "token"], "must be a list of different values"),
        ("causal_ok", "yes", "rela: causal_ok='yes' must be true or false"),
        ("stochastic", 1, "rela: stochastic=1 must be true or false"),
        ("host", False, "rela: host=False must be a string"),
        ("distributoin", "relu", "rela: distributoin='relu' is not a facet; facets, nearest first: distribution, "),
    ],
)
def test_a_wrong_value_is_refused(key: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_facets("rela", {**ROW, key: value})


@pytest.mark.parametrize("key", ROW)
def test_every_facet_is_required(key: str) -> None:
    with pytest.raises(ValueError, match=f"rela: {key} is missing; allowed: ") as error:
        read_facets("rela", {k: v for k, v in ROW.items() if k != key})
    assert all(word in str(error.value) for word in SINGLE.get(key) or MULTIPLE.get(key) or ())


def test_nearest_puts_the_closest_first_and_loses_none() -> None:
    known = ["softmax", "sigmoid", "relu"]
    assert nearest("sigmod", known).startswith("sigmoid, ")
    assert set(nearest("sigmod", known).split(", ")) == set(known)
    assert nearest("sigmod", known, 1) == "sigmoid"
