"""`python -m trilith_services` is the `trilith` command."""

from trilith_services.cli import main

main()
