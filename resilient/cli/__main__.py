"""`python -m resilient.cli`, for where the command is not on the path."""

from __future__ import annotations

import sys

from resilient.cli import main

sys.exit(main())
