"""`python -m diagconv_cli`: the `diagconv` command."""

import sys

from diagconv_cli import main

sys.exit(main())
