"""The one owner of all session state. No I/O and no threads except in `driver`."""
