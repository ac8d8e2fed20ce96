"""`python -m morph_backend.launcher`."""

import sys

from morph_backend.launcher.cli import main

sys.exit(main())
