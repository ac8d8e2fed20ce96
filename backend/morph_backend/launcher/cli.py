"""The launcher's command line: checks, then Triton, then an orderly end."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from morph_backend.launcher.ensembles import ensembles_over, warning
from morph_backend.launcher.launch_settings import launch_settings
from morph_backend.launcher.run_folder import RunFolder, sweep_stale
from morph_backend.launcher.triton_files import check_python, find_installed, find_triton
from morph_runtime.config import with_variables
from morph_runtime.errors import ConfigError

BAD_SETTINGS = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run Triton until a signal or its end.

    Returns:
        0 after an orderly end by signal, and after good checks with --check; 2 when a setting, the model or the
        machine is not fit to start (one sentence on stderr); 1 when the server could not load the model or has died.
    """
    run: RunFolder | None = None
    try:
        settings = launch_settings(sys.argv[1:] if argv is None else argv, os.environ)
        if settings.triton is None:
            check_python()
        files = find_triton() if settings.triton is None else find_installed(settings.triton)
        try:  # only now: a Python that cannot serve need not have these packages
            from morph_backend.launcher.preflight import check_before_start
            from morph_backend.launcher.supervisor import Supervisor
        except ImportError as error:
            raise ConfigError(f"{error}: pip install 'morphserve[server,embedded]'.") from None
        sweep_stale()
        run = RunFolder()
        repository = run.repository(settings)
        config = check_before_start(settings, repository / "morph")
        if settings.check:
            from morph_runtime.engine.check import check_engine  # PyTorch: seconds that a start does not spend here

            print(f"{config.model.path} can be served, mode {config.morph.mode}: {check_engine(config)}.")
            return 0
        if said := warning(ensembles_over(repository)):
            print(said, file=sys.stderr)
        return Supervisor(settings, files, run, repository, config).run()
    except ConfigError as error:
        print(with_variables(str(error)), file=sys.stderr)
        return BAD_SETTINGS
    finally:
        if run is not None:
            run.remove()
