"""Service classes as the settings give them."""

from __future__ import annotations

import pytest

from morph_runtime.config import EngineConfig
from morph_runtime.errors import ConfigError
from morph_runtime.slo import SloClass, class_index, parse_classes


def test_classes_are_read_and_found_by_name() -> None:
    classes = parse_classes(("interactive=2/0.1", " batch=30"), 1.5, 0)
    assert classes == (SloClass("", 1.5), SloClass("interactive", 2, 0.1), SloClass("batch", 30))
    assert [class_index(classes, name) for name in ("", "batch", "gold")] == [0, 2, 0]


@pytest.mark.parametrize("text", ["fast", "=2", "fast=", "fast=0", "fast=-1", "fast=2/", "fast=2/x", "fast=inf"])
def test_what_is_no_class_is_refused_at_start(text: str) -> None:
    with pytest.raises(ConfigError, match="must be entries like interactive=2"):
        EngineConfig.from_mapping({"morph": {"slo_classes": [text]}})


def test_a_class_is_named_once() -> None:
    with pytest.raises(ConfigError, match="names the class 'a' twice"):
        parse_classes(("a=1", "a=2"), 2, 0)


def test_the_environment_sets_classes_and_cap() -> None:
    morph = EngineConfig().with_environment({"MORPH_SLO_CLASSES": "a=1,b=2/0.5", "MORPH_MAX_LEVEL_SHARE": "0.5"}).morph
    assert (morph.slo_classes, morph.max_level_share) == (("a=1", "b=2/0.5"), 0.5)
