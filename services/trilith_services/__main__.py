"""`python -m trilith_services` is `trilith`: how the supervisor starts processes of this installation."""

from trilith_services.cli import main

main()
