"""Who may change mode and cap while the model serves, and what bad values get."""

from __future__ import annotations

import functools
from typing import Any

import msgspec
import pytest

from fake_engine import FakeEngine
from morph_backend.inputs import read_request
from morph_backend.recorder import MetricsRecorder
from morph_backend.run_control import check_key, read_control
from morph_backend.service import Service
from morph_runtime.config import EngineConfig
from morph_runtime.errors import RequestError
from morph_runtime.slo import parse_classes
from morph_runtime.text.tokenizer import Tokenizer
from tiny_model import tiny_tokenizer

KEY = "a-key-of-the-administrator"


class Recording(FakeEngine):
    """Notes what the controller is told."""

    told: tuple[str, float | None] | None = None

    def set_mode(self, mode: str = "", cap: float | None = None) -> None:
        self.told = (mode, cap)


def served(
    make_sender: Any, request: Any, key: str = KEY, classes: tuple[str, ...] = (), pin: str = ""
) -> tuple[Any, Recording]:
    service = Service(
        Tokenizer(tiny_tokenizer()), MetricsRecorder(), line=2, classes=parse_classes(classes, 2, 0), admin_key=key
    )
    engine = Recording(EngineConfig(), service)
    service.attach(engine, msgspec.structs.replace(engine.start(), pin=pin))
    sender = make_sender()
    service.handle(sender, functools.partial(read_request, request))
    assert sender.done.wait(60) and sender.finals == 1
    service.close()
    return sender, engine


def test_the_administrator_changes_mode_and_cap(make_sender: Any, make_request: Any) -> None:
    parameters = f'{{"morph_mode": "off", "morph_cap": "0.5", "morph_admin_key": "{KEY}"}}'
    sender, engine = served(make_sender, make_request(parameters, text_input=""))
    assert sender.error is None and sender.text == "mode off, cap 0.5." and engine.told == ("off", 0.5)


@pytest.mark.parametrize(
    ("parameters", "key", "sentence"),
    [
        ('{"morph_mode": "off"}', KEY, "must be the server's MORPH_ADMIN_KEY"),
        ('{"morph_mode": "off", "morph_admin_key": "x"}', KEY, "must be the server's MORPH_ADMIN_KEY"),
        ('{"morph_mode": "off", "morph_admin_key": ""}', "", "the server has no key"),
        ('{"morph_mode": "off", "morph_admin_key": 5}', KEY, "must be a text"),
        ('{"morph_mode": "fast"}', KEY, "accuracy, balanced, performance, off"),
        ('{"morph_mode": ["off"]}', KEY, "accuracy, balanced, performance, off"),
        ('{"morph_cap": 1.01}', KEY, "from 0"),
        ('{"morph_cap": "nan"}', KEY, "from 0"),
        ('{"morph_cap": true}', KEY, "from 0"),
        ('{"morph_admin_key": "x"}', KEY, "is for requests that set"),
    ],
)
def test_nobody_else_does_and_bad_values_are_told(
    make_sender: Any, make_request: Any, parameters: str, key: str, sentence: str
) -> None:
    sender, engine = served(make_sender, make_request(parameters, text_input="hello"), key)
    assert sender.error is not None and sentence in str(sender.error) and engine.told is None


def test_a_pinned_server_tells_that_it_stays_at_its_level(make_sender: Any, make_request: Any) -> None:
    request = make_request(f'{{"morph_mode": "off", "morph_admin_key": "{KEY}"}}', text_input="")
    sender, engine = served(make_sender, request, pin="w8")
    assert "MORPH_PIN=w8 keeps the server at one level" in str(sender.error) and engine.told is None


def test_a_class_that_nobody_has_set_up_is_refused_once_there_are_classes(make_sender: Any, make_request: Any) -> None:
    request = make_request('{"slo_class": "gold"}', text_input="hello", sampling_parameters='{"max_tokens": 2}')
    assert served(make_sender, request)[0].error is None
    error = served(make_sender, request, classes=("interactive=2/0.1", "batch=30"))[0].error
    assert "must be one of interactive, batch, but is 'gold'" in str(error)


def test_ordinary_requests_are_no_control_and_a_key_must_be_the_whole_key() -> None:
    assert read_control({"slo_class": "gold", "max_tokens": 5}) is None
    check_key(KEY, KEY)
    with pytest.raises(RequestError):
        check_key(KEY[:-1], KEY)
