"""`python -m amygdala_lib.cli`: the `amygdala` command where it is not installed."""

import sys

from amygdala_lib.cli import main

sys.exit(main())
