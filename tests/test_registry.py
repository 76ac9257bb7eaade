"""Every method is a documented frozen dataclass; an unknown name gets a suggestion."""

import dataclasses
import typing

import pytest

from rnp import registry
from rnp.errors import UserError

ALL = [(family, name) for family in registry.FAMILIES for name in registry.names(family)]


@pytest.fixture(params=ALL, ids="/".join)
def method(request):
    return registry.load(*request.param)


def test_the_name_is_the_file(method):
    assert method().name == method.__module__.rpartition(".")[2] != "base"


def test_is_a_frozen_dataclass_with_defaults(method):
    instance = method()
    with pytest.raises(dataclasses.FrozenInstanceError):
        instance.anything = 1
    assert instance == method()
    assert hash(instance) == hash(method())
    with pytest.raises(TypeError):
        method(1)  # keywords only


def test_every_field_has_help(method):
    hints = typing.get_type_hints(method, include_extras=True)
    for field in dataclasses.fields(method):
        if dataclasses.is_dataclass(hints[field.name]):  # its own fields become options
            continue
        metadata = getattr(hints[field.name], "__metadata__", ())
        texts = [part for part in metadata if isinstance(part, str)]
        assert len(texts) == 1, f"{field.name} has no help text"
        assert texts[0].strip() and not texts[0].endswith("."), field.name


def test_has_a_docstring(method):
    assert method.__doc__ and not method.__doc__.startswith(f"{method.__name__}("), (
        "this docstring was generated"
    )


@pytest.mark.parametrize(
    ("family", "name"), [pair for pair in ALL if pair[0] in ("attack", "defense")], ids="/".join
)
def test_names_its_source(family, name):
    assert "Source:" in registry.load(family, name).__doc__


@pytest.mark.parametrize(
    ("family", "typo", "answer"),
    [
        ("attack", "badnet", "unknown attack 'badnet'; did you mean 'badnets'?"),
        ("attack", "base", "choose from"),
        ("attack", "__init__", "choose from"),
        ("dataset", "cifar", "did you mean 'cifar10'?"),
        ("defense", "../io", "choose from"),
        ("attack", "zzz", "choose from adaptive_blend, awp, badnets"),
    ],
)
def test_unknown_names_get_a_suggestion(family, typo, answer):
    with pytest.raises(UserError, match="unknown") as caught:
        registry.load(family, typo)
    assert answer in str(caught.value)


def test_a_method_is_built_from_its_name_and_options():
    attack = registry.build("attack", "badnets", {"size": 2, "label_mode": "all_to_all"})
    assert attack == registry.load("attack", "badnets")(size=2, label_mode="all_to_all")


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("badnet", {}, "unknown attack 'badnet'; did you mean 'badnets'"),
        ("a_blend", {}, "unknown attack 'a_blend'; did you mean 'blend'"),
        ("badnets", {"sise": 2}, "unknown option badnets.sise; did you mean 'size'"),
        ("badnets", {"labels": "all_to_all"}, "unknown option badnets.labels; did you mean"),
        ("badnets", {"poison_rate": 2}, "badnets.poison_rate must be"),
    ],
)
def test_a_wrong_name_option_or_value_is_named(name, options, message):
    with pytest.raises(UserError) as caught:
        registry.build("attack", name, options)
    assert message in str(caught.value)
