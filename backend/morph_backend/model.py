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

from morph_backend.admission import Admission
from morph_backend.auto_config import complete
from morph_backend.branch import BranchControl, CountsToOwner, OwnerLink
from morph_backend.branch_wire import KEY_BITS
from morph_backend.branches import Branches
from morph_backend.control import ControlFolder, closed_word
from morph_backend.decisions import DecisionLog
from morph_backend.engine_metrics import EngineMetrics
from morph_backend.exporter import MetricsExporter
from morph_backend.housekeeper import Housekeeper
from morph_backend.inputs import read_request
from morph_backend.lifecycle import DrainDuty, ParentWatch
from morph_backend.metric_catalog import catalog
from morph_backend.nudge import QueueNudger
from morph_backend.place import Place
from morph_backend.queue_watch import BacklogProbe, QueueWatch
from morph_backend.recorder import MetricsRecorder
from morph_backend.run_control import KEY_VARIABLE
from morph_backend.send_watch import SendWatch
from morph_backend.service import Service
from morph_backend.settings import BackendSettings, backend_settings, has_queue_timeouts, load_model_file
from morph_runtime.config import EngineConfig, log_level, resolve_model_folder
from morph_runtime.credits import CreditLimits
from morph_runtime.engine.client import EngineClient, EngineListener
from morph_runtime.engine.handle import EngineHandle, KeeperListener, KeeperSettings
from morph_runtime.engine.keeper import EngineKeeper
from morph_runtime.engine.messages import EngineInfo
from morph_runtime.errors import ConfigError, EngineDown
from morph_runtime.slo import parse_classes
from morph_runtime.text.tokenizer import Tokenizer

WATCHED_MODEL = "morph"
"""The model by whose state the launcher knows the server's."""
OWNER_MARGIN_S = 30
"""By which an instance waits longer for the engine than the one that starts it."""
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
        self._branches: Branches | None = None
        self._parent_watch = ParentWatch(self._leave)
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
        if self._queue_watch is not None:
            self._queue_watch.close()
        self._send_watch.close()
        self._housekeeper.close()
        if self._counts is not None:
            self._counts.close()  # while there is somebody to be told
        self._service.close()
        if self._branches is not None:
            self._branches.close()
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
        self._place = place = Place.of(args, model_config, self._parent_watch.parent)
        tokenizer = Tokenizer.from_folder(resolve_model_folder(config.model.path))
        recorder = MetricsRecorder(settings.report_custom_metrics)
        make = functools.partial(
            Service,
            tokenizer,
            recorder,
            line=config.scheduler.line,
            sender_threads=settings.sender_threads,
            max_request_s=settings.max_request_seconds,
            on_decisions=DecisionLog(settings.log_decisions),
            classes=parse_classes(config.morph.slo_classes, config.morph.ttft_slo_s, config.morph.tpot_slo_s),
            admin_key=os.environ.get(KEY_VARIABLE, ""),
        )
        self._link: OwnerLink | None = None
        info = self._join(place, make, settings) if place.index else self._own(place, make, recorder, config, settings)
        recorder.gauge("morph_ttft_slo_seconds", config.morph.ttft_slo_s)
        self._start_threads(settings, recorder, (name, version), info.max_model_len)
        # What is there now stays: a full collection that walks all of it would hold up every thread for 30 ms.
        gc.collect()
        gc.freeze()
        ready = {"model": info.model, "max_model_len": info.max_model_len, "pid": os.getpid()}
        self._control.say("ready", json.dumps(ready))

    def _own(
        self,
        place: Place,
        make: Callable[..., Service],
        recorder: MetricsRecorder,
        config: EngineConfig,
        settings: BackendSettings,
    ) -> EngineInfo:
        """Start the engine and let the other instances come, if there are any."""
        admission = Admission(CreditLimits(config.scheduler.line))
        self._service = make(on_gone=functools.partial(self._control.say, "error"), admission=admission)
        listener: KeeperListener = self._service
        if place.count > 1:
            self._branches = Branches(place, self._service, admission, recorder, self._service.on_defect)
            self._branches.open()
            listener = self._branches
        keeping = KeeperSettings(
            restarts=settings.engine_restarts,
            pause_s=settings.engine_restart_pause_ms / 1e3,
            silence_s=settings.engine_silence_seconds,
            start_timeout_s=settings.start_timeout_seconds,
        )
        engine = EngineKeeper(functools.partial(self.make_engine, config), listener, keeping)
        try:
            info = engine.start(settings.start_timeout_seconds)
        except (ConfigError, EngineDown) as error:
            engine.close()
            if self._branches is not None:
                self._branches.refuse(str(error), user_error=isinstance(error, ConfigError))
            raise
        self._service.attach(engine, info)
        if self._branches is not None:
            self._branches.serve(engine, info)
        return info

    def _join(self, place: Place, make: Callable[..., Service], settings: BackendSettings) -> EngineInfo:
        """Serve with the engine of the first instance."""
        link = OwnerLink(place)
        self._service = make(
            on_gone=link.gone,
            admission=link.admission,
            engine_metrics=EngineMetrics(MetricsRecorder(enabled=False)),
            first_key=(place.index << KEY_BITS) + 1,
        )
        try:
            info = link.start(settings.start_timeout_seconds + OWNER_MARGIN_S)
        except (ConfigError, EngineDown):
            link.close()
            raise
        self._link, self._control = link, BranchControl(self._control, link)
        self._service.attach(link, info)
        link.listen(self._service)
        return info

    def _leave(self, status: int) -> None:
        """The server has died: this process ends, and those that might be stuck in a call to it."""
        if self._branches is not None:
            self._branches.kill()
        os._exit(status)

    def _start_threads(
        self, settings: BackendSettings, recorder: MetricsRecorder, model: tuple[str, str], max_model_len: int
    ) -> None:
        branches = self._branches
        duties: list[Callable[[], None]] = [
            self._service.poll,
            DrainDuty(self._service, self._control, undrained=lambda: branches.undrained if branches else 0),
        ]
        defect = self._service.on_defect
        self._housekeeper = Housekeeper(settings.cancel_poll_ms / 1e3, duties, defect)
        self._housekeeper.start()
        down = branches.on_down if branches else self._service.on_down
        self._send_watch = SendWatch(self._service.sends, settings.send_silence_seconds or float("inf"), down, defect)
        self._send_watch.start()
        recorder.declare("morph_queue_nudges_total")
        self._counts: CountsToOwner | None = None
        self._exporter: MetricsExporter | None = None
        if settings.report_custom_metrics and self._link is not None:
            self._counts = CountsToOwner(recorder, self._link, settings.metrics_interval_ms / 1e3, defect)
            self._counts.start()
        elif settings.report_custom_metrics:
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
        self._queue_watch: QueueWatch | None = None
        if self._link is None:
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
                sharers=self._place.count,
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
