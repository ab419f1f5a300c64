"""Names, versions and which version answers when none is named."""

from collections.abc import Callable

import pytest
from scripted import ScriptedLauncher

from mms_lite.engine.model import Model
from mms_lite.engine.registry import Registry
from mms_lite.errors import InvalidRequest, ModelConflict, ModelNotFound, VersionNotFound


@pytest.fixture
def new(make_model: Callable[..., Model]) -> Callable[..., Model]:
    def make(name: str, version: str = "1") -> Model:
        return make_model(ScriptedLauncher(), name=name, version=version)

    return make


New = Callable[..., Model]


def test_an_unknown_name_and_an_unknown_version_are_told_apart(new: New) -> None:
    registry = Registry()
    registry.add(new("a", "1"))
    with pytest.raises(ModelNotFound) as name:
        registry.get("b")
    with pytest.raises(VersionNotFound, match="version 2"):
        registry.get("a", "2")
    assert not isinstance(name.value, VersionNotFound)


def test_the_first_version_is_the_default_and_later_ones_are_not(new: New) -> None:
    registry = Registry()
    first, second = new("a", "1"), new("a", "2")
    registry.add(first)
    registry.add(second)
    assert registry.get("a") is first
    assert registry.get("a", "2") is second
    assert (registry.is_default(first), registry.is_default(second)) == (True, False)


def test_a_version_can_be_made_the_default(new: New) -> None:
    registry = Registry()
    registry.add(new("a", "1"))
    second = new("a", "2")
    registry.add(second)
    registry.set_default(second)
    assert registry.get("a") is second


def test_the_same_name_and_version_twice_is_a_conflict_that_changes_nothing(new: New) -> None:
    registry = Registry()
    first = new("a", "1")
    registry.add(first)
    with pytest.raises(ModelConflict):
        registry.add(new("a", "1"))
    assert registry.list() == [first]


def test_a_swap_keeps_the_default_and_gives_back_the_old_one(new: New) -> None:
    registry = Registry()
    old, other, replacement = new("a", "1"), new("a", "2"), new("a", "1")
    registry.add(old)
    registry.add(other)
    assert registry.swap(replacement) is old
    assert registry.get("a") is replacement
    with pytest.raises(ModelNotFound):
        registry.swap(new("b"))


def test_a_default_that_goes_hands_over_to_the_version_loaded_last(new: New) -> None:
    registry = Registry()
    models = [new("a", version) for version in ("1", "2", "3")]
    for model in models:
        registry.add(model)
    registry.remove(models[0])
    assert registry.get("a") is models[2]
    registry.remove(models[1])
    assert registry.get("a") is models[2]
    registry.remove(models[2])
    with pytest.raises(ModelNotFound):
        registry.get("a")
    assert registry.list() == []


def test_removing_a_model_that_was_replaced_leaves_the_new_one(new: New) -> None:
    registry = Registry()
    old, replacement = new("a"), new("a")
    registry.add(old)
    registry.swap(replacement)
    registry.remove(old)
    assert registry.get("a") is replacement


def test_models_are_listed_by_name_and_versions_in_order_of_loading(new: New) -> None:
    registry = Registry()
    b, a2, a1 = new("b"), new("a", "2"), new("a", "1")
    for model in (b, a2, a1):
        registry.add(model)
    assert registry.list() == [a2, a1, b]
    assert registry.versions("a") == [a2, a1]
    assert registry.has("a", "1") and not registry.has("a", "3") and not registry.has("c", "1")
    with pytest.raises(ModelNotFound):
        registry.versions("c")


def test_where_the_highest_is_the_default_no_other_can_be_made_it(new: New) -> None:
    registry = Registry(highest_is_default=True)
    first = new("a", "1")
    registry.add(first)
    registry.add(new("a", "2"))
    with pytest.raises(InvalidRequest, match="the highest version of a model that can answer is the default"):
        registry.set_default(first)
    assert registry.get("a").spec.version == "2"


async def test_the_highest_version_hands_over_when_it_cannot_answer_and_is_back_when_it_can(
    new: New,
) -> None:
    registry = Registry(highest_is_default=True)
    first, second = new("a", "1"), new("a", "2")
    for model in (first, second):
        await model.scale(1, 1)
        registry.add(model)
    await second.scale(0, 0)
    assert registry.get("a") is first
    assert (registry.is_default(first), registry.is_default(second)) == (True, False)
    await second.scale(1, 1)
    registry.settle_default("a")
    assert registry.get("a") is second
    for model in (first, second):
        await model.close(drain_s=0)


async def test_a_default_that_users_chose_stays_it_without_workers(new: New) -> None:
    registry = Registry()
    first, second = new("a", "1"), new("a", "2")
    for model in (first, second):
        await model.scale(1, 1)
        registry.add(model)
    await first.scale(0, 0)
    assert registry.get("a") is first
    for model in (first, second):
        await model.close(drain_s=0)
