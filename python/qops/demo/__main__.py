"""Entry point of ``python -m qops.demo``."""

import sys

from qops.demo.cli import main

sys.exit(main())
