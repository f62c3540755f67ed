"""`python -m crane`: the same as the `crane` command."""

import sys

from crane.cli import main

sys.exit(main())
