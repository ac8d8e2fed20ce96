"""The model that Triton loads. It only puts the parts together; the work is in the modules it imports."""

from __future__ import annotations

import functools
import gc
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from morph_backend.auto_config import complete
from morph_backend.control import ControlFolder, closed_word
from morph_backend.decisions import DecisionLog
from morph_backend.exporter import MetricsExporter
from morph_backend.housekeeper import Housekeeper
from morph_backend.inputs import read_request
from morph_backend.lifecycle import DrainDuty, ParentWatch
from morph_backend.metric_catalog import catalog
from morph_backend.nudge import QueueNudger
from morph_backend.queue_watch import BacklogProbe, QueueWatch
from morph_backend.recorder import MetricsRecorder
from morph_backend.run_control import KEY_VARIABLE
from morph_backend.send_watch import SendWatch
from morph_backend.service import Service
from morph_backend.settings import BackendSettings, backend_settings, has_queue_timeouts, load_model_file
from morph_runtime.config import EngineConfig, log_level, resolve_model_folder
from morph_runtime.engine.client import EngineClient, EngineListener
from morph_runtime.engine.handle import EngineHandle, KeeperSettings
from morph_runtime.engine.keeper import EngineKeeper
from morph_runtime.errors import ConfigError, EngineDown
from morph_runtime.slo import parse_classes
from morph_runtime.text.tokenizer import Tokenizer

WATCHED_MODEL = "morph"
"""The model by whose state the launcher knows the server's."""
DEFAULT_GRPC_PORT = 8001
DEFAULT_METRICS_PORT = 8002


class TritonPythonModel:
    """Triton's interface: `initialize`, `execute`, `is_ready`, `finalize`."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Fill a `config.pbtxt` that leaves the tensors out, as those of Triton's vLLM backend do.

        Triton calls it in a process of its own, which is thrown away.
        """
        return complete(auto_complete_model_config)

    def initialize(self, args: dict[str, str]) -> None:
        """Read the settings, start the engine and the threads.

        Raises:
            pb_utils.TritonModelException: with one sentence for the operator; Triton does not load the model then.
        """
        self._parent_watch = ParentWatch()
        self._parent_watch.start()
        # Another model of this kind in the same server must not speak for the one that the launcher watches.
        watched = args["model_name"] == WATCHED_MODEL
        self._control = ControlFolder.from_environment(os.environ) if watched else ControlFolder(None)
        try:
            logging.basicConfig(
                level=log_level(os.environ),
                format="%(asctime)s %(levelname)s %(name)s: %(message)s",
                stream=sys.stderr,
            )
            self._start(args)
        except (ConfigError, EngineDown) as error:
            self._control.say("error", str(error))
            self._parent_watch.close()
            raise pb_utils.TritonModelException(str(error)) from None

    def make_engine(self, config: EngineConfig, listener: EngineListener) -> EngineHandle:
        """An engine to serve with, and another one when it has ended; a subclass may bring its own."""
        return EngineClient(config, listener, server=self._parent_watch.parent)

    def execute(self, requests: Sequence[Any]) -> None:
        """Take requests (one at a time, as configured); returns once the engine has room for them."""
        if self._nudger is not None:
            self._nudger.entered()
        for request in requests:
            self._service.handle(request.get_response_sender(), functools.partial(read_request, request))
        if self._nudger is not None:
            self._nudger.left()

    def is_ready(self) -> bool:
        """Whether the engine is up; Triton asks from release 26.03 on."""
        return self._service.healthy

    def finalize(self) -> None:
        """End the engine and all threads."""
        if self._nudger is not None:
            self._nudger.close()
            self._nudges.close()
            self._backlog.close()
        self._queue_watch.close()
        self._send_watch.close()
        self._housekeeper.close()
        self._service.close()
        if self._exporter is not None:
            self._exporter.close()
        self._control.say(closed_word(os.getpid()))
        self._parent_watch.close()
        gc.collect()

    def _start(self, args: dict[str, str]) -> None:
        model_config = json.loads(args["model_config"])
        name, version = args["model_name"], args["model_version"]
        settings = backend_settings(model_config)
        if not has_queue_timeouts(model_config):
            settings = replace(settings, queue_nudge=False)  # a nudge would reach the model, and never be needed
        file = load_model_file(Path(args["model_repository"]) / version / "model.json")
        config = file.config
        if not file.log_stats:
            settings = replace(settings, report_custom_metrics=False)
        tokenizer = Tokenizer.from_folder(resolve_model_folder(config.model.path))
        recorder = MetricsRecorder(settings.report_custom_metrics)
        self._service = Service(
            tokenizer,
            recorder,
            line=config.scheduler.line,
            sender_threads=settings.sender_threads,
            max_request_s=settings.max_request_seconds,
            on_decisions=DecisionLog(settings.log_decisions),
            on_gone=functools.partial(self._control.say, "error"),
            classes=parse_classes(config.morph.slo_classes, config.morph.ttft_slo_s, config.morph.tpot_slo_s),
            admin_key=os.environ.get(KEY_VARIABLE, ""),
        )
        keeping = KeeperSettings(
            restarts=settings.engine_restarts,
            pause_s=settings.engine_restart_pause_ms / 1e3,
            silence_s=settings.engine_silence_seconds,
            start_timeout_s=settings.start_timeout_seconds,
        )
        engine = EngineKeeper(functools.partial(self.make_engine, config), self._service, keeping)
        try:
            info = engine.start(settings.start_timeout_seconds)
        except (ConfigError, EngineDown):
            engine.close()
            raise
        self._service.attach(engine, info)
        recorder.gauge("morph_ttft_slo_seconds", config.morph.ttft_slo_s)
        self._start_threads(settings, recorder, (name, version), info.max_model_len)
        # What is there now stays: a full collection that walks all of it would hold up every thread for 30 ms.
        gc.collect()
        gc.freeze()
        ready = {"model": info.model, "max_model_len": info.max_model_len, "pid": os.getpid()}
        self._control.say("ready", json.dumps(ready))

    def _start_threads(
        self, settings: BackendSettings, recorder: MetricsRecorder, model: tuple[str, str], max_model_len: int
    ) -> None:
        duties: list[Callable[[], None]] = [
            self._service.poll,
            DrainDuty(self._service, self._control),
        ]
        defect = self._service.on_defect
        self._housekeeper = Housekeeper(settings.cancel_poll_ms / 1e3, duties, defect)
        self._housekeeper.start()
        self._send_watch = SendWatch(
            self._service.sends, settings.send_silence_seconds or float("inf"), self._service.on_down, defect
        )
        self._send_watch.start()
        recorder.declare("morph_queue_nudges_total")
        self._exporter: MetricsExporter | None = None
        if settings.report_custom_metrics:
            self._exporter = MetricsExporter(
                recorder,
                catalog(max_model_len),
                {"model": model[0], "version": model[1]},
                settings.metrics_interval_ms / 1e3,
                lambda: recorder.gauge("morph_execute_waiting", self._service.held),
                defect,
            )
            self._exporter.start()
        metrics_address = _address("MORPH_METRICS", DEFAULT_METRICS_PORT)
        self._queue_watch = QueueWatch(
            metrics_address,
            model,
            settings.queue_poll_ms / 1e3,
            lambda: self._service.held,
            self._service.publish_queue,
            defect,
        )
        self._queue_watch.start()
        self._nudger: QueueNudger | None = None
        if settings.queue_nudge:
            from morph_backend.nudge_stream import NudgeConnection  # brings gRPC: not without need

            grpc_address = "{}:{}".format(*_address("MORPH_GRPC", DEFAULT_GRPC_PORT))
            self._nudges = NudgeConnection(grpc_address, model[0])
            self._backlog = BacklogProbe(metrics_address, model)
            self._nudger = QueueNudger(
                self._nudges.open,
                self._backlog,
                on_sent=functools.partial(recorder.count, "morph_queue_nudges_total"),
                on_defect=defect,
            )


def _address(prefix: str, default_port: int) -> tuple[str, int]:
    """Host and port of one of Triton's endpoints on this machine, from `<prefix>_HOST` and `<prefix>_PORT`."""
    host = os.environ.get(f"{prefix}_HOST") or "127.0.0.1"
    text = os.environ.get(f"{prefix}_PORT") or str(default_port)
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise ConfigError(f"{prefix}_PORT must be a port between 1 and 65535, but is '{text}'.")
    return host, int(text)
