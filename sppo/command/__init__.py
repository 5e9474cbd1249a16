"""How every command starts and ends: errors and exit codes, the terminal, the request to stop, the search path."""
