"""`python -m conveyor_server.cli`."""

from conveyor_server.cli import main

main()
